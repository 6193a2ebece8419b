"""Pictures for tests of vision encoders: those of the goldens, and random ones."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.backend import open_lane
from engine.models.vision_spec import SiglipSpec
from tests.golden import Golden
from tests.test_weights import loaded

CASES = ("gemma4-vision", "gemma4-vision-bidir", "gemma4-video", "gemma3-vision", "gemma4-unified")
PICTURES = [*((case, "images") for case in CASES), ("gemma4-video", "videos")]


@dataclass
class Picture:
    """As engine/vision/picture.py has it, of whatever size."""

    pixels: np.ndarray
    n_tokens: int


def golden_pictures(case, kind):
    """The Pictures whose patches a golden holds, its tower's pixels as bytes."""
    golden, tower = Golden(case), spec_of(case).media.tower
    values = golden[kind + ".pixel_values"].astype(np.float64)
    if case == "gemma3-vision":                             # -1..1, channels first
        return [picture(np.rint((image + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 0), tower) for image in values]
    found, side = [], tower.patch_side
    for image, at in zip(values, golden[kind + ".position_ids"], strict=True):
        width, height = side * (at.max(axis=0) + 1)
        pixels = np.empty((height, width, 3), np.uint8)
        for patch, (x, y) in zip(image, at, strict=True):
            if x >= 0:
                pixels[y * side:(y + 1) * side, x * side:(x + 1) * side] = np.rint(patch * 255).reshape(side, side, 3)
        found.append(picture(pixels, tower))
    return found


def picture(pixels, tower):
    return Picture(pixels, pixels.shape[0] * pixels.shape[1] // tower.block_side**2)


def random_pictures(tower, shapes):
    """Of (rows, columns) of soft tokens."""
    rng = np.random.default_rng([tower.block_side, *np.ravel(shapes)])
    return [picture(rng.integers(256, size=(n * tower.block_side, m * tower.block_side, 3), dtype=np.uint8), tower)
            for n, m in shapes]


def some_pictures(tower):
    """Pictures of several sizes, the smallest of less than a page; SigLIP's are all of one."""
    if type(tower) is SiglipSpec:
        return random_pictures(tower, [(4, 4)] * 3)
    return random_pictures(tower, [(2, 3), (1, 1), (5, 2), (1, 4)])


@cache
def opened(case, device):
    """(ModelSpec, Weights, lane) of a golden."""
    lane = open_lane(device, "auto")
    return (*loaded(Golden(case).checkpoint, lane), lane)


def spec_of(case):
    return opened(case, "cpu")[0]
