"""loaders/video.py: which frames are taken, when they were seen, and files read through PyAV."""

import importlib.util
import io
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Video
from engine.errors import PromptError
from loaders import video as loader
from loaders.video import chosen, sampled_frames

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed: extra `video`")
HEIGHT, WIDTH = 48, 64
NOT_CODED = b"\0\0\1\xb6"       # begins an MPEG-4 picture that shows nothing new: a packet, and no frame


def frames(n):
    """n frames, each one grey level."""
    return [np.full((HEIGHT, WIDTH, 3), 6 * i % 256, np.uint8) for i in range(n)]


def level(frame):
    """What `frames` wrote, wherever it is kept."""
    return int(frame[-1, -1, 0])


def numbers(source, n_frames=32, **how):
    """[(seconds, number of the frame)] taken of `frames`, which are told apart by their level, give or take a codec."""
    return [(seconds, round(shade / 6)) for seconds, shade in sampled_frames(source, n_frames, level, **how)]


def file_of(pictures, kind="matroska", codec="ffv1", fps=10, pixels="bgr0", times=None, fillers=()):
    """The bytes of a video file. `times`: of each frame, in 1/fps; `fillers`: packets before which one is NOT_CODED."""
    import av
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        height, width = pictures[0].shape[:2]
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = height, width, pixels, 10**7
        packets = []
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = (times[i] if times else i), Fraction(1) / fps
            packets += stream.encode(frame)
        later = 0
        for i, packet in enumerate([*packets, *stream.encode()]):
            if i in fillers:
                filler = av.Packet(NOT_CODED + bytes([0x50 | i % 10, 0x9f]))
                filler.stream, filler.pts, filler.time_base = stream, packet.pts + later, packet.time_base
                filler.dts, later = filler.pts, later + 1
                container.mux(filler)
            packet.pts += later
            packet.dts += later
            container.mux(packet)
    return out.getvalue()


# --- which frames, and when

def test_a_video_of_no_more_frames_than_are_taken_is_whole():
    assert chosen(1, 32) == [0] and chosen(32, 32) == list(range(32))


def test_of_more_frames_those_at_equal_steps_rounded_down_are_taken():
    assert chosen(33, 32) == list(range(32))
    assert chosen(450, 32) == [int(i * 450 / 32) for i in range(32)]
    assert chosen(450, 32)[:4] == [0, 14, 28, 42] and chosen(450, 32)[-1] == 435


@given(n=st.integers(1, 100_000), n_frames=st.integers(1, 64))
def test_the_frames_that_are_taken_are_in_order_and_begin_with_the_first(n, n_frames):
    taken = chosen(n, n_frames)
    assert len(taken) == min(n, n_frames) and taken[0] == 0 and taken[-1] < n
    assert all(step >= 1 for step in np.diff(taken))


def test_a_list_has_24_frames_per_second_unless_it_says():
    assert numbers(frames(3)) == [(0, 0), (1 / 24, 1), (2 / 24, 2)]
    assert numbers(frames(3), fps=2) == [(0, 0), (0.5, 1), (1, 2)]
    assert numbers(np.stack(frames(2)), fps=0.1) == [(0, 0), (10, 1)]


def test_timestamps_are_those_of_the_source_index():
    assert numbers(frames(5), n_frames=2, fps=10) == [(0, 0), (0.2, 2)]
    assert numbers(frames(5), n_frames=2, timestamps=(0.5, 1, 7.25, 8, 9)) == [(0.5, 0), (7.25, 2)]


def test_only_the_frames_that_are_taken_are_looked_at():
    seen = []
    sampled_frames([0, None, 2, None, 4, None, 6, None], 4, seen.append)
    assert seen == [0, 2, 4, 6]


