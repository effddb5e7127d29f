"""What `kosmos inspect data` shows is what the model gets, and its page is whole, safe HTML."""

import base64
import io
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from lxml import html
from PIL import Image
from typer.testing import CliRunner

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.cli import inspect
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.transform import load_image, normalize
from megatron_kosmos.data.inspection import Inspection, RowView, as_seen
from megatron_kosmos.data.inspection_page import Extent, clean, count_by_doubling, render_page
from megatron_kosmos.data.loading.collate import ImageFormat
from megatron_kosmos.data.loading.loader import BatchGeometry, StepLoader
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SOURCE_KINDS, SourceKind

IMAGES = ImageFormat(num_latents=4, size=8)
ROWS_A_STEP = 6
SCRIPT = "<script>alert('x')</script> & co"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """A blend of the three kinds; texts are longer than a row now and then."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer\non the wall " * (number % 9 + 1)} for number in range(20)],
        "caption": [{"image": f"{number}.png", "caption": f"{SCRIPT} {number}"} for number in range(10)],
        "interleaved": [
            {"parts": [{"text": "see"}, {"image": f"{number}.png"}, {"text": "and"}, {"image": f"{number + 1}.png"}]}
            for number in range(9)
        ],
    }
    return DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=prepare_blend(lines, 10), num_workers=0)


def expand(row: RowView, tokenizer: KosmosTokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids and the targets that a view of a row stands for."""
    numbers = {tokenizer.piece(number): number for number in range(tokenizer.vocab_size)}
    assert len(numbers) == tokenizer.vocab_size
    ids: list[int] = []
    targets: list[bool] = []
    for document in row.documents:
        assert document.first_column == len(ids)
        for token in document.tokens:
            columns = [tokenizer.pad_id] * 4 if token.image is not None else [numbers[token.text]]
            ids += columns
            targets += [token.is_target] * len(columns)
    return ids + [tokenizer.pad_id] * row.num_padding, targets + [False] * row.num_padding


@pytest.mark.parametrize("changes", [{}, {"packing": "best_fit"}, {"skip_steps": ((2, 3),), "document_mask": True}])
def test_rows_are_those_of_the_loader(data: DataConfig, changes: dict[str, Any], tokenizer: KosmosTokenizer) -> None:
    data = data.model_copy(update=changes)
    loader = StepLoader(data, IMAGES, BatchGeometry(1, ROWS_A_STEP), seed=3)
    batches: list[MultimodalBatch] = [batch for step in loader.steps(1, 4) for batch in step]
    inspection = Inspection(data, IMAGES, ROWS_A_STEP, seed=3)
    rows = list(inspection.rows(2, 3))
    assert len(rows) == len(batches) == 3 * ROWS_A_STEP
    for row, batch in zip(rows, batches, strict=True):
        ids, targets = expand(row, tokenizer)
        assert ids == batch.input_ids[0].tolist()
        # A label is the next column's token.
        assert [*targets[1:], row.next_token is not None] == batch.loss_mask[0].tolist()
        assert row.num_targets == batch.num_target_tokens
        if row.next_token is not None:
            assert row.next_token.text == tokenizer.piece(int(batch.labels[0, -1]))
        assert row.corpus.kind == SOURCE_KINDS[int(batch.sources[0])]
        images = [token.image for document in row.documents for token in document.tokens if token.image is not None]
        seen = [inspection.picture(row.corpus, image).pixels for image in images]
        assert len(seen) == len(batch.images)
        for pixels, image in zip(seen, batch.images, strict=True):
            assert pixels is not None
            torch.testing.assert_close(normalize(np.asarray(pixels)), image, atol=0.01, rtol=0)
    assert any(row.next_token for row in rows)
    assert {row.corpus.kind for row in rows} == set(SOURCE_KINDS)


def test_a_picture_is_shown_as_the_model_sees_it(picture: Callable[..., bytes]) -> None:
    data = picture(1, width=40, height=20)
    shown = as_seen(data, 8)
    assert shown.size == (8, 8)
    torch.testing.assert_close(normalize(np.asarray(shown)), load_image(data, 8), atol=0.01, rtol=0)


def test_shares_and_lengths(data: DataConfig) -> None:
    weights = (2.0, 1.0, 1.0)
    corpora = tuple(
        corpus.model_copy(update={"weight": weight}) for corpus, weight in zip(data.train, weights, strict=True)
    )
    views = Inspection(data.model_copy(update={"train": corpora}), IMAGES, ROWS_A_STEP, seed=3).corpora(50)
    assert [view.weight_share for view in views] == [0.5, 0.25, 0.25]
    assert [view.sample_share for view in views] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert [(view.num_documents, view.num_images) for view in views] == [(20, 0), (10, 10), (9, 18)]
    for view in views:
        expected = view.corpus.lengths + 4 * view.corpus.num_images
        assert view.lengths.tolist() == expected.tolist()


def test_the_page_has_the_pictures_and_escapes_captions(data: DataConfig) -> None:
    inspection = Inspection(data, IMAGES, ROWS_A_STEP, seed=3)
    text = render_page(inspection, "Data of <b>", Extent(num_pictures=7, num_rows=6, num_documents=2))
    page = html.document_fromstring(text)
    assert page.find("head/title").text == "Data of <b>"
    assert not page.xpath("//script | //b | //link | //@onload")
    figures = page.xpath("//figure")
    assert len(figures) == 7
    pictures = islice(inspection.pictures(1, 100), 7)
    for figure, picture in zip(figures, pictures, strict=True):
        (source,) = figure.xpath("img/@src")
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert picture.pixels is not None
        assert np.array_equal(np.array(image), np.array(picture.pixels))
        assert picture.after in figure.text_content()
    assert SCRIPT in page.text_content()
    assert len(page.xpath("//svg")) == 3
    assert len(page.xpath("//div[@class='row']")) == 6
    assert page.xpath("//div[@class='row']//img")
    assert all(source.startswith("data:") for source in page.xpath("//@src"))


