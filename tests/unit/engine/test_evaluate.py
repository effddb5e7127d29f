"""Evaluation of an exported model: the scores that the choice among captions rests on."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.evaluate import Evaluator
from megatron_kosmos.engine.generate import Generator
from tests.distributed.tiny import tiny_run
from tests.unit.hf.checkpoints import trained_run


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    root = tmp_path_factory.mktemp("export")
    text = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.\nAnother line."] * 5
    train_tokenizer(text, TrainingSettings(vocab_size=300)).save(root / "tokenizer")
    trained_run(root / "run", root / "tokenizer", model__decoder__vocab_size=300)
    to_hf(root / "run", root / "hf", ExportOptions(verify=False))
    return Generator.load(root / "hf", torch.device("cpu"))


@pytest.mark.parametrize("prompt", ["", "An image of"])
@torch.no_grad()
def test_a_caption_is_scored_by_its_tokens_after_the_prompt(generator: Generator, prompt: str) -> None:
    """As it is generated: the caption's first word begins a word, whatever the prompt ends with."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    evaluator = Evaluator(generator, tiny_run(evaluation__caption_prompt=prompt))
    given = generator.processor(text=[prompt], images=[[picture]], return_tensors="pt")
    tokenizer = generator.processor.tokenizer
    caption = [*tokenizer.encode("a seven", add_special_tokens=False), tokenizer.eos_token_id]
    expected = 0.0
    for token in caption:
        logits = generator.model(**given, use_cache=False).logits[0, -1]
        expected += logits.log_softmax(-1)[token].item()
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[token]])], dim=1)
        for name in ("attention_mask", "image_embeds_position_mask"):
            last = torch.full((1, 1), name == "attention_mask", dtype=given[name].dtype)
            given[name] = torch.cat([given[name], last], dim=1)
    assert evaluator._log_probability([picture], "a seven").item() == pytest.approx(expected, abs=1e-4)