@pytest.mark.parametrize("source, how, message", [
    ([], {}, "a video has no frame"),
    (frames(2), {"fps": 0}, "fps is 0, expected a number of 1e-06 or more"),
    (frames(2), {"fps": -3.0}, "fps is -3.0"),
    (frames(2), {"fps": float("nan")}, "fps is nan"),
    (frames(2), {"fps": float("inf")}, "fps is inf"),
    (frames(2), {"timestamps": (0.0,)}, "2 frames and 1 timestamps"),
    (frames(1), {"timestamps": (0.0, 1.0)}, "1 frames and 2 timestamps"),
    (frames(2), {"timestamps": (1.0, 0.5)}, "timestamps go back"),
    (frames(2), {"timestamps": (-1.0, 0.5)}, "not >= 0 and finite"),
    (frames(2), {"timestamps": (0.0, float("nan"))}, "not >= 0 and finite"),
    (frames(2), {"timestamps": (0.0, 1.0), "fps": 2}, "both fps and timestamps"),
    (frames(1)[0], {}, "a video of type [48, 64, 3] ndarray, expected a list of frames"),
    (iter(frames(1)), {}, "a video of type list_iterator, expected a list of frames"),
    (None, {}, "a video of type NoneType"),
    ("https://a.b/c.mp4", {}, "a video is the URL 'https://a.b/c.mp4'"),
])
def test_what_is_no_video_is_refused(source, how, message):
    with pytest.raises(PromptError) as raised:
        sampled_frames(source, 32, level, **how)
    assert message in str(raised.value)


@pytest.mark.parametrize("how, message", [
    ({"frames": 3}, "a video of type int"), ({"frames": [], "fps": "24"}, "fps is '24'"),
    ({"frames": [], "fps": True}, "fps is True"), ({"frames": [], "timestamps": 3}, "timestamps are not numbers"),
    ({"frames": [], "timestamps": ["0:01"]}, "timestamps are not numbers"),
])
def test_a_video_says_at_once_what_is_of_the_wrong_type(how, message):
    with pytest.raises(PromptError) as raised:
        Video(**how)
    assert message in str(raised.value)


def test_timestamps_of_any_numbers_become_a_tuple_of_floats():
    assert Video([], timestamps=np.arange(3, dtype=np.float32)).timestamps == (0.0, 1.0, 2.0)
    assert Video([], timestamps=[0, Fraction(1, 2)]).timestamps == (0.0, 0.5)


# --- files

def test_without_pyav_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PromptError, match=r"pip install 'rawgem\[video\]', or pass a list of frames"):
        numbers(b"a video")


