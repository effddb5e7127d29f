"""The exported model against the training model: the same logits from the same checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.tokenization.making import TrainingSettings, import_tokenizer, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.convert import to_hf
from megatron_kosmos.engine.generate import Decoding, Generator
from tests.distributed.presets import PRESETS, shrunk
from tests.unit.data.tokenization.foreign_tokenizers import falcon_like
from tests.unit.hf.checkpoints import STEP, trained_run

pytestmark = pytest.mark.parity

BF16 = {"training__precision": "bf16"}
KOSMOS2, MODERN = shrunk("kosmos2"), shrunk("modern")
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"model__decoder__tie_embeddings": True},
    "learned_and_xpos": {"model__decoder__positions": "learned"},
    "learned_alone": {"model__decoder__positions": "learned", "model__decoder__xpos": False},
    "grouped": {"model__decoder__num_query_groups": 2, "model__vision__activation": "gelu"},
    "multi_query_tied_bf16": {
        "model__decoder__num_query_groups": 1,
        "model__decoder__tie_embeddings": True,
        **BF16,
    },
    **{name: shrunk(name) for name in PRESETS},
    "modern_grouped_bf16": MODERN | BF16 | {"model__decoder__num_query_groups": 2},
    "kosmos2_untied_bf16": KOSMOS2 | BF16 | {"model__decoder__tie_embeddings": False},
    "sinusoids_with_xpos": {
        "model__decoder__positions": "sinusoidal",
        "model__decoder__scale_embeddings": True,
        "model__vision__features": "normalized",
    },
}
BYTE_LEVEL = {"modern", "modern_grouped_bf16"}
TEXT = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.\nAnother line."] * 5


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(root / "sentencepiece")
    import_tokenizer(falcon_like(root / "falcon", TEXT, vocab_size=300)).save(root / "byte_level")
    return {kind: root / kind for kind in ("sentencepiece", "byte_level")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_training_model(variant: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tokenizers["byte_level" if variant in BYTE_LEVEL else "sentencepiece"]
    trained_run(tmp_path / "run", tokenizer, **VARIANTS[variant])
    report = to_hf(tmp_path / "run", tmp_path / "exported")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 2e-5
    assert json.loads((tmp_path / "exported" / "conversion.json").read_text()) == vars(report)


REMOTE = """
import json, sys

folder, picture, prompt, *unneeded = sys.argv[1:]

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_kosmos", "megatron", "deepspeed"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Block())
sys.modules |= dict.fromkeys(unneeded)  # as if they were not installed
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=prompt, images=[Image.open(picture)], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
tokens = model.generate(**inputs, max_new_tokens=6, num_beams=5)
model.save_pretrained(folder + "_again")
processor.save_pretrained(folder + "_again")
again = AutoModelForCausalLM.from_pretrained(folder + "_again", trust_remote_code=True).eval()
pipe = pipeline("image-text-to-text", model=folder + "_again", trust_remote_code=True)
asked = {"images": [[picture], [picture]], "text": [prompt, "a seven"]}
piped = pipe(**asked, max_new_tokens=6, return_full_text=False, generate_kwargs={"num_beams": 5})
print(json.dumps({
    "model_type": config.model_type,
    "ids": inputs["input_ids"].tolist(),
    "pixels": inputs["pixel_values"].tolist(),
    "logits": logits.tolist(),
    "piped": [answer["generated_text"] for answer in piped],
    "text": processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:])[0],
    "tokenizer": tokenizer(prompt, add_special_tokens=False)["input_ids"],
    "same_weights": all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())),
}))
"""


BY_TOKENIZER = {"sentencepiece": VARIANTS["tied"], "byte_level": KOSMOS2 | {"model__decoder__query_key_norm": True}}


@pytest.mark.parametrize("kind", BY_TOKENIZER)
def test_the_folder_loads_in_a_process_without_this_package(
    kind: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = tokenizers[kind]
    trained_run(tmp_path / "run", tokenizer, **BY_TOKENIZER[kind])
    folder, picture = tmp_path / "exported", tmp_path / "picture.png"
    to_hf(tmp_path / "run" / "checkpoints" / f"step_{STEP:08d}", folder)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    prompt = "An image of\n<image> a seven"
    unneeded = [] if kind == "sentencepiece" else ["sentencepiece"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", REMOTE, str(folder), str(picture), prompt, *unneeded],
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    ours = KosmosTokenizer.load(tokenizer)
    assert found["model_type"] == "megatron_kosmos"
    assert found["tokenizer"] == ours.encode(prompt)
    assert found["same_weights"]
    slots = [ours.image_id, *[ours.pad_id] * 3, ours.end_of_image_id]
    assert found["ids"] == [[ours.bos_id, *ours.encode("An image of\n"), *slots, *ours.encode("a seven")]]
    pixels = load_image(picture.read_bytes(), 16)
    assert (torch.tensor(found["pixels"][0]) - pixels).abs().mean() < 1e-3
    generator = Generator.load(folder, torch.device("cpu"))
    inputs = generator.processor(text=prompt, images=[Image.open(picture)], return_tensors="pt")
    with torch.no_grad():
        logits = generator.model(**inputs).logits
    assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-6)
    decoding = Decoding(max_new_tokens=6, num_beams=5)
    assert generator.generate([prompt, "a seven"], [[picture], [picture]], decoding) == found["piped"]
    assert found["piped"][0] == found["text"]
