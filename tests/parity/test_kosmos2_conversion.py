"""Stock Kosmos-2 folders, written by transformers itself, become runs and come back to the bit."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    XLMRobertaTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.config import load_config
from megatron_kosmos.data.tokenization.making import TrainingSettings, import_tokenizer, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.from_hf import ImportOptions, from_hf
from megatron_kosmos.hf.kosmos2 import FormatError
from tests.distributed.presets import shrunk
from tests.parity.oracles import randomized
from tests.unit.hf.checkpoints import trained_run

pytestmark = pytest.mark.parity

TEXT = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.", "Another line of text."] * 5
PROMPT = "<grounding> An image of<phrase> a seven</phrase><object><patch_index_0044><patch_index_0863></object>"
SIDE, LATENTS = 16, 3
ODD: dict[str, dict[str, Any]] = {
    "small": {},
    "odd": {"layers": 3, "embed_dim": 36, "ffn_dim": 50, "attention_heads": 3, "scale_embedding": False},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Kosmos2Processor:
    """Return transformers' processor around a small tokenizer of XLM-R's kind."""
    folder, model = tmp_path_factory.mktemp("xlm_roberta"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=70, minloglevel=2, hard_vocab_limit=False
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    made = Kosmos2Processor(images, XLMRobertaTokenizer.from_pretrained(folder))
    made.pieces = model.getvalue()
    return made


def stock_model(vocab_size: int, **text: Any) -> Kosmos2ForConditionalGeneration:
    sizes = {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 128}
    config = Kosmos2Config(
        text_config=sizes | {"vocab_size": vocab_size} | text,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        latent_query_num=LATENTS,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )
    model: Kosmos2ForConditionalGeneration = randomized(Kosmos2ForConditionalGeneration(config).eval(), seed=7)
    return model


def save(folder: Path, processor: Kosmos2Processor, **text: Any) -> Path:
    stock_model(len(processor.tokenizer) + 5, **text).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "sentencepiece.bpe.model").write_bytes(processor.pieces)  # the released folder has it, too
    return folder


def answer(folder: Path) -> tuple[list[int], Tensor, list[int]]:
    """Return the ids that stock classes loaded from `folder` make of a prompt, the logits, and what they generate."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert (type(model), type(processor)) == (Kosmos2ForConditionalGeneration, Kosmos2Processor)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    inputs = processor(text=PROMPT, images=Image.fromarray(noise), num_image_tokens=LATENTS, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return inputs["input_ids"][0].tolist(), logits, tokens[0].tolist()


