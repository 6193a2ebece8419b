"""A picture as the tower takes it, and what makes one of whatever a caller passes."""

import hashlib
from dataclasses import dataclass

import numpy as np

from engine.errors import ConfigError, PromptError
from engine.media import Image, Video
from engine.models.vision_spec import Gemma4TowerSpec, SiglipSpec
from loaders.image import read_image
from loaders.processor_config import Expected, ProcessorConfig, load_processor_config
from loaders.resize import fitted_size, resize
from loaders.video import sampled_frames

BILINEAR, BICUBIC = 2, 3        # Pillow's numbers


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels that are ready to be cut into patches. Two are equal where their keys are.

    pixels    [height, width, 3] uint8 RGB, read-only, sides multiples of the tower's block_side
    n_tokens  soft tokens it becomes
    key       (hex digest of pixels and shape, budget): what a cache knows it by
    """

    pixels: np.ndarray
    n_tokens: int
    key: tuple

    def __eq__(self, other):
        return isinstance(other, Picture) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


class PictureProcessor:
    """Sources of pictures and videos, made Pictures for one tower.

    tower         a spec of engine/models/vision_spec.py
    image_tokens  soft tokens of a picture at most, where a request does not say; video_tokens: of a frame of a video
    n_frames      frames that are taken of a video at most
    """

    def __init__(self, tower, config=None):
        config = config or (ProcessorConfig(tower.n_soft, tower.n_soft) if _is_square(tower) else ProcessorConfig())
        for name in ("image_tokens", "video_tokens"):
            _check_budget(tower, name, getattr(config, name), ConfigError, "the processor's ")
        self.tower = tower
        self.image_tokens, self.video_tokens, self.n_frames = config.image_tokens, config.video_tokens, config.n_frames
        self._resample = BILINEAR if _is_square(tower) else BICUBIC

    @classmethod
    def load(cls, directory, tower):
        """With the settings of a checkpoint's processor files, or the defaults where it has none.

        Raises CheckpointError, ConfigError: among others where a file asks for pixels that the tower is not made for.
        """
        return cls(tower, load_processor_config(directory, _expected(tower)))

    def image(self, source, budget=None):
        """The Picture of `source` (Image, or what Image takes), of `budget` soft tokens at most. Raises PromptError."""
        budget = self._budget("image_tokens", budget)
        pixels = read_image(_bare(source))
        return self._picture(pixels, self._size(pixels, budget), budget)

    def video(self, source, budget=None):
        """[(seconds, Picture)] in time order: n_frames frames of a video at most, all of one size.

        source   Video, a list of what Image takes, or a path or the bytes of a file
        budget   soft tokens of a frame at most
        The size is that of the first frame, fitted; a frame of another size is resized to it. Raises PromptError.
        """
        budget = self._budget("video_tokens", budget)
        video = source if isinstance(source, Video) else Video(source)
        size = None

        def keep(frame):
            nonlocal size
            pixels = read_image(frame)
            size = size or self._size(pixels, budget)
            return self._picture(pixels, size, budget)

        frames = video.frames
        if isinstance(frames, (list, tuple)):
            frames = [_bare(frame) for frame in frames]
        return sampled_frames(frames, self.n_frames, keep, video.fps, video.timestamps)

    def _budget(self, name, budget):
        if budget is None:
            return getattr(self, name)
        _check_budget(self.tower, name, budget, PromptError)
        return int(budget)

    def _size(self, pixels, budget):
        """(height, width) in pixels that the tower sees. Raises PromptError where it has no positions for them."""
        tower = self.tower
        if _is_square(tower):
            return tower.side, tower.side
        size = fitted_size(*pixels.shape[:2], budget, tower.block_side)
        if max(size) > tower.n_positions * tower.patch_side:
            height, width = pixels.shape[:2]
            raise PromptError(f"a picture of {width} x {height} pixels becomes {size[1]} x {size[0]}: "
                              f"{max(size) // tower.patch_side} patches on a side, the tower has positions for "
                              f"{tower.n_positions}; crop it, or ask for fewer soft tokens")
        return size

    def _picture(self, pixels, size, budget):
        pixels = resize(pixels, size, self._resample)
        side = self.tower.block_side
        digest = hashlib.blake2b(repr(pixels.shape).encode() + b":", digest_size=32)
        digest.update(pixels)
        return Picture(pixels, (size[0] // side) * (size[1] // side), (digest.hexdigest(), budget))


def _bare(source):
    """What an Image holds, or `source` itself."""
    while isinstance(source, Image):
        source = source.source
    return source


def _is_square(tower):
    """Whether every picture is made the same square, whatever its aspect."""
    return isinstance(tower, SiglipSpec)


def _check_budget(tower, name, budget, error, whose=""):
    if not isinstance(budget, (int, np.integer)) or isinstance(budget, bool) or budget not in tower.budgets:
        expected = " or ".join(map(str, tower.budgets))
        raise error(f"{whose}{name} is {budget!r}, expected {expected}: what the tower is made for")


def _expected(tower):
    """What a checkpoint's processor files must say, or leave out. Source: gemma4.md 5.1 and 5.3; gemma3.md 8."""
    if _is_square(tower):
        return Expected(BILINEAR, 0.5, 0.5, tower.block_side, square=tower.side, n_soft=tower.n_soft)
    patch = tower.patch_side if isinstance(tower, Gemma4TowerSpec) else None
    return Expected(BICUBIC, 0, 1, tower.block_side, patch)
