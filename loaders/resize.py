"""How large a picture is made before it is cut into patches, and the making of it."""

from math import floor, sqrt

import numpy as np

from loaders.errors import PromptError

FILTERS = {2: "bilinear", 3: "bicubic"}         # Pillow's numbers, which is what a processor's `resample` holds


def fitted_size(height, width, n_tokens, side):
    """(height, width) in pixels: the aspect kept, multiples of `side`, at most `n_tokens` blocks of side * side pixels.

    A small picture grows too. A strip, of which one side would round down to nothing, is one block wide, and as many
    whole blocks long as it is longer than wide, n_tokens at most.
    Raises PromptError where nothing fits.
    Source: gemma4.md 5.1; HF image_processing_gemma4.get_aspect_ratio_preserving_size, of which this is the arithmetic
    in float64, operation by operation: another order rounds otherwise.
    """
    factor = sqrt(n_tokens * side**2 / (height * width))
    rows, columns = floor(factor * height / side), floor(factor * width / side)
    if rows == 0 and columns == 0:
        raise PromptError(f"a picture of {width} x {height} pixels does not fit {n_tokens} soft tokens of {side} x "
                          f"{side} pixels, expected more of them")
    if rows == 0:
        rows, columns = 1, min(width // height, n_tokens)
    elif columns == 0:
        rows, columns = min(height // width, n_tokens), 1
    return rows * side, columns * side


def resize(pixels, size, resample):
    """`pixels` [height, width, 3] uint8 made `size` (height, width), as Pillow filters: antialiased, rounded to uint8.

    resample   a key of FILTERS
    Returns a new array, read-only; at the size that it has already, a copy.
    """
    if pixels.shape[:2] == tuple(size):
        out = np.array(pixels, order="C")
    else:
        from PIL import Image
        image = Image.fromarray(np.ascontiguousarray(pixels), "RGB")
        out = np.array(image.resize((size[1], size[0]), Image.Resampling(resample)))
    out.flags.writeable = False
    return out