@pytest.mark.parametrize(
    "kind", ["odd", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("small", "untied"))]
)
def test_a_stock_model_comes_back_to_the_bit(kind: str, processor: Kosmos2Processor, tmp_path: Path) -> None:
    stock = save(tmp_path / "stock", processor, **ODD[kind])
    there = from_hf(stock, tmp_path / "run")
    back = to_hf(tmp_path / "run", tmp_path / "again", ExportOptions(format="kosmos2"))
    for report in (there, back):
        assert report.max_abs_logit_diff is not None
        assert report.max_abs_logit_diff <= 1e-5
    expected, found = load_file(stock / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ids, logits, tokens = answer(stock)
    ids_again, logits_again, tokens_again = answer(tmp_path / "again")
    assert ids_again == ids
    assert torch.equal(logits_again, logits)
    assert tokens_again == tokens
    run = load_config(tmp_path / "run" / "config.yaml")
    assert run.model.decoder.vocab_size == len(processor.tokenizer) + 5
    tokenizer = KosmosTokenizer.load(run.data.tokenizer)
    stock_ids = processor.tokenizer.convert_tokens_to_ids(["<pad>", "<image>", "</image>", "</line>"])
    assert [tokenizer.pad_id, tokenizer.image_id, tokenizer.end_of_image_id, tokenizer.line_id] == stock_ids
    assert tokenizer.encode(TEXT[0]) == processor.tokenizer(TEXT[0], add_special_tokens=False)["input_ids"]
    assert "Kosmos2" in (tmp_path / "again" / "config.json").read_text()
    assert "AutoModelForImageTextToText" in (tmp_path / "again" / "README.md").read_text()
    assert not list((tmp_path / "again").glob("*.py"))


def test_a_stock_model_also_exports_to_our_class(processor: Kosmos2Processor, tmp_path: Path) -> None:
    from_hf(save(tmp_path / "stock", processor), tmp_path / "run", ImportOptions(verify=False))
    report = to_hf(tmp_path / "run", tmp_path / "ours")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= 1e-5


def test_what_old_versions_saved_besides_the_weights_is_left_out(processor: Kosmos2Processor, tmp_path: Path) -> None:
    stock = save(tmp_path / "stock", processor)
    tensors = load_file(stock / "model.safetensors")
    tensors["vision_model.model.embeddings.position_ids"] = torch.arange(5)[None]
    tensors["text_model.lm_head.weight"] = tensors["text_model.model.embed_tokens.weight"].clone()
    save_file(tensors, stock / "model.safetensors", metadata={"format": "pt"})
    from_hf(stock, tmp_path / "run", ImportOptions(verify=False))
    tensors["text_model.lm_head.weight"][0] += 1.0
    save_file(tensors, stock / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"left over: text_model\.lm_head\.weight"):
        from_hf(stock, tmp_path / "other", ImportOptions(verify=False))


def _edit(section: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[section].update(fields)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_edit("text_config", activation_function="relu", pad_token_id=0), "activation_function='relu' must be 'gelu'"),
        (_edit("text_config", activation_function="relu", pad_token_id=0), "text_config.pad_token_id=0 must be 1"),
        (_edit("vision_config", layer_norm_eps=1e-6), "vision_config.layer_norm_eps=1e-06 must be 1e-05"),
        (_edit("vision_config", image_size=[16, 16]), r"image_size=\[16, 16\] must be one number"),
    ],
)
def test_a_kosmos2_that_cannot_be_trained_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], problem: str, processor: Kosmos2Processor, tmp_path: Path
) -> None:
    stock = save(tmp_path / "stock", processor)
    config = json.loads((stock / "config.json").read_text())
    change(config)
    (stock / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=problem):
        from_hf(stock, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_preset_trained_here_exports_to_the_stock_classes(processor: Kosmos2Processor, tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(processor.pieces)
    import_tokenizer(tmp_path, newlines="line").save(tmp_path / "tokenizer")
    tokenizer = KosmosTokenizer.load(tmp_path / "tokenizer")
    trained_run(tmp_path / "run", tmp_path / "tokenizer", model__decoder__vocab_size=1150, **shrunk("kosmos2"))
    report = to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(format="kosmos2"))
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= 1e-5
    ids, _, _ = answer(tmp_path / "out")
    assert ids[:2] == [tokenizer.bos_id, tokenizer.image_id]
    assert ids[2 + LATENTS] == tokenizer.end_of_image_id


def test_a_tokenizer_or_vocabulary_that_does_not_fit_is_refused(processor: Kosmos2Processor, tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(processor.pieces)
    import_tokenizer(tmp_path).save(tmp_path / "tokenizer")
    trained_run(tmp_path / "run", tmp_path / "tokenizer", **shrunk("kosmos2"))
    with pytest.raises(FormatError, match="the vocabulary of 347 has no room for what Kosmos2Processor needs"):
        to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(format="kosmos2"))
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(tmp_path / "trained")
    with pytest.raises(FormatError, match="trained is not numbered as XLM-R's"):
        to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(format="kosmos2", tokenizer=tmp_path / "trained"))
    assert not (tmp_path / "out").exists()


def test_another_model_does_not_export_to_the_stock_class(processor: Kosmos2Processor, tmp_path: Path) -> None:
    from_hf(save(tmp_path / "stock", processor), tmp_path / "run", ImportOptions(verify=False))
    vocab_size = len(processor.tokenizer) + 5
    trained_run(tmp_path / "other", tmp_path / "run" / "tokenizer", model__decoder__vocab_size=vocab_size)
    with pytest.raises(FormatError) as caught:
        to_hf(tmp_path / "other", tmp_path / "out", ExportOptions(format="kosmos2"))
    for problem in (
        "model.decoder.xpos is True, Kosmos-2 has False",
        "model.decoder.positions is none, Kosmos-2 has sinusoidal",
        "model.vision.features is hidden, Kosmos-2 has normalized",
        "model.resampler.kind is perceiver, Kosmos-2 has cross_attention",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()
