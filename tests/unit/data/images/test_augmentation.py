"""Views are legal, spread as asked, and depend on nothing but the seed and the picture's place in the run."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from megatron_kosmos.config import AugmentationConfig, CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.corpus import data_fingerprint
from megatron_kosmos.data.images.augmentation import Augmenter, View
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, StepLoader, heldout_batches
from tests.unit.data.images.odd_pictures import encoded

IMAGES = ImageFormat(num_latents=4, size=8)
STRONG = AugmentationConfig(scale=(0.2, 0.8), aspect_ratio=(0.5, 2.0), flip_probability=0.3)


def views(settings: AugmentationConfig, width: int, height: int, count: int = 4000, seed: int = 1) -> list[View]:
    return [Augmenter(settings, seed).draw_view(number // 3, number % 3, width, height) for number in range(count)]


@pytest.mark.parametrize("width, height", [(300, 300), (640, 480), (97, 331), (1, 1), (2, 150)])
@pytest.mark.parametrize("settings", [AugmentationConfig(), STRONG])
def test_views_lie_within_the_picture(settings: AugmentationConfig, width: int, height: int) -> None:
    for view in views(settings, width, height, 500):
        assert 0 <= view.left < view.left + view.width <= width
        assert 0 <= view.top < view.top + view.height <= height


def test_views_are_spread_as_asked() -> None:
    """Area and the logarithm of the ratio are uniform in their ranges, places are uniform in what is left."""
    drawn = views(STRONG, 4000, 4000)
    areas = np.array([view.width * view.height for view in drawn]) / 4000**2
    ratios = np.log2([view.width / view.height for view in drawn])
    small = (areas < 0.4) & (areas > 0.2)  # these fit at any ratio, so none was drawn again
    assert areas.min() > 0.2 - 1e-3
    assert areas.max() < 0.8 + 1e-3
    assert np.abs(ratios).max() < 1 + 1e-3
    assert np.quantile(areas[small], [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.3, 0.35], abs=0.01)
    assert np.quantile(ratios[small], [0.25, 0.5, 0.75]) == pytest.approx([-0.5, 0, 0.5], abs=0.08)
    lefts = np.array([view.left / (4000 - view.width) for view in drawn if view.width < 4000])
    tops = np.array([view.top / (4000 - view.height) for view in drawn if view.height < 4000])
    for places in (lefts, tops):
        assert np.quantile(places, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)
    assert abs(np.corrcoef(lefts[:3000], tops[:3000])[0, 1]) < 0.06
    assert np.mean([view.is_flipped for view in drawn]) == pytest.approx(0.3, abs=0.03)


def test_a_picture_that_no_rectangle_fits_shows_its_middle() -> None:
    """Ten draws of at least 90% of the area of a strip are all too wide or too high."""
    assert {(view.left, view.top, view.width, view.height) for view in views(AugmentationConfig(), 1000, 10, 20)} == {
        (493, 0, 13, 10)
    }
    assert {(view.left, view.top, view.width, view.height) for view in views(AugmentationConfig(), 10, 1000, 20)} == {
        (0, 493, 10, 13)
    }


def test_places_in_the_run_and_seeds_draw_apart() -> None:
    drawn = [
        Augmenter(STRONG, seed).draw_view(sample, picture, 999, 999)
        for seed, sample, picture in itertools.product((0, 1, 2**63), (0, 1, 2**40), (0, 1, 2))
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("file_format, side", [("PNG", 40), ("JPEG", 40), ("JPEG", 200)])
def test_a_view_is_what_it_says(file_format: str, side: int) -> None:
    """A quarter of a picture of four colours, left and right exchanged; also where the JPEG is decoded small."""
    red, blue = (200, 0, 0), (0, 0, 200)
    image = Image.new("RGB", (side, side))
    image.paste(red, (side // 2, 0, side * 3 // 4, side // 2))
    image.paste(blue, (side * 3 // 4, 0, side, side // 2))
    view = View(side // 2, 0, side // 2, side // 2, is_flipped=True)
    pixels = load_image(encoded(image, file_format), 8, lambda width, height: view)
    expected = torch.stack([load_image(Image.new("RGB", (8, 8), colour), 8)[:, :, 0] for colour in (blue, red)], dim=2)
    torch.testing.assert_close(pixels[:, :, [0, 7]], expected, rtol=0, atol=0.4)  # JPEG smears the colours


@pytest.mark.parametrize("width, height", [(129, 3000), (3000, 129), (257, 1030)])
def test_a_view_at_the_edge_of_a_shrunk_picture_shows_nothing_beyond(width: int, height: int) -> None:
    """A JPEG in an eighth of its size is rounded up, a narrow side by more of itself than a long one."""
    white = encoded(Image.new("RGB", (width, height), (255, 255, 255)), "JPEG")
    side = min(width, height)
    view = View(width - side, height - side, side, side)
    assert torch.equal(load_image(white, 8, lambda *size: view), load_image(white, 8))


def test_the_whole_square_is_what_comes_without(picture: Callable[..., bytes]) -> None:
    data = picture(width=31, height=31)
    assert torch.equal(load_image(data, 8, lambda width, height: View(0, 0, 31, 31)), load_image(data, 8))


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """Documents of several pictures, so that a row has some."""
    parts = [[{"text": "see"}, *({"image": f"{number + k}.png"} for k in range(3))] for number in range(20)]
    corpora = prepare_blend({"interleaved": [{"parts": each} for each in parts]}, 23)
    return DataConfig(
        tokenizer=tokenizer_folder,
        sequence_length=64,
        train=corpora,
        heldout=corpora,
        num_workers=0,
        augmentation=STRONG,
    )


def images_of(data: DataConfig, geometry: BatchGeometry, start: int, stop: int, seed: int = 5) -> list[list[Tensor]]:
    steps = StepLoader(data, IMAGES, geometry, seed).steps(start, stop)
    return [[batch.images for batch in step] for step in steps]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_views_are_the_same_under_any_geometry(data: DataConfig) -> None:
    whole = BatchGeometry(micro_batch_size=4, global_batch_size=4)
    expected = [torch.cat(step) for step in images_of(data, whole, 0, 6)]
    assert len({bytes(image.numpy().tobytes()) for step in expected for image in step}) > 40, "each view is another"
    for num_workers in (1, 3):
        resumed = images_of(data.model_copy(update={"num_workers": num_workers}), whole, 4, 6)
        assert all(torch.equal(torch.cat(step), one) for step, one in zip(resumed, expected[4:], strict=True))
    for dp_size in (2, 4):
        geometries = [BatchGeometry(1, 4, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        ranks = [images_of(data, geometry, 0, 6) for geometry in geometries]
        for number, one in enumerate(expected):
            rows = [microbatch for row in zip(*(rank[number] for rank in ranks), strict=True) for microbatch in row]
            assert torch.equal(torch.cat(rows), one)


def test_off_and_heldout_show_the_middle(data: DataConfig, picture: Callable[..., bytes]) -> None:
    pictures = {load_image(picture(seed), 8).numpy().tobytes() for seed in range(23)}
    geometry = BatchGeometry(micro_batch_size=1, global_batch_size=4)
    off = data.model_copy(update={"augmentation": None})
    shown = [batch for step in images_of(off, geometry, 0, 3) for batch in step]
    shown += [batch.images for step in heldout_batches(data, data.heldout[0], IMAGES, geometry, 8) for batch in step]
    assert {image.numpy().tobytes() for batch in shown for image in batch} <= pictures
    on = [batch for step in images_of(data, geometry, 0, 3) for batch in step]
    assert not {image.numpy().tobytes() for batch in on for image in batch} & pictures


def test_the_fingerprint_tells_augmentations_apart(data: DataConfig) -> None:
    settings = [None, STRONG, AugmentationConfig(), AugmentationConfig(flip_probability=0.5)]
    configs = [data.model_copy(update={"augmentation": each}) for each in settings]
    assert len({data_fingerprint(config) for config in configs}) == 4


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scale": (0.9, 0.5)}, r"scale=\[0\.9, 0\.5\] must be \[least, most\]"),
        ({"scale": (0.5, 1.5)}, r"scale=\[0\.5, 1\.5\] is more than the picture; 1\.0 is the most"),
        ({"scale": (0.0, 1.0)}, "greater than 0"),
        ({"aspect_ratio": (2.0, 1.0)}, r"aspect_ratio=\[2\.0, 1\.0\] must be"),
        ({"flip_probability": 1.5}, "less than or equal to 1"),
        ({"horizontal_flip": True}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentationConfig.model_validate(values)
