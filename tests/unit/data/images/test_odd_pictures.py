"""Odd pictures look as a person sees them; bad ones are told, counted or shown blank, in little memory."""

import io
import json
import multiprocessing
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.errors import DataError, UnusableImage
from megatron_kosmos.data.images.decoding import decode_image
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, StepLoader
from megatron_kosmos.data.preparation.assembly import assemble
from megatron_kosmos.data.preparation.encoding import EncodedChunk, EncodedImage
from megatron_kosmos.data.preparation.parts_folder import PartsFolder
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from tests.unit.data.images.odd_pictures import RED, Colour, bad_pictures, encoded, good_pictures, plain

GOOD, BAD = good_pictures(), bad_pictures()
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("data, colour", GOOD.values(), ids=GOOD)
def test_colours_are_as_a_person_sees_them(data: bytes, colour: Colour) -> None:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.size == (20, 20)
    assert np.abs(np.asarray(image, int) - colour).max() <= 1


@pytest.mark.parametrize("name", [name for name in GOOD if not name.startswith("grey_16")])
def test_pixels_are_those_of_clip(name: str) -> None:
    """Grey of 16 bits is white there: Pillow's convert() clips it."""
    data, _ = GOOD[name]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(load_image(data, 8), expected, rtol=0, atol=1e-6)


def test_orientation_in_exif_is_ignored() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.new("RGB", (40, 20), RED)
    assert decode_image(encoded(image, "JPEG", exif=turned)).size == (40, 20)


def test_grey_of_16_bits_keeps_its_order() -> None:
    ramp = np.arange(400, dtype=np.uint16).reshape(20, 20) * 164
    pixels = np.asarray(decode_image(encoded(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(pixels[..., 0], ramp >> 8)


@pytest.mark.parametrize("data, reason, message", BAD.values(), ids=BAD)
def test_bad_pictures_say_why(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(UnusableImage, match=message) as caught:
        load_image(data, 8)
    assert caught.value.reason == reason


def test_bad_pictures_take_no_memory() -> None:
    """Decoded, the smallest of the large ones would take 89 MB; the text of one is 64 MiB."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    names = [name for name in BAD if name.startswith(("huge", "large", "text"))]
    worker = multiprocessing.get_context("fork").Process(target=refuse, args=(names, sending))
    worker.start()
    worker.join()
    assert receiving.poll(), "the process died"
    assert receiving.recv() < 32 << 10, "kB"


def refuse(names: list[str], sending: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        with pytest.raises(UnusableImage):
            decode_image(BAD[name][0])
    sending.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_preparation_counts_bad_pictures_by_reason_and_place(
    tmp_path: Path, tokenizer_folder: Path, write_lines: Callable[[str, Sequence[str]], Path], num_workers: int
) -> None:
    pictures = {name: data for name, (data, *_) in (GOOD | BAD).items()}
    for name, data in pictures.items():
        (tmp_path / f"{name}.gif").write_bytes(data)  # whatever it is
    source = write_lines("a.jsonl", [json.dumps({"image": f"{name}.gif", "caption": name}) for name in pictures])
    prefix = tmp_path / "out" / "a"
    prepare(Preparation("caption", (source,), prefix, tokenizer_folder, num_workers=num_workers))
    manifest = json.loads((tmp_path / "out" / "a.manifest.json").read_text())
    assert manifest["documents"] == len(GOOD)
    assert manifest["skipped"] == Counter(reason for _, reason, _ in BAD.values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "a.quarantine.jsonl").read_text().splitlines()]
    for line, number, name in zip(lines, range(len(GOOD) + 1, len(pictures) + 1), BAD, strict=True):
        assert line["origin"].endswith(f"a.jsonl:{number}")
        assert line["reason"] == BAD[name][1]
        assert f"{name}.gif" in line["detail"]
        assert BAD[name][2] in line["detail"]


@pytest.fixture
def damaged(tmp_path: Path, tokenizer_folder: Path, tokenizer: KosmosTokenizer) -> DataConfig:
    """Captions of which every other picture is bad, as if the shards were written by something else.

    Without the empty one: that is found when the corpus is opened.
    """
    pictures = [data for bad, _, _ in BAD.values() if bad for data in (bad, encoded(plain(), "PNG"))]
    ids = [tokenizer.bos_id, tokenizer.image_id, tokenizer.end_of_image_id, *tokenizer.encode("x"), tokenizer.eos_id]
    chunk = EncodedChunk(
        np.array(ids * len(pictures), dtype="<u2"),
        np.full(len(pictures), len(ids)),
        [[EncodedImage(data, "png", 1)] for data in pictures],
        np.zeros((len(pictures), 2), np.uint64),
    )
    prefix, source = tmp_path / "captions", tmp_path / "a.jsonl"
    source.write_text("{}\n")
    job, folder = Preparation("caption", (source,), prefix, tokenizer_folder).job(), PartsFolder(prefix)
    folder.create(job)
    with folder.writing(job, 0) as writer:
        writer.append(chunk)
    assemble(folder, job, 1)
    corpus = CorpusConfig(kind="caption", prefix=prefix, epochs=1)
    return DataConfig(tokenizer=tokenizer_folder, sequence_length=16, train=(corpus,), packing="best_fit")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_shows_bad_pictures_blank(damaged: DataConfig, num_workers: int) -> None:
    config = damaged.model_copy(update={"on_bad_document": "skip", "num_workers": num_workers})
    loader = StepLoader(config, ImageFormat(num_latents=4, size=8), BatchGeometry(1, 1), seed=0)
    batches = [batch for step in loader.steps(0, len(BAD) - 1) for batch in step]
    images = torch.cat([batch.images for batch in batches])
    assert loader.num_bad_images == int((images == 0).all(dim=(1, 2, 3)).sum()) > 0


def test_training_stops_at_a_bad_picture_and_says_where(damaged: DataConfig) -> None:
    loader = StepLoader(damaged, ImageFormat(num_latents=4, size=8), BatchGeometry(1, 1), seed=0)
    with pytest.raises(
        DataError, match=r"^\S*captions-images-00000\.tar at byte \d+ \(picture 0 of document \d+, .*: "
    ):
        list(loader.steps(0, len(BAD) - 1))
