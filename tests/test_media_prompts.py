"""Prompts with pictures: placeholders become soft tokens at the right positions, and what does not fit is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from engine import Image, PromptError, Video
from engine.media_prompts import MediaPrompts
from engine.models.vision_spec import Gemma4TowerSpec, MediaSpec, SiglipSpec
from engine.prompts import Prompt, as_prompt, check_length, media_rows, without_media
from engine.sequence import MediaRun
from engine.vision.picture import PictureProcessor
from loaders.tokenizer import Tokenizer

PIECES = ["<pad>", "<bos>", "<boi>", "<eoi>", "<|image|>", "<|video|>", "<unk>",
          *"▁abcdefghijklmnopqrstuvwxyz0123456789.:?\n", "\n\n"]
PAD, BOS, BOI, EOI, IMAGE, VIDEO = range(6)
VOCAB = len(PIECES)
TOWER = Gemma4TowerSpec(hidden=8, intermediate=8, n_layers=1, n_heads=1, head_dim=8, patch=4, n_positions=128)
SQUARE = SiglipSpec(hidden=8, intermediate=8, n_layers=1, n_heads=1, patch=2, side=16, n_soft=4)


class Spec:
    """What MediaPrompts reads of a ModelSpec."""

    vocab = VOCAB

    def __init__(self, tower, video=VIDEO):
        self.media = None if tower is None else MediaSpec(tower, IMAGE, video, BOI, EOI)


def tokenizer():
    """Letter by letter. <|video|> is an ordinary piece of the vocabulary, as in some released files."""
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [("\n", "\n")], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(PIECES[:5])
    return Tokenizer(backend, {"bos_token": "<bos>"}, add_bos=True)


def spell(text):
    """The ids of a text without placeholders."""
    return tokenizer().encode(text, add_special_tokens=False)


def picture(height, width):
    return np.full((height, width, 3), 7 * height + width & 255, np.uint8)


WIDE, TALL = picture(40, 90), picture(96, 30)
N_WIDE, N_TALL, N_SQUARE = 60, 56, 64       # soft tokens within a budget of 70


@pytest.fixture(scope="module")
def gemma4():
    return MediaPrompts(Spec(TOWER), tokenizer(), PictureProcessor(TOWER))


@pytest.fixture(scope="module")
def gemma3():
    return MediaPrompts(Spec(SQUARE, video=None), tokenizer(), PictureProcessor(SQUARE))


@pytest.fixture(scope="module")
def wordless():
    """The same as gemma4, of a checkpoint without tokenizer files."""
    return MediaPrompts(Spec(TOWER), None, PictureProcessor(TOWER))


def prompt(content, *images, videos=(), image_tokens=70, **fields):
    return Prompt(content, images, tuple(videos), image_tokens, **fields)


def run(n, token=IMAGE):
    return [BOI, *[token] * n, EOI]


def where(runs):
    return [(media.begin, media.picture.n_tokens) for media in runs]


def starts(ids):
    """Positions right behind every begin-of-image."""
    return [i + 1 for i, token in enumerate(ids) if token == BOI]


# --- what is expanded, and to what

def test_a_picture_in_a_text(gemma4):
    ids, runs = gemma4.ids(prompt("what is <|image|>?", WIDE))
    assert ids == [BOS, *spell("what is "), *run(N_WIDE), *spell("?")]
    assert runs == [MediaRun(10, gemma4.processor.image(WIDE, 70))]


def test_several_pictures_in_their_order(gemma4):
    for sources in ((WIDE, picture(50, 50), TALL), (Image(WIDE), Image(picture(50, 50)), TALL)):
        ids, runs = gemma4.ids(prompt("<|image|><|image|>and <|image|>", *sources))
        assert ids == [BOS, *run(N_WIDE), *run(N_SQUARE), *spell("and "), *run(N_TALL)]
        assert where(runs) == list(zip(starts(ids), (N_WIDE, N_SQUARE, N_TALL), strict=True))
        assert [media.picture.pixels.shape[:2] for media in runs] == [(60, 144), (96, 96), (168, 48)]


def test_one_id_becomes_a_picture_with_its_borders(gemma4, wordless):
    text = gemma4.ids(prompt("<|image|>a<|image|>", WIDE, TALL))
    a, = spell("a")
    for one in (gemma4, wordless):
        for ids in ([BOS, IMAGE, a, IMAGE], [BOS, BOI, IMAGE, EOI, a, BOI, IMAGE, EOI],
                    [BOS, BOI, IMAGE, a, IMAGE, EOI], np.array([BOS, IMAGE, a, IMAGE])):
            assert one.ids(prompt(ids, WIDE, TALL)) == text
        ids, runs = one.ids(prompt([IMAGE, IMAGE], WIDE, TALL))
        assert ids == run(N_WIDE) + run(N_TALL)
        assert where(runs) == [(1, N_WIDE), (N_WIDE + 3, N_TALL)]


def test_a_whole_run_stays_as_it_is(gemma4, wordless):
    for one in (gemma4, wordless):
        for ids in ([9, *run(N_WIDE), 9, *run(N_TALL)], [9, *[IMAGE] * N_WIDE, 9, *[IMAGE] * N_TALL]):
            got, runs = one.ids(prompt(ids, WIDE, TALL))
            assert got == ids
            assert where(runs) == [(ids.index(IMAGE), N_WIDE), (len(ids) - (ids[-1] == EOI) - N_TALL, N_TALL)]
        mixed, runs = one.ids(prompt([9, *run(N_WIDE), 9, IMAGE], WIDE, TALL))
        assert (mixed, where(runs)) == ([9, *run(N_WIDE), 9, *run(N_TALL)], [(2, N_WIDE), (N_WIDE + 5, N_TALL)])


def test_a_video_in_a_text(gemma4):
    video = Video([WIDE, TALL, WIDE], timestamps=[0, 59.99, 3725.5])
    frames = [frame for _, frame in gemma4.processor.video(video)]
    assert [frame.n_tokens for frame in frames] == [N_WIDE] * 3          # of one size: the first one's
    times = ("00:00 ", " 00:59 ", " 62:05 ")
    written = [token for time in times for token in (*spell(time), *run(N_WIDE, VIDEO))]
    ids, runs = gemma4.ids(prompt("see <|video|>.", videos=[video]))
    assert ids == [BOS, *spell("see "), *written, *spell(".")]
    assert runs == [MediaRun(begin, frame) for begin, frame in zip(starts(ids), frames, strict=True)]


def test_frames_without_times_are_24_a_second(gemma4):
    video = [WIDE] * 25
    ids, runs = gemma4.ids(prompt("<|video|>", videos=[video]))
    assert len(runs) == 25
    tail = [*spell(" 00:01 "), *run(N_WIDE, VIDEO)]
    assert ids[-len(tail):] == tail


def test_a_video_among_ids(gemma4, wordless):
    video = Video([WIDE, TALL], fps=1)
    whole = [9, *spell("00:00 "), *run(N_WIDE, VIDEO), *spell(" 00:01 "), *run(N_WIDE, VIDEO), 9]
    frame_by_frame = [9, *spell("00:00 "), BOI, VIDEO, EOI, *spell(" 00:01 "), BOI, VIDEO, EOI, 9]
    for one, ids in ((gemma4, [9, VIDEO, 9]), (gemma4, frame_by_frame), (gemma4, whole), (wordless, whole),
                     (wordless, frame_by_frame)):
        got, runs = one.ids(prompt(ids, videos=[video]))
        assert got == whole
        assert where(runs) == [(start, N_WIDE) for start in starts(whole)]
    with pytest.raises(PromptError, match=r"video as one token needs a tokenizer.* run of tokens for each frame"):
        wordless.ids(prompt([9, VIDEO, 9], videos=[video]))


def test_videos_and_pictures_in_one_prompt(gemma4):
    first, second = Video([WIDE], fps=1), Video([TALL, TALL], fps=1)
    text, runs = gemma4.ids(prompt("<|video|><|image|><|video|>", WIDE, videos=[first, second]))
    assert where(runs) == [(start, n) for start, n in zip(starts(text), (N_WIDE, N_WIDE, N_TALL, N_TALL), strict=True)]
    assert [text[run.begin] for run in runs] == [VIDEO, IMAGE, VIDEO, VIDEO]
    assert gemma4.ids(prompt([BOS, VIDEO, IMAGE, VIDEO], WIDE, videos=[first, second])) == (text, runs)
    assert gemma4.ids(prompt(text, WIDE, videos=[first, second])) == (text, runs)
    adjacent, runs = gemma4.ids(prompt([VIDEO, VIDEO], videos=[first, second]))
    assert adjacent == spell("00:00 ") + run(N_WIDE, VIDEO) + spell("00:00 ") + run(N_TALL, VIDEO) \
        + spell(" 00:01 ") + run(N_TALL, VIDEO)


def test_gemma3_has_its_own_placeholder_and_blank_lines(gemma3):
    ids, runs = gemma3.ids(Prompt("a<boi>b<boi>", (WIDE, TALL)))
    assert ids == [BOS, *spell("a\n\n"), *run(4), *spell("\n\nb\n\n"), *run(4), *spell("\n\n")]
    assert where(runs) == [(start, 4) for start in starts(ids)]
    assert gemma3.ids(Prompt([BOS, IMAGE, 9], (WIDE,)))[0] == [BOS, *run(4), 9]


def test_budgets_of_the_request(gemma4):
    for budget, n in ((70, N_WIDE), (140, 119), (280, 275)):
        ids, runs = gemma4.ids(prompt([IMAGE], WIDE, image_tokens=budget))
        assert where(runs) == [(1, n)] and ids == run(n)
        _, runs = gemma4.ids(Prompt([VIDEO], videos=([WIDE],), video_tokens=budget))
        assert runs[0].picture.n_tokens == n
    assert gemma4.ids(Prompt([IMAGE], (WIDE,)))[1][0].picture.n_tokens == 275      # by default 280 and 70
    assert gemma4.ids(Prompt([VIDEO], videos=([WIDE],)))[1][0].picture.n_tokens == N_WIDE


def test_text_without_media_is_only_encoded(gemma4, gemma3):
    for one in (gemma4, gemma3, MediaPrompts(Spec(None), tokenizer(), None)):
        assert one.ids(Prompt("a b")) == ([BOS, *spell("a b")], [])
        assert one.ids(Prompt([9, 8])) == ([9, 8], [])
        assert one.ids(Prompt("<bos>a", is_rendered=True)) == ([BOS, *spell("a")], [])


# --- what is refused

REFUSED = {
    "an image too many": (prompt("a<|image|>", WIDE, TALL), r"1 image placeholder \(<\|image\|>\) for 2 images"),
    "a placeholder too many": (prompt("<|image|>a<|image|>", WIDE), "2 image placeholders .* for 1 image;"),
    "no placeholder": (prompt("what is this?", WIDE), r"0 image placeholders \(<\|image\|>\) for 1 image;"),
    "no image": (prompt("what is <|image|>?"), "1 image placeholder .* for 0 images"),
    "no video": (prompt("what is <|video|>?"), r"1 video placeholder \(<\|video\|>\) for 0 videos"),
    "a video too many": (prompt("a", videos=[[WIDE]]), "0 video placeholders .* for 1 video;"),
    "an image for a video": (prompt("<|video|>", WIDE), "0 image placeholders .* for 1 image;"),
    "ids: an image too many": (prompt([9, IMAGE], WIDE, TALL), r"1 image placeholder \(token 4\) for 2 images"),
    "ids: an id too many": (prompt([IMAGE, 9, IMAGE], WIDE), "2 image placeholders .* for 1 image;"),
    "ids: no image": (prompt([IMAGE, 9]), "1 image placeholder .* for 0 images"),
    "ids: no video": (prompt([VIDEO, 9]), r"1 video placeholder \(token 5\) for 0 videos"),
    "ids: no place for a video": (prompt([9], videos=[[WIDE]]), "0 video placeholders .* for 1 video;"),
    "ids: a frame too many": (prompt([*run(N_WIDE, VIDEO), *run(N_WIDE, VIDEO)], videos=[[WIDE]]),
                              r"2 video placeholders \(runs of token 5\) for 1 videos of 1 frames"),
    "ids: a frame too few": (prompt([*run(N_WIDE, VIDEO), *run(N_WIDE, VIDEO)], videos=[[WIDE] * 3]),
                             "2 video placeholders .* of 3 frames"),
    "a run too long": (prompt(run(66), WIDE), "image 0 takes 60 soft tokens, .* has 66; no budget of 70, 140, 280, "
                                              "560, 1120 gives 66"),
    "a run of another budget": (prompt([IMAGE, 9, *run(119)], TALL, WIDE), "image 1 takes 60 soft tokens, and its run "
                                "of placeholders in the prompt has 119; image_tokens=140 gives 119"),
    "a frame of another budget": (prompt(run(119, VIDEO), videos=[[WIDE]]), "video 0 takes 60 .* has 119; "
                                  "video_tokens=140 gives 119"),
    "two runs in one": (prompt([IMAGE] * (N_WIDE + N_TALL), WIDE, TALL), "1 image placeholder .* for 2 images"),
    "another budget": (prompt([IMAGE], WIDE, image_tokens=100), "image 0: image_tokens is 100, expected 70 or 140"),
    "another budget of frames": (Prompt([VIDEO], videos=([WIDE],), video_tokens="70"), "video 0: video_tokens is '70'"),
    "no such file": (prompt("<|image|> <|image|>", WIDE, "no/such.png"), "image 1: .*no/such.png.*no such file"),
    "no picture": (prompt([IMAGE], b"abc"), "image 0: .*3 bytes"),
    "no frames": (prompt([VIDEO], videos=[[]]), "video 0: "),
    "a bad frame": (prompt([VIDEO], videos=[[WIDE, b"abc"]]), "video 0: .*3 bytes"),
    "empty": (prompt(""), "the prompt is empty"), "no ids": (prompt([]), "the prompt is empty"),
    "an id outside": (prompt([IMAGE, VOCAB], WIDE), "token 1 .* outside the vocabulary"),
    "no prompt": (prompt(None, WIDE), "NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(gemma4, case):
    bad, message = REFUSED[case]
    with pytest.raises(PromptError, match=message) as caught:
        gemma4.ids(bad)
    assert "\n" not in str(caught.value)


def test_the_origin_of_a_prompt_is_named(gemma4):
    with pytest.raises(PromptError, match="what the template wrote has 0 image placeholders"):
        gemma4.ids(prompt("<bos>a", WIDE, origin="what the template wrote", is_rendered=True))


def test_gemma3_takes_no_videos_and_no_spelled_out_pictures(gemma3):
    with pytest.raises(PromptError, match="videos came with the prompt, and the model takes none; pass frames as im"):
        gemma3.ids(Prompt("<|video|>", videos=([WIDE],)))
    for content, sources in (("a<boi><|image|>", (WIDE,)), ("<|image|>", ()), ([BOI, IMAGE, EOI], ())):
        with pytest.raises(PromptError, match="image placeholder"):
            gemma3.ids(Prompt(content, sources))
    with pytest.raises(PromptError, match=r"1 image placeholder \(<boi>\) for 0 images"):
        gemma3.ids(Prompt("a<boi>"))
    with pytest.raises(PromptError, match=r"has 5; no budget of 4 gives 5"):
        gemma3.ids(Prompt(run(5), (WIDE,)))


def test_a_model_without_sight_says_why():
    blind = MediaPrompts(Spec(None), tokenizer(), None, "the checkpoint has no vision tensors")
    for bad in (prompt("<|image|>", WIDE), prompt([IMAGE], WIDE), prompt("a", videos=[[WIDE]])):
        with pytest.raises(PromptError, match="images and videos came with the prompt, and the checkpoint has no"):
            blind.ids(bad)


def test_a_tokenizer_without_the_tokens(wordless):
    with pytest.raises(PromptError, match="no tokenizer files"):
        wordless.ids(prompt("<|image|>", WIDE))
    few = Spec(TOWER)
    for token, message in (("image_token", "no token 99, which stands for a image in a text; pass token ids"),
                           ("end_image", "no token 99, which a picture in a text needs; pass token ids")):
        few.media = replace(Spec(TOWER).media, **{token: 99})
        with pytest.raises(PromptError, match=message):
            MediaPrompts(few, tokenizer(), PictureProcessor(TOWER)).ids(prompt("<|image|>", WIDE))


# --- how a caller writes it

def test_prompt_dicts():
    assert as_prompt("a") == Prompt("a") and as_prompt([1, 2]) == Prompt([1, 2])
    got = as_prompt({"prompt": "a", "images": [WIDE], "videos": ("b.mp4",), "image_tokens": 140, "video_tokens": 70})
    assert (got.content, got.images[0] is WIDE, got.videos) == ("a", True, ("b.mp4",))
    assert (got.image_tokens, got.video_tokens) == (140, 70)
    assert as_prompt({"token_ids": [1], "images": None, "videos": []}) == Prompt([1])
    for bad, message in (({"prompt": "a", "images": "cat.png"}, "images is of type str, expected a list of images"),
                         ({"prompt": "a", "videos": Video([WIDE])}, "videos is of type Video, expected a list of "),
                         ({"prompt": "a", "images": WIDE}, "images is of type ndarray"),
                         ({"prompt": "a", "image": [WIDE]}, "'image', expected prompt, token_ids, images, videos, "
                                                            "image_tokens")):
        with pytest.raises(PromptError, match=message):
            as_prompt(bad)


def test_rows_of_media():
    assert media_rows(None, "images", 2) == [(), ()]
    assert media_rows([["a"], None], "images", 2) == [("a",), ()]
    with pytest.raises(PromptError, match="images has 1 entries for 2 rows"):
        media_rows([["a"]], "images", 2)
    with pytest.raises(PromptError, match=r"images\[1\] is of type str, expected a list of images$"):
        media_rows([None, "a"], "images", 2)


def test_messages_keep_the_type_of_a_part():
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": ({"type": "video", "video": "d.mp4"}, {"type": "image", "image": WIDE})}]
    before = json.dumps(messages, default=str)
    plain, images, videos = without_media(messages)
    assert plain == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}, messages[1],
                     {"role": "user", "content": [{"type": "video"}, {"type": "image"}]}]
    assert images[0] == "a.png" and images[1] is WIDE and videos == ("d.mp4",)
    assert json.dumps(messages, default=str) == before


@pytest.mark.parametrize("part, message", [
    ({"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}, "'image_url', expected text, image or video; "
                                                                         'write {"type": "image", "image": a path'),
    ({"type": "video_url", "video_url": {"url": "b"}}, 'write {"type": "video", "video": a path'),
    ({"type": "audio", "audio": "a.wav"}, "'audio', expected text, image or video$"),
    ({"type": "image", "url": "b.png"}, "'image' with 'url', expected .*\"image\": a path"),
    ({"type": "image"}, "'image' with nothing else"), ({"type": "video", "video": None}, "'video' with nothing else"),
])
def test_parts_that_are_refused(part, message):
    with pytest.raises(PromptError, match=message):
        without_media([{"role": "user", "content": [part]}])


def test_a_picture_larger_than_any_sequence():
    class Wide:
        n_tokens = 280

    check_length(300, 300, media=[MediaRun(3, Wide)])
    with pytest.raises(PromptError, match="the prompt has 300 tokens, 280 of them a single picture, at most 96 fit; "
                                          "ask for fewer image_tokens") as caught:
        check_length(300, 96, media=[MediaRun(3, Wide)])
    assert (caught.value.n_tokens, caught.value.limit) == (300, 96)
    with pytest.raises(PromptError, match="the prompt has 300 tokens, at most 299 fit; shorten it"):
        check_length(300, 299, media=[MediaRun(3, Wide)])
