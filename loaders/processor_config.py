"""processor_config.json and preprocessor_config.json: what a checkpoint asks of pictures and videos."""

from dataclasses import dataclass
from pathlib import Path

from loaders.config import Config

FILE, OLD_FILE = "processor_config.json", "preprocessor_config.json"
IMAGE_TOKENS, VIDEO_TOKENS, N_FRAMES = 280, 70, 32      # where no file says. Source: gemma4.md 5.1 and 5.3
LEVEL = 1 / 255


@dataclass(frozen=True)
class ProcessorConfig:
    """What the files say.

    image_tokens  soft tokens a picture takes at most; video_tokens: a frame of a video
    n_frames      frames that are taken of a video
    """

    image_tokens: int = IMAGE_TOKENS
    video_tokens: int = VIDEO_TOKENS
    n_frames: int = N_FRAMES


@dataclass(frozen=True)
class Expected:
    """What the arithmetic of a tower takes for granted: a file that says otherwise is refused.

    resample    Pillow's number of the filter
    mean, std   of (pixel / 255 - mean) / std, the same for each channel
    block_side  pixels of a soft token's side; patch_side: of a patch, or None where the tower knows blocks only
    square      side in pixels that every picture is made, or None where the aspect is kept
    n_soft      soft tokens of every picture, or None where a budget says
    """

    resample: int
    mean: float
    std: float
    block_side: int
    patch_side: int | None = None
    square: int | None = None
    n_soft: int | None = None


def load_processor_config(directory, expected):
    """Reads the files of `directory`, where they are there; what they leave out has its default.

    The picture's settings are the section image_processor of processor_config.json, else preprocessor_config.json; the
    video's are the section video_processor. `image_tokens` is expected.n_soft where that is set.
    Raises CheckpointError for a file that is not JSON, ConfigError for a value that is of the wrong type, or that
    changes what a tower is given.
    """
    whole = _load(directory, FILE)
    image = whole.section("image_processor", None) or _load(directory, OLD_FILE)
    video = whole.section("video_processor", None) or Config({}, FILE, "video_processor")
    for config in (image, video):
        _check(config, expected)
    if not video.bool("do_sample_frames", True):
        raise video.error("do_sample_frames", "true: frames are always sampled, num_frames of them")
    if "fps" in video:
        raise video.error("fps", "nothing: num_frames says how many frames are taken")
    if expected.n_soft is not None:
        for config in (whole, image):
            if config.int("image_seq_length", expected.n_soft) != expected.n_soft:
                raise config.error("image_seq_length", f"{expected.n_soft}, the tower's soft tokens of a picture")
        return ProcessorConfig(expected.n_soft, expected.n_soft, video.int("num_frames", N_FRAMES))
    return ProcessorConfig(image.int("max_soft_tokens", IMAGE_TOKENS), video.int("max_soft_tokens", VIDEO_TOKENS),
                           video.int("num_frames", N_FRAMES))


def _load(directory, name):
    return Config.load(directory, name) if (Path(directory) / name).is_file() else Config({}, name)


def _check(config, expected):
    """Raises ConfigError where one processor's settings change what the tower is given."""
    def same(key, value, why):
        if config.int(key, value, least=0) != value:
            raise config.error(key, f"{value}, {why}")

    same("resample", expected.resample, "the filter that pictures are resized with")
    for key in ("do_resize", "do_rescale"):
        if not config.bool(key, True):
            raise config.error(key, "true")
    if config.bool("do_pan_and_scan", False):
        raise config.error("do_pan_and_scan", "false: a picture is taken whole")
    if abs(config.float("rescale_factor", LEVEL) - LEVEL) > 1e-9:
        raise config.error("rescale_factor", "1 / 255")
    _check_levels(config, expected)
    if expected.patch_side is not None:
        same("patch_size", expected.patch_side, "the tower's patch_size")
    if "patch_size" in config and "pooling_kernel_size" in config:
        side = config.int("patch_size") * config.int("pooling_kernel_size")
        if side != expected.block_side:
            raise config.error("pooling_kernel_size", f"{expected.block_side} / patch_size, for soft tokens of "
                                                      f"{expected.block_side} x {expected.block_side} pixels")
    if expected.square is not None and "size" in config:
        size = config.section("size")
        for key in ("height", "width"):
            if size.int(key) != expected.square:
                raise size.error(key, f"{expected.square}, the tower's image_size")


def _check_levels(config, expected):
    """Raises ConfigError where mean and std are not the tower's; do_normalize false is mean 0 and std 1."""
    is_plain = expected.mean == 0 and expected.std == 1
    if not config.bool("do_normalize", not is_plain):
        if not is_plain:
            raise config.error("do_normalize", "true")
        return
    for key, value in (("image_mean", expected.mean), ("image_std", expected.std)):
        if config.list(key, [value] * 3) != [value] * 3:
            raise config.error(key, f"{[value] * 3}")
