"""Pictures and videos as prompts carry them. What they hold is read where a prompt is."""

from dataclasses import dataclass

from engine.errors import PromptError
from loaders.image import check_source
from loaders.video import check_frames


@dataclass(frozen=True)
class Image:
    """One picture: a path, the bytes of a file, a PIL image or an array [height, width, 3] uint8.

    An array may also be grey, [height, width] or [height, width, 1], or have alpha: [height, width, 4].
    """

    source: object

    def __post_init__(self):
        if not isinstance(self.source, Image):
            check_source(self.source)


@dataclass(frozen=True)
class Video:
    """Frames, and when they were seen.

    frames      a list of what `Image` takes, in time order, or an array [n, height, width, 3]; or a path or the bytes
                of a video file, which needs the extra `video`
    fps         frames per second; None: what the file says, 24 for a list
    timestamps  the time of each frame in seconds, instead
    """

    frames: object
    fps: float | None = None
    timestamps: tuple | None = None

    def __post_init__(self):
        check_frames(self.frames)
        if self.fps is not None and not _is_number(self.fps):
            raise PromptError(f"a video's fps is {self.fps!r}, expected a number or None")
        if self.timestamps is None:
            return
        try:
            times = tuple(self.timestamps)
        except TypeError:
            times = (None,)
        if not all(_is_number(time) for time in times):
            raise PromptError("a video's timestamps are not numbers, expected a list of the seconds of each frame")
        object.__setattr__(self, "timestamps", tuple(map(float, times)))


def _is_number(value):
    return hasattr(value, "__float__") and not isinstance(value, (bool, str)) and getattr(value, "shape", ()) == ()
