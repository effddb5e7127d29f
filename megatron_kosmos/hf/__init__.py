"""The Hugging Face side: model, processor and tokenizer classes that also travel with an exported folder.

Registered so that `save_pretrained` of any of them writes the code files beside its configuration.
"""

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration
from megatron_kosmos.hf.processing_kosmos import KosmosImageProcessor, KosmosProcessor
from megatron_kosmos.hf.tokenization_kosmos import KosmosHFTokenizer

KosmosConfig.register_for_auto_class("AutoConfig")
KosmosForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
KosmosImageProcessor.register_for_auto_class("AutoImageProcessor")
KosmosHFTokenizer.register_for_auto_class("AutoTokenizer")
KosmosProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "KosmosConfig",
    "KosmosForConditionalGeneration",
    "KosmosHFTokenizer",
    "KosmosImageProcessor",
    "KosmosProcessor",
]
