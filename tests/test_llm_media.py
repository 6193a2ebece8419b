"""The public interface with pictures: text, dicts and conversations, streams, errors, and the command line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image as Pillow
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers

from engine import LLM, Image, PromptError, SamplingParams, Video
from engine.cli import main
from tests import tiny_models as tiny
from tests.golden import GOLDENS
from tests.tiny_models import greedy

# Of the golden checkpoints: vocabulary, and the ids that stand for and around pictures.
IDS = {"gemma4-vision": (384, {368: "<|image>", 370: "<|image|>", 372: "<image|>", 374: "<|video|>"}),
       "gemma3-vision": (512, {490: "<start_of_image>", 491: "<end_of_image>", 498: "<image_soft_token>"})}
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<turn>{{ message.role }} "
            "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
            "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}<|video|>{% else %}{{ part.text }}"
            "{% endif %}{% endfor %}{% endif %}{% endfor %}<turn>model ")
RED, BLUE = (np.full((40, 60, 3), colour, np.uint8) for colour in ((200, 10, 10), (10, 10, 200)))
GREEDY = greedy(max_tokens=4)


def write(directory, case, template=TEMPLATE):
    """The checkpoint of a golden, with a tokenizer of letters and a chat template, in `directory`; returns it."""
    shutil.copytree(GOLDENS / case / "checkpoint", directory)
    vocab, specials = IDS[case]
    chars = "▁abcdefghijklmnopqrstuvwxyz0123456789.:?\n"
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", *chars, "\n\n"]
    pieces += [f"<other{i}>" for i in range(len(pieces), vocab)]
    for i, text in specials.items():
        pieces[i] = text
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("\n", "\n")], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens([*pieces[:5], *(text for text in specials.values() if text != "<|video|>")])
    backend.save(str(directory / "tokenizer.json"))
    placeholder = "<start_of_image>" if case == "gemma3-vision" else "<|image|>"
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<bos>", "add_bos_token": True, "chat_template": template.replace("IMAGE", placeholder)}))
    return directory


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    return tiny.open_llm(write(tmp_path_factory.mktemp("media") / "gemma4", "gemma4-vision"), max_seq_len=256)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return tiny.open_llm(write(tmp_path_factory.mktemp("media") / "gemma3", "gemma3-vision"), max_seq_len=256)


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """A file with the picture RED."""
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Pillow.fromarray(RED).save(path)
    return path


def ask(*parts):
    """A conversation of one message; a str is a part of text."""
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part
                                         for part in parts]}]


def image(source):
    return {"type": "image", "image": source}


def test_every_form_of_one_picture(gemma4, red):
    expected = gemma4.generate({"prompt": "what is <|image|>?", "images": [RED]}, GREEDY)
    assert len(expected.token_ids) == 4 and len(expected.prompt_token_ids) == 1 + 8 + 62 + 1
    for source in (red, str(red), red.read_bytes(), Pillow.open(red), Image(red), Image(RED)):
        output = gemma4.generate({"prompt": "what is <|image|>?", "images": [source]}, GREEDY)
        assert (output.token_ids, output.prompt_token_ids) == (expected.token_ids, expected.prompt_token_ids)
    again = gemma4.generate({"token_ids": expected.prompt_token_ids, "images": [RED]}, GREEDY)
    assert again.token_ids == expected.token_ids and again.metrics.n_prompt_tokens == len(expected.prompt_token_ids)
    pieces = list(gemma4.stream({"prompt": "what is <|image|>?", "images": [RED]}, GREEDY))
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids


def test_another_picture_gives_another_answer(gemma4, gemma3):
    for llm, text in ((gemma4, "what is <|image|>?"), (gemma3, "what is <start_of_image>?")):
        prompts = [{"prompt": text, "images": [source]} for source in (RED, BLUE)]
        ids = [output.prompt_token_ids for output in llm.generate(prompts, GREEDY)]
        first, second = llm.forward(ids, images=[[RED], [BLUE]]).logits
        assert np.abs(first - second).max() > 0.01 * np.abs(first).max()


def test_chat_is_generate_of_what_the_template_writes(gemma4, gemma3):
    video = Video([RED, BLUE], fps=1)
    messages = ask("see ", image(RED), " and ", {"type": "video", "video": video}, "?")
    text = "<turn>user see <|image|> and <|video|>?<turn>model "
    expected = gemma4.generate({"prompt": text, "images": [RED], "videos": [video], "video_tokens": 70}, GREEDY)
    for output in (gemma4.chat(messages, GREEDY), gemma4.chat([messages], GREEDY)[0],
                   gemma4.chat(messages, GREEDY, image_tokens=70, video_tokens=70)):
        assert output.prompt_token_ids == expected.prompt_token_ids == gemma4.chat_prompt(messages)
        assert output.token_ids == expected.token_ids
    pieces = list(gemma4.stream_chat(messages, GREEDY))
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    expected = gemma3.generate({"prompt": "<turn>user <start_of_image>?<turn>model ", "images": [RED]}, GREEDY)
    assert gemma3.chat(ask(image(RED), "?"), GREEDY).prompt_token_ids == expected.prompt_token_ids
    ids, blank = expected.prompt_token_ids, gemma3.tokenizer.token_id("\n\n")
    assert [ids[ids.index(490) - 1], ids[ids.index(491) + 1]] == [blank, blank] and ids.count(498) == 16


def test_budgets(gemma4):
    short, long = (len(gemma4.chat_prompt(ask(image(RED), "?"), image_tokens=n)) for n in (70, 140))
    assert (short, long) == (len(gemma4.chat_prompt(ask(image(RED), "?"))), short + 126 - 60)
    output = gemma4.generate({"prompt": "<|image|>", "images": [RED], "image_tokens": 140}, GREEDY)
    assert output.prompt_token_ids.count(370) == 126
    output = gemma4.generate({"prompt": "<|video|>", "videos": [[RED]], "video_tokens": 140}, GREEDY)
    assert output.prompt_token_ids.count(374) == 126
    assert gemma4.forward([[370]], images=[[RED]], image_tokens=140, return_logits="all").logits[0].shape[0] == 128


def test_a_bad_picture_errs_in_its_place(gemma4):
    good = {"prompt": "what is <|image|>?", "images": [RED]}
    bad = [{"prompt": "<|image|>", "images": [b"no picture"]}, {"prompt": "<|image|>"}, "what is <|image|>?",
           {"prompt": "what?", "images": [RED]}, {"prompt": "<|image|>", "images": [RED], "image_tokens": 71},
           {"prompt": "<|image|>", "images": [RED], "image_tokens": 280}, {"prompt": "<|image|>", "images": RED}]
    outputs = gemma4.generate([good, *bad, "what?"], GREEDY)
    assert [output.finish_reason for output in outputs] == ["length", *["error"] * len(bad), "length"]
    assert outputs[0].token_ids == gemma4.generate(good, GREEDY).token_ids
    said = [str(output.error) for output in outputs[1:-1]]
    for message, words in zip(said, ("image 0: ", "1 image placeholder", "1 image placeholder", "0 image placeholders",
                                     "image_tokens is 71", "of them a single picture, at most 255 fit",
                                     "images is of type ndarray"), strict=True):
        assert words in message and "\n" not in message
    for prompt in bad:
        with pytest.raises(PromptError):
            gemma4.generate(prompt, GREEDY)
        with pytest.raises(PromptError):
            gemma4.stream(prompt, GREEDY)
    assert gemma4.stats()["encoder_cache"]["held_pictures"] == 0


def test_conversations_that_are_refused(gemma4, tmp_path):
    hint = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    for messages, words in ((ask(hint), 'write {"type": "image", "image":'), (ask(image("https://a.org/b.png")), "URL"),
                            (ask({"type": "image", "url": "b.png"}), "'url'"),
                            (ask(image(RED), "<|image|>"), "2 image placeholders"),
                            ([{"role": "user", "content": "what is <|image|>?"}], "for 0 images")):
        with pytest.raises(PromptError, match=words):
            gemma4.chat(messages, GREEDY)
        bad, good = gemma4.chat([messages, ask("what?")], GREEDY)
        assert bad.finish_reason == "error" and good.finish_reason == "length"
    blind = tiny.open_llm(write(tmp_path / "blind", "gemma4-vision", tiny.TEMPLATE), max_seq_len=256)
    with pytest.raises(PromptError, match="conversation as its template writes it has 0 image placeholders"):
        blind.chat(ask(image(RED), "what?"), GREEDY)


@pytest.mark.parametrize("case", IDS)
def test_a_checkpoint_without_vision_tensors_says_so(case, tmp_path):
    path = write(tmp_path / "text", case)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "language_model" in name}, path / "model.safetensors")
    llm = tiny.open_llm(path)
    assert llm.spec.media is None and "encoder_cache" not in llm.stats() and "vision" not in llm.explain()
    for call in (lambda: llm.forward([[5, 6]], images=[[RED]]), lambda: llm.chat(ask(image(RED), "?"), GREEDY)):
        with pytest.raises(PromptError, match=r"images and videos came .* and the checkpoint has no vision tensors"):
            call()
    assert llm.chat(ask("what?"), GREEDY).finish_reason == "length"


def test_rows_of_forward(gemma4):
    ids = [5, 370, 6]
    rows = gemma4.forward([ids, [5, 6], ids], images=[[RED], None, [BLUE]], return_logits="all").logits
    assert [len(row) for row in rows] == [64, 2, 64]
    np.testing.assert_allclose(rows[1], gemma4.forward([[5, 6]], return_logits="all").logits[0], atol=1e-4)
    for arguments, words in (({"images": [[RED]]}, "images has 1 entries for 2 rows"),
                             ({"images": [[RED], RED]}, r"images\[1\] is of type ndarray"),
                             ({"images": [[RED], [RED]]}, "0 image placeholders"),
                             ({"videos": [None, [[RED]]], "images": [[RED], None]}, "0 video placeholders")):
        with pytest.raises(PromptError, match=words):
            gemma4.forward([ids, [5, 6]], **arguments)


def test_threads_and_aborts_leave_no_picture_held(gemma4):
    stream = gemma4.stream({"prompt": "<|image|>", "images": [BLUE]}, SamplingParams(max_tokens=50, temperature=0))
    next(stream)
    assert gemma4.stats()["encoder_cache"]["held_pictures"] == 1
    stream.close()
    assert gemma4.stats()["encoder_cache"]["held_pictures"] == 0


def test_explain_tells_the_tower(gemma4, gemma3):
    told = gemma4.explain()
    for line in ("vision: tower of hidden 64, 3 layers, 4 heads of 16, patches of 4 x 4 pixels",
                 "  a picture takes at most 70 soft tokens (image_tokens: also 140, 280, 560, 1120), a video 32 frames "
                 "of at most 70",
                 "  a picture is seen causally, and split between steps as text is", "  encoder cache: "):
        assert "\n" + line in told
    told = gemma3.explain()
    for line in ("vision: SigLIP tower of hidden 72, 3 layers, 3 heads of 24, patches of 14 x 14 pixels",
                 "  a picture takes at most 16 soft tokens; no videos",
                 "  a picture is computed whole in one step, which grows past max_batch_tokens for it"):
        assert "\n" + line in told
    assert "of 32, a picture's tokens see its later ones; dense" in told


# --- the command line

def test_the_command_line(gemma4, red, capsys):
    options = ["--device", "cpu", "--max-seq-len", "256", "--max-tokens", "4", "--temperature", "0"]
    model = str(gemma4.path)
    assert main(["generate", model, "--prompt", "<|image|>, <|image|>?", "--image", str(red), "--image", str(red),
                 "--image-tokens", "70", *options]) == 0
    assert "4 tokens for 1 prompts" in capsys.readouterr().out
    assert main(["chat", model, "--message", "what?", "--image", str(red), *options]) == 0
    answer = gemma4.chat(ask(image(RED), "what?"), greedy(max_tokens=4, ignore_eos=False)).text
    assert capsys.readouterr().out == answer + "\n"
    for arguments, words in ((["generate", model, "--prompt", "a", "--prompt", "b", "--image", str(red)], "2 came"),
                             (["chat", model, "--message", "a", "--image", "no/such.png"], "no such file"),
                             (["chat", model, "--message", "a", "--video", str(red)], "video 0: ")):
        assert main([*arguments, *options]) == 2
        captured = capsys.readouterr()
        assert words in captured.err + captured.out


def test_the_command_line_talks_on_after_a_picture(gemma4, red, capsys, monkeypatch):
    lines = iter(["what?", "and now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(gemma4.path), "--image", str(red), "--device", "cpu", "--max-seq-len", "256",
                 "--max-tokens", "3", "--temperature", "0"]) == 0
    first = gemma4.chat(ask(image(RED), "what?"), greedy(max_tokens=3, ignore_eos=False)).text
    said = [*ask(image(RED), "what?"), {"role": "assistant", "content": first}, {"role": "user", "content": "and now?"}]
    second = gemma4.chat(said, greedy(max_tokens=3, ignore_eos=False)).text
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_picture_seen_by_a_fresh_engine_is_the_same(gemma4):
    fresh = LLM(gemma4.path, device="cpu", max_seq_len=256, progress=False)
    prompt = {"prompt": "<|image|> a <|image|>", "images": [RED, RED]}
    assert fresh.generate(prompt, GREEDY).token_ids == gemma4.generate(prompt, GREEDY).token_ids
    counts = fresh.stats()["encoder_cache"]
    assert (counts["encoded_pictures"], counts["hits"], counts["lookups"]) == (1, 1, 2)
