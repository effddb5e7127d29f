"""metrics.jsonl is strict JSON with every step once, also after a resume, and TensorBoard shows the same numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_kosmos.observability.captions import CARD_WIDTH, render_card, to_picture
from megatron_kosmos.observability.metrics import MetricsWriter, tensorboard_tag
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD


def read_strictly(path: Path) -> list[dict[str, object]]:
    """Parse as a standard-conforming reader does: NaN and Infinity are errors."""

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def read_tensorboard(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """[S, S, 3] uint8 to [3, S, S], as the data layer normalizes."""
    scaled = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return (scaled - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, "tokens": 2048, "mfu": None})
        assert read_strictly(writer.path) == [{"step": 1, "loss": 2.5, "tokens": 2048, "mfu": None}]


def test_what_is_not_finite_becomes_null_and_is_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(7, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    expected = {"step": 7, "loss": None, "grad_norm": None, "lr": 0.1, "nonfinite": ["loss", "grad_norm"]}
    assert read_strictly(writer.path) == [expected]


@pytest.mark.parametrize("step", [4, 5])
def test_a_step_is_written_once_and_in_order(tmp_path: Path, step: int) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match=f"step {step} comes after step 5"):
            writer.write(step, {"loss": 1.0})


def test_a_resumed_series_is_continuous_in_both_places(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):  # goes on after the checkpoint of step 4, then dies
            writer.write(step, {"loss": float(step)})
    with writer.path.open("a") as file:
        file.write('{"step": 8, "lo')

    with MetricsWriter(tmp_path, first_step=5) as resumed:
        for step in range(5, 9):
            resumed.write(step, {"loss": 10.0 * step})

    expected = [1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, 80.0]
    lines = read_strictly(resumed.path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines] == expected
    points = read_tensorboard(tmp_path).Scalars("loss/total")
    assert [(point.step, point.value) for point in points] == list(zip(range(1, 9), expected, strict=True))


def test_resuming_counts_the_kept_steps_as_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    with MetricsWriter(tmp_path, first_step=3) as resumed, pytest.raises(ValueError, match="after step 2"):
        resumed.write(2, {"loss": 1.0})


def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1, "loss": 2.0}\nnot json\n{"step": 3, "loss": 1.0}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        MetricsWriter(tmp_path, first_step=3)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "name, tag",
    [
        ("loss", "loss/total"),
        ("loss_interleaved", "loss/interleaved"),
        ("heldout_loss_text", "heldout/loss_text"),
        ("seconds_forward_backward", "seconds/forward_backward"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("lr", "optimizer/lr"),
        ("share_forward_backward", "share/forward_backward"),
        ("memory_host_peak", "memory/host_peak"),
        ("skipped_documents", "other/skipped_documents"),
    ],
)
def test_tensorboard_groups_the_names(name: str, tag: str) -> None:
    assert tensorboard_tag(name) == tag


def test_pictures_are_shown_with_their_captions(tmp_path: Path) -> None:
    captions = ["a handwritten seven", ""]
    with MetricsWriter(tmp_path) as writer:
        writer.images_with_captions("captions", 3, torch.zeros(2, 3, 8, 8), captions)
    events = read_tensorboard(tmp_path)
    assert events.Tags()["images"] == ["captions/0", "captions/1"]
    assert [image.step for image in events.Images("captions/0")] == [3]
    (text,) = events.Tensors("captions/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "0. a handwritten seven\n1. "


def test_every_picture_needs_a_caption(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="2 images but 1 captions"):
        writer.images_with_captions("captions", 1, torch.zeros(2, 3, 8, 8), ["one"])


def test_a_picture_is_restored_from_its_normalized_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(to_picture(normalized(pixels))), pixels)


def test_a_card_holds_the_picture_above_the_whole_caption() -> None:
    picture = Image.new("RGB", (32, 32), (200, 10, 10))
    short, long = render_card(picture, "seven"), render_card(picture, "a long caption, said again and again " * 5)
    assert short.shape[1:] == long.shape[1:] == (CARD_WIDTH, 3)
    assert (short[:CARD_WIDTH] == (200, 10, 10)).all()
    for card in (short, long):
        ink = card[CARD_WIDTH:].max(axis=2) < 128
        assert ink.any()
        assert not ink[:, -2:].any(), "text runs out of the card's right side"
        assert not ink[-2:].any(), "text runs out of the card's bottom"
    assert long.shape[0] > short.shape[0]


def test_tensorboard_draws_what_belongs_together_into_one_picture(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"share_data": 0.25, "share_step": 0.75, "loss_text": 4.0})
    events = read_tensorboard(tmp_path)
    (layout,) = events.Tensors("custom_scalars__config__")
    patterns = re.findall(rb"\^[a-z_]+/[.*a-z_]+", layout.tensor_proto.string_val[0])
    drawn = {tag for tag in events.Tags()["scalars"] for pattern in patterns if re.match(pattern.decode(), tag)}
    assert drawn == {"share/data", "share/step", "loss/text"}
