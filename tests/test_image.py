"""loaders/image.py and loaders/resize.py: every way to pass a picture, and how large it is made."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from engine import Image as Source
from engine.errors import PromptError
from loaders import image as loader
from loaders.image import read_image
from loaders.resize import fitted_size, resize

BUDGETS = (70, 140, 280, 560, 1120)
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def file_of(image, kind="PNG", **options):
    """The bytes of a PIL image, or of an array, saved."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width, height):
    """A PNG that says how large it is and holds no pixel."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


# --- what a picture may be

def test_a_path_bytes_a_pil_image_and_an_array_are_the_same_picture(tmp_path):
    data = file_of(RGB)
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), memoryview(data),
                   Image.fromarray(RGB), Image.open(io.BytesIO(data)), RGB):
        np.testing.assert_array_equal(read_image(source), RGB)


def test_grey_arrays_have_three_equal_channels():
    grey = RGB[:, :, 0]
    for source in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(read_image(source), np.stack([grey] * 3, axis=2))


def test_a_strided_array_is_read_as_it_looks():
    np.testing.assert_array_equal(read_image(RGB[::2, ::-1]), RGB[::2, ::-1])
    rgba = np.dstack([RGB, np.full((5, 7), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(rgba[::-1]), RGB[::-1])


@pytest.mark.parametrize("array, names", [
    (np.zeros((4, 4, 3), np.float32), ("[4, 4, 3] float32", "scale it to 0 ... 255")),
    (np.zeros((3, 5, 5), np.uint8), ("[3, 5, 5] uint8", "channels come last")),
    (np.zeros((4, 4, 2), np.uint8), ("[4, 4, 2] uint8", "1, 3 or 4")),
    (np.zeros(4, np.uint8), ("[4] uint8",)),
    (np.zeros((1, 4, 4, 3), np.uint8), ("[1, 4, 4, 3] uint8",)),
    (np.zeros((4, 4), bool), ("[4, 4] bool",)),
    (np.zeros((0, 4, 3), np.uint8), ("4 x 0 pixels",)),
    (np.zeros((4, 0), np.uint8), ("0 x 4 pixels",)),
])
def test_an_array_of_another_shape_or_dtype_is_named(array, names):
    with pytest.raises(PromptError) as raised:
        read_image(array)
    assert all(name in str(raised.value) for name in names) and "\n" not in str(raised.value)


@pytest.mark.parametrize("source", [None, 3, [RGB], {"path": "a.png"}, io.BytesIO(b"")])
def test_what_is_no_picture_is_named_by_its_type(source):
    with pytest.raises(PromptError, match=f"a picture of type {type(source).__name__}, expected a path, "):
        read_image(source)
    with pytest.raises(PromptError, match=type(source).__name__):
        Source(source)


@pytest.mark.parametrize("source", ["http://a.b/c.png", "https://a.b/c.png", "HTTPS://a.b", "file:///c.png",
                                    "data:image/png;base64,iVBORw0KGgo", "Data:,x"])
def test_a_url_is_refused_by_name(source):
    with pytest.raises(PromptError, match=r"is the URL .* pass a path or bytes"):
        read_image(source)


# --- files and PIL images of every mode

def test_transparency_shows_white():
    rgba = np.dstack([RGB, np.tile(np.uint8([0, 255, 128, 0, 255, 1, 254]), (5, 1))])
    alpha = rgba[:, :, 3:] / 255
    exact = RGB * alpha + 255 * (1 - alpha)
    for source in (rgba, Image.fromarray(rgba), file_of(rgba), file_of(rgba, "TIFF"),
                   file_of(rgba, "WEBP", lossless=True, exact=True)):
        assert np.abs(read_image(source) - exact).max() <= 1        # rounds to a level, as Pillow does
    grey = Image.merge("LA", [Image.fromarray(RGB[:, :, 0]), Image.fromarray(rgba[:, :, 3])])
    for source in (grey, file_of(grey)):
        assert np.abs(read_image(source) - exact[:, :, :1]).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_shows_white(mode):
    straight = {"La": "LA", "RGBa": "RGBA"}[mode]
    image = Image.new(straight, (2, 2), (0,) * (len(straight) - 1) + (0,)).convert(mode)
    assert (read_image(image) == 255).all()


def test_a_palette_with_transparency_shows_white_and_one_without_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert read_image(image).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    for kind in ("PNG", "GIF"):
        assert read_image(file_of(image, kind, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    rgb = Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]]))
    assert read_image(file_of(rgb, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_one_bit_and_cmyk_are_converted():
    assert read_image(Image.fromarray(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert read_image(cmyk)[0, 0].tolist() == [255, 0, 0]
    jpeg = read_image(file_of(cmyk, "JPEG", quality=100))
    assert np.abs(jpeg[0, 0] - [255, 0, 0]).max() <= 3      # JPEG's own loss


def test_grey_of_16_bits_is_scaled_and_not_clipped():
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [[0, 0, 1, 1, 128, 255]]
    for source in (file_of(grey), file_of(grey, "TIFF"), Image.fromarray(grey), Image.fromarray(grey.astype(np.int32)),
                   Image.fromarray(grey.astype(">u2"))):
        got = read_image(source)
        assert got[:, :, 0].tolist() == expected and (got == got[:, :, :1]).all()


def test_a_transparent_level_of_16_bits_is_white():
    image = Image.open(io.BytesIO(file_of(np.array([[257, 514]], np.uint16))))
    image.load()
    image.info["transparency"] = 257
    assert read_image(image)[0, :, 0].tolist() == [255, 2]


@pytest.mark.parametrize("pixels, message", [
    (np.array([[0, 65536]], np.int32), "grey levels 0 ... 65536, expected 0 ... 65535"),
    (np.array([[-1, 5]], np.int32), "grey levels -1 ... 5"),
    (np.array([[0.5]], np.float32), "a PIL image of mode F: pixels are floats"),
])
def test_levels_whose_range_is_not_known_are_refused(pixels, message):
    with pytest.raises(PromptError) as raised:
        read_image(Image.fromarray(pixels))
    assert message in str(raised.value)


def test_exif_orientation_is_applied_to_files_and_pil_images_and_leaves_the_callers_alone():
    turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
              6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB)}
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = file_of(RGB, exif=exif)
        np.testing.assert_array_equal(read_image(data), expected)
        image = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(read_image(image), expected)
        assert image.size == (7, 5) and image.getexif()[0x0112] == orientation


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_files_take_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert read_image(data)[4, 4].tolist() == [255, 0, 0]


# --- what is refused

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(9460, 9460), (50_000, 50_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(width, height, monkeypatch):
    assert width * height > loader.MAX_PIXELS
    for pillows in (Image.MAX_IMAGE_PIXELS, None):      # whatever the limit of Pillow's own
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with pytest.raises(PromptError, match=r"pixels"):
            read_image(png_header(width, height))


def test_a_picture_with_no_pixel_is_refused():
    with pytest.raises(PromptError, match="0 x 3 pixels"):
        read_image(Image.new("RGB", (0, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")         # Pillow's, about damaged TIFF headers
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_a_file_that_is_cut_short_is_refused_at_every_length(kind):
    data = file_of(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8), kind)
    for length in (0, 1, 4, 12, 40, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(PromptError) as raised:
            read_image(data[:length])
        assert "\n" not in str(raised.value) and f"a picture of {length} bytes" in str(raised.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_pictures_or_prompt_errors():
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
    n_refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = file_of(pixels, kind)
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 12)):
                data[at] = rng.integers(0, 256)
            try:
                assert read_image(bytes(data)).shape[2] == 3
            except PromptError as error:
                assert "\n" not in str(error)
                n_refused += 1
    assert n_refused


@pytest.mark.parametrize("data, message", [
    (b"", "a picture of 0 bytes: empty"),
    (b"no picture at all", "no picture that can be read, expected one of AVIF"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),  # would run Ghostscript
])
def test_other_bytes_are_refused(data, message):
    with pytest.raises(PromptError) as raised:
        read_image(data)
    assert message in str(raised.value)


def test_a_path_that_holds_no_file_is_named(tmp_path):
    for path, message in ((tmp_path / "gone.png", "no such file"), (tmp_path, "no such file"), ("a\0b", ""),
                          ("x" * 5000, "")):
        with pytest.raises(PromptError) as raised:
            read_image(path)
        assert message in str(raised.value) and "picture '" in str(raised.value) and len(str(raised.value)) < 200
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(PromptError, match=r"empty\.png': empty"):
        read_image(tmp_path / "empty.png")


# --- how large a picture is made

TABLE = """
    1080 1920    288x528=66      576x1056=264    1200x2112=1100
    480 640      336x432=63      672x912=266     1344x1824=1064
    512 512      384x384=64      768x768=256     1584x1584=1089
    224 224      384x384=64      768x768=256     1584x1584=1089
    64 64        384x384=64      768x768=256     1584x1584=1089
    3000 50      3072x48=64      6192x96=258     12432x192=1036
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_the_sizes_of_the_specification(row):
    height, width, *expected = row.split()
    for budget, cell in zip((70, 280, 1120), expected, strict=True):
        rows, columns = fitted_size(int(height), int(width), budget, 48)
        assert f"{rows}x{columns}={rows * columns // 48**2}" == cell


