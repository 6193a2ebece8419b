"""One picture, however it is given, as RGB pixels. Nothing here knows a model."""

import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np

from loaders.errors import PromptError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")    # Pillow's names
MAX_PIXELS = 89_478_485         # what Pillow's own limit is by default: a quarter GiB of 24-bit pixels
KINDS = "a path, the bytes of a file, a PIL image, or an array [height, width] or [height, width, 1, 3 or 4] of uint8"
LARGEST_16_BIT = 65535


def read_image(source):
    """[height, width, 3] uint8 RGB of one picture; the array may be the caller's own.

    source   KINDS. Files: FORMATS; of several frames the first, turned as EXIF says. Transparency shows white,
             16-bit grey is scaled to 8 bits.
    Raises PromptError for what is no picture, is damaged, is empty, or has more than MAX_PIXELS.
    Source of the white: gemma4.md 5.1, HF image_transforms.convert_to_rgb.
    """
    check_source(source)
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    if is_pillow(source):
        return _decoded(source, f"a PIL image of mode {source.mode}")
    with open_file(source, "picture") as (file, name):
        return _file_to_rgb(file, name)


def check_source(source):
    """Raises PromptError where `source` is none of KINDS by its type, or is a URL."""
    if not (isinstance(source, (str, Path, bytes, bytearray, memoryview, np.ndarray)) or is_pillow(source)):
        raise PromptError(f"a picture of type {type(source).__name__}, expected {KINDS}")
    refuse_url(source, "picture")


def refuse_url(source, what):
    """Raises PromptError where `source` is a str that names something to fetch."""
    if isinstance(source, str) and ("://" in source[:16] or source[:5].lower() == "data:"):
        raise PromptError(f"a {what} is the URL {short(source)}, which is not fetched; pass a path or bytes")


def is_pillow(source):
    """Whether `source` is a PIL image. Where Pillow is not imported there can be none."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(source, pillow.Image)


@contextmanager
def open_file(source, what):
    """Yields (file, name): a path or bytes, open for reading, and what messages call it. Raises PromptError."""
    if not isinstance(source, (str, Path)):
        yield BytesIO(source), f"a {what} of {memoryview(source).nbytes} bytes"
        return
    name = f"{what} {short(str(source))}"
    try:
        if not Path(source).is_file():
            raise FileNotFoundError(0, "no such file")
        file = open(source, "rb")       # noqa: SIM115  closed below: only the opening is within the try
    except (OSError, ValueError) as error:          # a ValueError: a null byte in the path
        raise PromptError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with file:
        yield file, name


def check_size(height, width, name):
    """Raises PromptError where a picture has no pixel, or more than MAX_PIXELS."""
    if not height or not width:
        raise PromptError(f"{name}: {width} x {height} pixels, expected at least one")
    if height * width > MAX_PIXELS:
        raise PromptError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS} in all are read; make it smaller")


def short(text):
    """`text` in quotes, on one line, and not longer than a message bears."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _array_to_rgb(array):
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        hint = ""
        if array.dtype.kind == "f":
            hint = "; scale it to 0 ... 255 and round it first"
        elif len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = "; channels come last"
        raise PromptError(f"a picture is an array {list(shape)} {array.dtype}, expected [height, width] or "
                          f"[height, width, 1, 3 or 4] uint8{hint}")
    check_size(shape[0], shape[1], f"a picture, array {list(shape)}")
    if shape[2:] == (3,):
        return array
    if shape[2:] == (4,):
        from PIL import Image
        return _on_white(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
    return np.repeat(array.reshape(*shape[:2], 1), 3, axis=2)


def _file_to_rgb(file, name):
    from PIL import Image
    Image.init()
    if not file.read(1):
        raise PromptError(f"{name}: empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise PromptError(f"{name}: more than {MAX_PIXELS} pixels: {_line(error)}") from error
    except Exception as error:      # decoders raise errors of every kind, struct.error and IndexError among them
        raise PromptError(f"{name}: no picture that can be read, expected one of {', '.join(FORMATS)}") from error
    with image:
        return _decoded(image, name)


def _decoded(image, name):
    from PIL import ImageOps
    check_size(image.height, image.width, name)         # from the header: nothing is decoded yet
    try:
        return _to_rgb(ImageOps.exif_transpose(image), name)        # a copy, decoded
    except PromptError:
        raise
    except Exception as error:      # as above
        raise PromptError(f"{name}: damaged, or cut short: {_line(error)}") from error


def _to_rgb(image, name):
    """[height, width, 3] uint8 of a decoded PIL image, of any mode but F."""
    if image.mode == "F":
        raise PromptError(f"{name}: pixels are floats, whose range a file does not say; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey_16_to_rgb(np.asarray(image), image.info.get("transparency"), name)
    if image.mode == "La":
        image = image.convert("LA")             # the one mode with alpha that does not convert at once
    if image.info.get("transparency") is not None or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        return _on_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _on_white(image):
    from PIL import Image
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB"))


def _grey_16_to_rgb(grey, transparent, name):
    """0 ... 65535 to 0 ... 255, rounded to nearest; the level that a PNG calls transparent is white."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > LARGEST_16_BIT:
        raise PromptError(f"{name}: grey levels {low} ... {high}, expected 0 ... {LARGEST_16_BIT}")
    wide = grey.astype(np.int32)
    levels = ((wide + 128) // 257).astype(np.uint8)
    if transparent is not None:
        levels[wide == transparent] = 255
    return np.repeat(levels[:, :, None], 3, axis=2)


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
