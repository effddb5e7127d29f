"""Random crops and flips of pictures in training, a pure function of the seed and the picture's place in the run."""

import math
from dataclasses import dataclass

from megatron_kosmos.config.data import AugmentationConfig
from megatron_kosmos.data.hashing import uniforms

ATTEMPTS = 10
STREAM = 0x766965777330
"""Tells these random numbers from those of the order of training."""


@dataclass(frozen=True)
class View:
    """A rectangle of a picture, in its pixels, perhaps mirrored."""

    left: int
    top: int
    width: int
    height: int
    is_flipped: bool = False

    def box(self, across: float, down: float) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom in the picture after it was resized by these factors."""
        left, right = (round(side * across) for side in (self.left, self.left + self.width))
        top, bottom = (round(side * down) for side in (self.top, self.top + self.height))
        return left, top, right, bottom


@dataclass(frozen=True)
class Augmenter:
    """Draws the views of a run."""

    settings: AugmentationConfig
    seed: int

    def draw_view(self, sample: int, picture: int, width: int, height: int) -> View:
        """Return the part of a picture of `width` x `height` to show.

        `sample` is the global index of its row and `picture` its number in the row: the view is the same under any
        number of ranks and worker processes, and another one in each epoch.

        The rectangle is the one of torchvision's RandomResizedCrop, which OpenCLIP trains with: area and the logarithm
        of the aspect ratio are uniform, the place as well; if none of ten such rectangles fits, it is the largest
        central one of a legal aspect ratio.
        """
        random = uniforms(self.seed, STREAM, sample, picture)
        is_flipped = next(random) < self.settings.flip_probability
        (least, most), ratios = self.settings.scale, self.settings.aspect_ratio
        for _ in range(ATTEMPTS):
            area = width * height * (least + (most - least) * next(random))
            low, high = (math.log(ratio) for ratio in ratios)
            ratio = math.exp(low + (high - low) * next(random))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            x, y = next(random), next(random)
            if 0 < across <= width and 0 < down <= height:
                left, top = int(x * (width - across + 1)), int(y * (height - down + 1))
                return View(left, top, across, down, is_flipped)
        across = min(width, max(1, round(height * ratios[1])))
        down = min(height, max(1, round(width / ratios[0])))
        return View((width - across) // 2, (height - down) // 2, across, down, is_flipped)
