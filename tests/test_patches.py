"""engine/vision/patches.py: pixels cut into patches, as the towers want them."""

import ml_dtypes
import numpy as np
import pytest

from engine.models.vision_spec import Gemma4TowerSpec, SiglipSpec
from engine.vision.encoder import KINDS
from engine.vision.patches import LEVELS, cut, patches, positions, windows
from tests.golden import Golden
from tests.pictures import PICTURES, golden_pictures, spec_of

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_patches_pixel_by_pixel():
    """Rows of patches, x fastest; in a patch the channel is fastest, or the slowest for SigLIP."""
    pixels = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    got, channels_first, at = patches(pixels, 3), patches(pixels, 3, channels_first=True), positions(2, 3)
    assert at.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert got.shape == channels_first.shape == (6, 27) and got.dtype == np.float32
    for n, (x, y) in enumerate(at):
        for dy, dx, c in np.ndindex(3, 3, 3):
            expected = np.float32(pixels[3 * y + dy, 3 * x + dx, c]) / np.float32(255)
            assert got[n, (dy * 3 + dx) * 3 + c] == channels_first[n, c * 9 + dy * 3 + dx] == expected


@pytest.mark.parametrize("side", [1, 2, 3])
def test_windows(side):
    """floor(x / k) + columns / k * floor(y / k) is the soft token of patch (x, y)."""
    n_rows, n_columns = 2 * side, 5 * side
    groups, at = windows(n_rows, n_columns, side), positions(n_rows, n_columns)
    assert sorted(groups.ravel()) == list(range(n_rows * n_columns))
    for b, group in enumerate(groups):
        assert {(x // side + 5 * (y // side)) for x, y in at[group]} == {b}


@pytest.mark.parametrize(("case", "kind"), PICTURES)
def test_patches_are_the_goldens(case, kind):
    """Bit for bit, what the tower maps to -1..1 among it: one division and one map of a byte, in float32."""
    golden, tower = Golden(case), spec_of(case).media.tower
    n_tokens = golden[kind + ".num_soft_tokens"]
    if kind == "videos":                                    # of a frame
        n_tokens = np.repeat(n_tokens, golden["videos.num_frames"])
    for i, picture in enumerate(golden_pictures(case, kind)):
        expected = golden[kind + ".pixel_values"][i]
        assert picture.n_tokens == n_tokens[i]
        if case == "gemma3-vision":
            side = tower.patch
            expected = expected.reshape(3, tower.grid, side, tower.grid, side).transpose(1, 3, 0, 2, 4)
            got = KINDS[SiglipSpec].levels[cut(picture.pixels, side, channels_first=True)]
            np.testing.assert_array_equal(got, expected.reshape(got.shape))
            continue
        got = patches(picture.pixels, tower.patch_side)
        np.testing.assert_array_equal(got, expected[:len(got)])
        at = positions(*(n // tower.patch_side for n in picture.pixels.shape[:2]))
        np.testing.assert_array_equal(at, golden[kind + ".position_ids"][i][:len(at)])
        assert not expected[len(got):].any()


def test_the_map_to_minus_one_is_of_float32():
    """In bfloat16 half of the 256 levels would come out differently."""
    levels = KINDS[Gemma4TowerSpec].levels
    np.testing.assert_array_equal(levels, 2 * (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)))
    late = (BF16.type(2) * (LEVELS.astype(BF16) - BF16.type(0.5))).astype(np.float32)
    assert np.sum(levels.astype(BF16).astype(np.float32) != late) == 128
