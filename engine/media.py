"""Pictures and videos as prompts carry them. No model takes them yet: the engine refuses them by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Image:
    """One picture: a path, the bytes of a file, a PIL image or an array [height, width, 3] uint8."""

    source: object


@dataclass(frozen=True)
class Video:
    """Frames as `Image` takes them, with when they were seen: frames per second, or the time of each in seconds."""

    frames: object
    fps: float | None = None
    timestamps: tuple | None = None