@needs_av
def test_a_file_is_sampled_as_its_list_of_frames(tmp_path):
    data = file_of(frames(40))
    (tmp_path / "a.mkv").write_bytes(data)
    expected = numbers(frames(40), fps=10)
    assert [n for _, n in expected] == [i * 40 // 32 for i in range(32)]
    for source in (data, bytearray(data), tmp_path / "a.mkv", str(tmp_path / "a.mkv")):
        assert numbers(source) == expected


@needs_av
@pytest.mark.parametrize("kind, codec, pixels", [("mp4", "mpeg4", "yuv420p"), ("avi", "mpeg4", "yuv420p"),
                                                 ("gif", "gif", "bgr8"), ("mpegts", "mpeg2video", "yuv420p")])
def test_containers_and_codecs(kind, codec, pixels):
    pictures = [np.full((HEIGHT, WIDTH, 3), 36 * (i % 8), np.uint8) for i in range(9)]     # levels that gif has too
    got = sampled_frames(file_of(pictures, kind, codec, 25, pixels), 4, level)
    assert [seconds for seconds, _ in got] == pytest.approx([0, 0.08, 0.16, 0.24], abs=0.005)  # gif: 1/100 s
    assert np.abs(np.array([shade for _, shade in got]) - [0, 72, 144, 216]).max() <= 6


@needs_av
def test_a_files_own_times_are_used_unless_the_caller_says():
    data = file_of(frames(4), times=[5, 6, 16, 46])
    assert numbers(data) == [(0, 0), (0.1, 1), (1.1, 2), (4.1, 3)]
    assert numbers(data, fps=2) == [(0, 0), (0.5, 1), (1, 2), (1.5, 3)]
    assert numbers(data, timestamps=(1.0, 2.0, 3.0, 9.0)) == [(1, 0), (2, 1), (3, 2), (9, 3)]
    for times in ((0.0,) * 3, (0.0,) * 5):
        with pytest.raises(PromptError, match=f"4 frames and {len(times)} timestamps"):
            numbers(data, timestamps=times)


@needs_av
def test_packets_that_hold_no_frame_do_not_shift_the_sample():
    import av
    data = file_of(frames(40), codec="mpeg4", pixels="yuv420p", fillers=(3, 20, 30))
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 43
    assert [n for _, n in numbers(data)] == [i * 40 // 32 for i in range(32)]


@needs_av
def test_one_frame_at_a_time_is_held(monkeypatch):
    """Frames that are not taken are never made pixels, and those that are go to `keep` before the next is decoded."""
    made = []
    monkeypatch.setattr(loader, "_pixels", lambda frame, pixels=loader._pixels: made.append("made") or pixels(frame))
    sampled_frames(file_of(frames(100)), 4, lambda frame: made.append("kept"))
    assert made == ["made", "kept"] * 4


@needs_av
def test_transparent_frames_keep_their_alpha_for_the_reader_of_pictures():
    picture = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    picture[:, :, 3] = 77
    got = sampled_frames(file_of([picture], codec="ffv1", pixels="bgra"), 4, lambda frame: frame[0, 0].tolist())
    assert got == [(0.0, [0, 0, 0, 77])]


@needs_av
def test_a_turned_phone_is_turned_back():
    """The matrix of an MP4 track: x' = -y, y' = x is a quarter turn clockwise."""
    data = bytearray(file_of([np.dstack([np.tile(np.uint8([0, 255]).repeat(32), (48, 1))] * 3)], "mp4", "mpeg4", 10,
                             "yuv420p"))
    at = data.index(b"tkhd") + 44       # behind the header's fixed fields. Source: ISO 14496-12, 8.3.2
    one = 1 << 16
    assert np.frombuffer(data[at:at + 36], ">i4").tolist() == [one, 0, 0, 0, one, 0, 0, 0, 1 << 30]
    data[at:at + 36] = np.array([0, one, 0, -one, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (_, frame), = sampled_frames(bytes(data), 4, np.copy)
    assert frame.shape == (64, 48, 3)
    assert frame[:24].max() < 40 and frame[40:].min() > 215         # what was left is above


@needs_av
@pytest.mark.parametrize("data, message", [
    (b"", "a video of 0 bytes: empty"),
    (b"no video at all" * 50, "no video that can be read"),
    (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n", "no video that can be read"),
    (b"ffconcat version 1.0\nfile a.mp4\n", "no video that can be read"),
])
def test_other_bytes_are_refused(data, message):
    with pytest.raises(PromptError) as raised:
        numbers(data)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@needs_av
def test_sound_alone_is_no_video():
    import av
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(PromptError, match="no pictures in it"):
        numbers(out.getvalue())


@needs_av
def test_a_file_that_is_too_large_or_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("loaders.image.MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(PromptError, match="64 x 48 pixels, at most 3071"):
        numbers(file_of(frames(1)))
    with pytest.raises(PromptError, match=r"video '.*gone\.mp4' cannot be read: no such file"):
        numbers(tmp_path / "gone.mp4")


@needs_av
def test_damaged_files_are_videos_or_prompt_errors():
    rng = np.random.default_rng(0)
    n_refused = 0
    for whole in (file_of(frames(6)), file_of(frames(6), "mp4", "mpeg4", 10, "yuv420p")):
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 20)):
                data[at] = rng.integers(0, 256)
            try:
                assert all(seconds >= 0 for seconds, _ in sampled_frames(bytes(data), 4, level))
            except PromptError as error:
                assert "\n" not in str(error)
                n_refused += 1
    assert n_refused