def test_a_picture_that_does_not_decode_is_told(data: DataConfig) -> None:
    (shard,) = data.train[1].prefix.parent.glob("caption-images-*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"\x89PNG", b"\x00PNG"))
    captions = data.model_copy(update={"train": data.train[1:2]})
    text = render_page(Inspection(captions, IMAGES, ROWS_A_STEP, seed=3), "Data", Extent(num_pictures=2))
    problems = html.document_fromstring(text).xpath("//p[@class='problem']")
    assert len(problems) == 2
    assert "no picture in these" in problems[0].text


def test_characters_that_html_cannot_have() -> None:
    assert clean("a\x00b\x1bc\ud800d\ufffe\té\U0001f600") == "a\ufffdb\ufffdc\ufffdd\ufffd\té\U0001f600"


def test_documents_are_counted_by_doubling_lengths() -> None:
    counts, first = count_by_doubling(np.array([4, 5, 7, 8, 31, 32]))
    assert (first, counts.tolist()) == (2, [3, 1, 1, 1])


def test_corpora_that_have_ended(data: DataConfig) -> None:
    once = tuple(corpus.model_copy(update={"epochs": 1}) for corpus in data.train)
    inspection = Inspection(data.model_copy(update={"train": once}), IMAGES, ROWS_A_STEP, seed=3)
    num_rows = len(list(inspection.rows(1, 1000)))
    assert 0 < num_rows < 6000
    with pytest.raises(DataError, match="ended before step 1001"):
        next(inspection.rows(1001))


def run(arguments: Sequence[object]) -> tuple[str, str]:
    """Return what the command prints, and what it ends with."""
    app = typer.Typer()
    inspect.register(app)
    app.command("other")(lambda: None)  # else typer makes the group the application
    result = CliRunner().invoke(app, ["inspect", "data", *map(str, arguments)], env={"COLUMNS": "400"})
    return result.output, str(result.exception or "")


def test_the_command_shows_a_run(data: DataConfig, tmp_path: Path) -> None:
    corpora = [{"kind": corpus.kind, "prefix": str(corpus.prefix)} for corpus in data.train]
    blend = {"tokenizer": str(data.tokenizer), "sequence_length": 64, "train": corpora}
    changes = tmp_path / "blend.yaml"
    changes.write_text(yaml.safe_dump({"model": {"resampler": {"num_latents": 4}}, "data": blend}))
    config = ["--config", ROOT / "configs" / "kosmos_tiny.yaml", "--config", changes]
    output, problem = run([*config, "--step", 2, "--rows", 16, "--page", tmp_path / "page.html", "training.seed=3"])
    assert problem == ""
    assert output.count("tokens count in the loss") == 16
    assert "·<s> ·<image> ·[image 4] ·</image> ▁" in output
    assert "sample 16 of " in output
    assert "sample 15 of " not in output
    assert f"the page is {tmp_path / 'page.html'}" in output
    assert html.document_fromstring((tmp_path / "page.html").read_text(encoding="utf-8")).xpath("//figure")
    _, problem = run([*config, "training.stepz=3"])
    assert "training.stepz: Extra inputs" in problem


def test_the_command_shows_a_corpus(data: DataConfig, tmp_path: Path) -> None:
    prefix = data.train[2].prefix
    output, problem = run(["--corpus", prefix, "--tokenizer", data.tokenizer, "--rows", 2, "--documents", 1])
    assert problem == ""
    assert output.count("tokens count in the loss") == 2
    assert "[image 4]" in output
    assert "more documents" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --config FILE and settings, or --corpus PREFIX and --tokenizer FOLDER"),
        (["--corpus", "x"], "give either"),
        (["--config", "x.yaml", "--corpus", "x", "--tokenizer", "y"], "give either"),
        (["--corpus", "x", "--tokenizer", "y", "a.b=c"], "give either"),
        (["--config", "nowhere.yaml"], "no configuration at nowhere.yaml"),
        (["--corpus", "nowhere", "--tokenizer", "y"], "no prepared corpus at nowhere"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    _, problem = run(arguments)
    assert problem.startswith("kosmos inspect data: ")
    assert message in problem


@pytest.mark.parametrize("arguments", [["--step", "0"], ["--documents", "0"], ["--rows", "-1"]])
def test_numbers_out_of_range_are_refused(arguments: list[str]) -> None:
    output, problem = run(arguments)
    assert problem == "2"
    assert f"Invalid value for '{arguments[0]}'" in output


def test_another_tokenizer_is_refused(data: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(["some other text"] * 3, TrainingSettings(273)).save(tmp_path / "other")
    _, problem = run(["--corpus", data.train[0].prefix, "--tokenizer", tmp_path / "other"])
    assert problem.startswith("kosmos inspect data: ")
    assert "was prepared with another tokenizer" in problem


def test_pieces_of_a_byte_level_tokenizer_mark_spaces() -> None:
    tokenizer = train_tokenizer(["the cat and the dog"] * 9, TrainingSettings(270, model_type="byte-bpe"))
    pieces = [tokenizer.piece(number) for number in tokenizer.encode(" the")]
    assert "".join(pieces) == "Ġthe"
    assert tokenizer.piece(tokenizer.image_id) == "<image>"
    with pytest.raises(DataError, match="id 270 is outside the vocabulary"):
        tokenizer.piece(270)
