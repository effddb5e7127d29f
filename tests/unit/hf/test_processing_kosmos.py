"""The processor: the layout of prompts with pictures, padding, and pixels equal to training's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.hf.load_tokenizer import exported_tokenizer, training_tokenizer
from megatron_kosmos.hf.processing_kosmos import KosmosImageProcessor, KosmosProcessor

SIDE, LATENTS = 32, 3


@pytest.fixture(params=["trained", "falcon"])
def kind(request: pytest.FixtureRequest) -> str:
    """A tokenizer of each library."""
    return str(request.param)


@pytest.fixture
def processor(kind: str, tokenizers: dict[str, Path]) -> KosmosProcessor:
    image_processor = KosmosImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokenizer = training_tokenizer(tokenizers[kind])
    return KosmosProcessor(image_processor, tokenizer, num_image_tokens=LATENTS)


@pytest.fixture
def ours(kind: str, tokenizers: dict[str, Path]) -> KosmosTokenizer:
    return KosmosTokenizer.load(tokenizers[kind])


def picture(width: int = 50, height: int = 40, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return a smooth coloured picture, as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def image_ids(ours: KosmosTokenizer) -> list[int]:
    return [ours.image_id, *[ours.pad_id] * LATENTS, ours.end_of_image_id]


IMAGE_SLOTS = [0, *[1] * LATENTS, 0]


def test_an_image_stands_before_the_text(processor: KosmosProcessor, ours: KosmosTokenizer) -> None:
    text = ours.encode("An image of")
    for images in (picture(), [picture()]):
        inputs = processor(text="An image of", images=images)
        assert inputs["input_ids"] == [[ours.bos_id, *image_ids(ours), *text]]
        assert inputs["image_embeds_position_mask"] == [[0, *IMAGE_SLOTS, *[0] * len(text)]]
        assert inputs["attention_mask"] == [[1] * len(inputs["input_ids"][0])]
        assert np.asarray(inputs["pixel_values"]).shape == (1, 3, SIDE, SIDE)


def test_placeholders_say_where_images_go(processor: KosmosProcessor, ours: KosmosTokenizer) -> None:
    inputs = processor(text="see <image> a cat,\n<image>and", images=[picture(), picture(seed=1)], return_tensors="pt")
    expected = [ours.bos_id, *ours.encode("see"), *image_ids(ours), *ours.encode("a cat,\n"), *image_ids(ours)]
    assert inputs["input_ids"].tolist() == [expected + ours.encode("and")]
    assert inputs["image_embeds_position_mask"].sum() == 2 * LATENTS
    assert (inputs["input_ids"][inputs["image_embeds_position_mask"] == 1] == ours.pad_id).all()
    assert inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)


def test_a_batch_is_padded_and_its_images_stand_in_row_order(processor: KosmosProcessor, ours: KosmosTokenizer) -> None:
    pictures = [picture(seed=seed) for seed in range(3)]
    texts = ["An image of", "Question: what is it? Answer:", "no image"]
    images = [pictures[:2], pictures[2], None]
    inputs = processor(text=texts, images=images, return_tensors="pt")
    alone = [processor(text=text, images=of_row) for text, of_row in zip(texts, images, strict=True)]
    ragged = processor(text=texts, images=images, padding=False)
    assert ragged["input_ids"] == [row["input_ids"][0] for row in alone]
    longest = max(len(row["input_ids"][0]) for row in alone)
    assert inputs["input_ids"].shape == (3, longest)
    for index, row in enumerate(alone):
        length = len(row["input_ids"][0])
        for name in ("input_ids", "image_embeds_position_mask", "attention_mask"):
            assert inputs[name][index, longest - length :].tolist() == row[name][0]
        assert inputs["attention_mask"][index].sum() == length
        assert (inputs["input_ids"][index, : longest - length] == ours.pad_id).all()
    expected = torch.stack([load_image(each, SIDE) for each in pictures])
    assert torch.allclose(inputs["pixel_values"], expected, atol=1e-6)
    processor.tokenizer.padding_side = "right"
    right = processor(text=texts, images=images, return_tensors="pt")
    assert right["input_ids"][2, : len(alone[2]["input_ids"][0])].tolist() == alone[2]["input_ids"][0]


def test_documents_for_training_end_with_the_end_of_text(processor: KosmosProcessor, ours: KosmosTokenizer) -> None:
    inputs = processor(text="a cat", images=picture(), add_eos_token=True)
    assert inputs["input_ids"][0][-1] == ours.eos_id
    assert len(inputs["image_embeds_position_mask"][0]) == len(inputs["input_ids"][0])


def test_newlines_come_back(processor: KosmosProcessor) -> None:
    ids = processor(text="two\nlines", images=picture())["input_ids"]
    assert processor.batch_decode(ids) == ["two\nlines"]
    assert processor.batch_decode(ids, skip_special_tokens=False)[0].startswith("<s><image><pad>")


@pytest.mark.parametrize(
    "width, height, mode",
    [(50, 40, "RGB"), (40, 97, "RGB"), (SIDE, SIDE, "RGB"), (8, 8, "L"), (301, 200, "RGBA"), (33, 64, "P")],
)
def test_pixels_are_those_of_training(processor: KosmosProcessor, width: int, height: int, mode: str) -> None:
    image = picture(width, height, mode=mode)
    pixels = processor(text="", images=image, return_tensors="pt")["pixel_values"][0]
    difference = (pixels - load_image(image, SIDE)).abs()
    step = 1 / 255 / 0.26  # one level of eight bits, normalized
    assert difference.mean() < 0.02 * step
    assert difference.max() < 1.5 * step


@pytest.mark.parametrize(
    "text, num_images, message",
    [
        ("one <image>", 2, r"1 <image> for 2 image\(s\)"),
        ("<image> and <image>", 1, r"2 <image> for 1 image\(s\)"),
        ("<image>", 0, r"1 <image> for 0 image\(s\)"),
    ],
)
def test_places_and_images_must_match(processor: KosmosProcessor, text: str, num_images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[picture()] * num_images)


def test_prompts_and_images_must_match(processor: KosmosProcessor) -> None:
    with pytest.raises(ValueError, match=r"one entry .* for each of the 2 prompts, not 3 entries"):
        processor(text=["a", "b"], images=[picture()] * 3)
    with pytest.raises(ValueError, match="for each of the 2 prompts, not Image"):
        processor(text=["a", "b"], images=picture())
    with pytest.raises(ValueError, match="text is needed"):
        processor(images=picture())


def test_saving_and_loading_keeps_everything(processor: KosmosProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    image_processor = KosmosImageProcessor.from_pretrained(tmp_path)
    assert image_processor.to_dict() == processor.image_processor.to_dict()
    assert exported_tokenizer(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