def test_the_size_of_the_example_of_the_specification():
    assert fitted_size(300, 500, 280, 48) == (576, 1008)


def test_a_strip_is_one_block_wide_and_as_long_as_the_budget():
    assert fitted_size(1, 10, 70, 48) == (96, 1248)         # 2.6 blocks high
    assert fitted_size(1, 69, 70, 48) == (48, 69 * 48)      # 1.007 blocks high
    assert fitted_size(1, 71, 70, 48) == (48, 70 * 48)      # 0.993: by the rule for strips
    assert fitted_size(89_000_000, 1, 1120, 48) == (1120 * 48, 48)


def test_what_fits_nothing_is_refused():
    with pytest.raises(PromptError, match=r"20 x 10 pixels does not fit 0 soft tokens"):
        fitted_size(10, 20, 0, 48)


@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), budget=st.sampled_from(BUDGETS),
       side=st.sampled_from([12, 48]))
def test_a_size_is_within_the_budget_whole_blocks_and_never_nothing(height, width, budget, side):
    rows, columns = fitted_size(height, width, budget, side)
    assert rows % side == columns % side == 0 and rows and columns
    assert rows // side * (columns // side) <= budget
    assert fitted_size(width, height, budget, side) == (columns, rows)


@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), budget=st.sampled_from(BUDGETS))
def test_a_picture_that_is_no_strip_keeps_its_aspect_within_a_block_and_wastes_less_than_one(height, width, budget):
    exact = [math.sqrt(budget * a / b) for a, b in ((height, width), (width, height))]     # in blocks
    assume(min(exact) > 1.001)
    rows, columns = (side // 48 for side in fitted_size(height, width, budget, 48))
    assert exact[0] - 1.001 < rows < exact[0] + 0.001 and exact[1] - 1.001 < columns < exact[1] + 0.001


@given(short=st.integers(1, 40), long=st.integers(1, 100_000), budget=st.sampled_from(BUDGETS))
def test_a_strip_takes_the_whole_budget(short, long, budget):
    assume(budget * short < 0.999 * long)           # less than one block wide
    assert fitted_size(short, long, budget, 48) == (48, budget * 48)


def test_resizing_is_pillows_and_its_result_is_nobody_elses():
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        got = resize(RGB, (48, 96), int(resample))
        np.testing.assert_array_equal(got, np.asarray(Image.fromarray(RGB).resize((96, 48), resample)))
    same = resize(RGB, (5, 7), 3)
    np.testing.assert_array_equal(same, RGB)
    assert not np.shares_memory(same, RGB) and not same.flags.writeable
