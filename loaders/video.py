"""Frames of a video: which are taken, when they were seen, and how a file is read without holding it whole."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from loaders.errors import PromptError
from loaders.image import check_size, open_file, refuse_url

FPS = 24            # where nobody says. Source: gemma4.md 5.3
SLOWEST = 1e-6      # frames per second: one in eleven days
# Containers that are one file. A playlist would make FFmpeg open what it names: other files, and addresses.
CONTAINERS = "mov,matroska,avi,gif,mpeg,mpegts,mpegvideo,ogg,flv,asf,ivf,apng,webp_anim"
KINDS = "a list of frames, an array [n, height, width, 3], or a path or the bytes of a video file"
FILES = (str, Path, bytes, bytearray, memoryview)


def sampled_frames(source, n_frames, keep, fps=None, timestamps=None):
    """[(seconds, keep(frame))] of the frames that `chosen` names, in time order.

    source      a list of what loaders.image takes (or an array [n, height, width, 3]), or a path or the bytes of a file
    n_frames    frames that are taken at most
    keep        called with each such frame, a source of loaders.image, in order: the frame is let go after it
    fps         frames per second, or None: frame i of a list is at i / 24 s, one of a file when the file says
    timestamps  seconds of each frame of the source, instead
    Raises PromptError.
    """
    times = _Times(fps, timestamps)
    check_frames(source)
    if isinstance(source, FILES):
        return _File(source, n_frames, keep, times).read()
    times.check(len(source))
    return [(times.of(index), keep(source[index])) for index in chosen(len(source), n_frames)]


def check_frames(source):
    """Raises PromptError where `source` is none of KINDS by its type, or is a URL."""
    refuse_url(source, "video")
    if not (isinstance(source, (*FILES, list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4)):
        shape = f"{list(source.shape)} " if isinstance(source, np.ndarray) else ""
        raise PromptError(f"a video of type {shape}{type(source).__name__}, expected {KINDS}")


def chosen(n, n_frames):
    """Which of n frames are taken: floor(i * n / n_frames) for i < n_frames, all where there are no more than that.

    Source: gemma4.md 5.3 (HF's indices; that a short video is taken whole is MAX's rule, where HF refuses it).
    """
    return list(range(n)) if n <= n_frames else [i * n // n_frames for i in range(n_frames)]


class _Times:
    """When each frame of a video was seen."""

    def __init__(self, fps, timestamps):
        if fps is not None and timestamps is not None:
            raise PromptError("a video has both fps and timestamps, expected one of them")
        if fps is not None and not (math.isfinite(fps) and fps >= SLOWEST):
            raise PromptError(f"a video's fps is {fps}, expected a number of {SLOWEST} or more")
        if timestamps is not None:
            if not all(math.isfinite(time) and time >= 0 for time in timestamps):
                raise PromptError("a video's timestamps hold a number that is not >= 0 and finite, expected seconds")
            if any(later < sooner for sooner, later in pairwise(timestamps)):
                raise PromptError("a video's timestamps go back, expected frames in time order")
        self.fps, self.timestamps = fps, timestamps

    def check(self, n):
        """Raises PromptError where a video of n frames has none, or another count of timestamps."""
        if not n:
            raise PromptError("a video has no frame, expected at least one")
        if self.timestamps is not None and len(self.timestamps) != n:
            raise PromptError(f"a video has {n} frames and {len(self.timestamps)} timestamps, expected one a frame")

    def of(self, index, in_file=None):
        """Seconds of a frame; `in_file`: what the file says."""
        if self.timestamps is not None:
            return self.timestamps[index] if index < len(self.timestamps) else 0.0      # a count that check refuses
        if self.fps is not None:
            return index / self.fps
        return index / FPS if in_file is None else in_file


class _File:
    """A video file through PyAV.

    Which frames are taken hangs on how many there are, and headers do not say reliably. So packets are counted first,
    which decodes nothing, and taken for frames; then frames are decoded one by one, the chosen ones kept, and counted.
    Where the counts differ (one packet can hold two frames, or one that is not shown) the file is decoded once more,
    by the right count. At no time is more than one frame held, beside what `keep` returned.
    """

    def __init__(self, source, n_frames, keep, times):
        self._source, self._n_frames, self._keep, self._times = source, n_frames, keep, times

    def read(self):
        try:
            import av
        except ImportError as error:
            raise PromptError("a video file is read by PyAV, which is not installed: pip install 'rawgem[video]', or "
                              "pass a list of frames") from error
        with open_file(self._source, "video") as (file, name):
            if not file.read(1):
                raise PromptError(f"{name}: empty")
            try:
                n = self._pass(av, file, name, lambda container, stream: sum(
                    packet.size > 0 for packet in container.demux(stream)))
                kept, n_seen = self._pass(av, file, name, lambda *opened: self._decode(*opened, n, name))
                if n_seen != n:
                    self._times.check(n_seen)
                    kept, _ = self._pass(av, file, name, lambda *opened: self._decode(*opened, n_seen, name))
                self._times.check(n_seen)
                return kept
            except av.FFmpegError as error:
                raise PromptError(f"{name}: no video that can be read: {_reason(error)}") from error

    @staticmethod
    def _pass(av, file, name, work):
        """work(container, stream) over the file from its beginning."""
        file.seek(0)
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}, metadata_errors="replace") as container:
            if not container.streams.video:
                raise PromptError(f"{name}: no pictures in it, expected a video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise PromptError(f"{name}: coded in a way that this PyAV does not decode")
            stream.thread_type = "AUTO"
            check_size(stream.codec_context.height, stream.codec_context.width, name)
            return work(container, stream)

    def _decode(self, container, stream, n, name):
        """([(seconds, what keep returned)], frames there were), where the frames chosen are those of n."""
        wanted, kept, n_seen, begin = set(chosen(n, self._n_frames)), [], 0, None
        for frame in container.decode(stream):
            if n_seen in wanted:
                check_size(frame.height, frame.width, name)
                seconds = self._times.of(n_seen, _seconds(frame, begin, n_seen, stream))
                kept.append((seconds, self._keep(_pixels(frame))))
            if begin is None:
                begin = frame.pts
            n_seen += 1
        return kept, n_seen


def _reason(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _seconds(frame, begin, index, stream):
    """Seconds since the first frame, by the file's times where it has them, else by its frames per second, or None."""
    if index == 0:
        return 0.0
    if frame.pts is not None and begin is not None and frame.time_base:
        return max(0.0, float((frame.pts - begin) * frame.time_base))       # a damaged file may go back
    return float(index / stream.average_rate) if stream.average_rate else None


def _pixels(frame):
    """[height, width, 3 or 4] uint8 of a decoded frame, upright: a phone writes how it was held, not turned frames."""
    has_alpha = any(part.is_alpha for part in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))
