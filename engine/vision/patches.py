"""Pixels of a picture cut into patches, row by row, and where each patch stands; on the host."""

import numpy as np

LEVELS = np.arange(256, dtype=np.float32) / np.float32(255)     # what a byte of a picture is worth, 0..1


def cut(pixels, side, channels_first=False):
    """uint8 [n_patches, 3 * side²]: the patches of pixels [height, width, 3], whose sides are multiples of `side`.

    A patch is (row, column, channel), or (channel, row, column) with channels_first; patches go row by row.
    """
    n_rows, n_columns = grid(pixels, side)
    order = (0, 2, 4, 1, 3) if channels_first else (0, 2, 1, 3, 4)
    return pixels.reshape(n_rows, side, n_columns, side, 3).transpose(order).reshape(n_rows * n_columns, -1)


def patches(pixels, side, channels_first=False):
    """float32 [n_patches, 3 * side²]: the same patches with values of 0..1."""
    return LEVELS[cut(pixels, side, channels_first)]


def grid(pixels, side):
    """(rows, columns) of patches."""
    return pixels.shape[0] // side, pixels.shape[1] // side


def positions(n_rows, n_columns):
    """int32 [n_rows * n_columns, 2]: (x, y) = (column, row) of each patch, x fastest."""
    y, x = np.indices((n_rows, n_columns), np.int32)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def windows(n_rows, n_columns, side):
    """int32 [n_soft, side²]: the patches of each square of side * side patches, squares row by row."""
    numbers = np.arange(n_rows * n_columns, dtype=np.int32).reshape(n_rows // side, side, n_columns // side, side)
    return numbers.transpose(0, 2, 1, 3).reshape(-1, side * side)
