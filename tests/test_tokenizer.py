"""loaders/tokenizer.py: text to ids and back; pieces of a stream never split a character and add up to the text."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from loaders.errors import CheckpointError, PromptError
from loaders.tokenizer import BYTE_OF_CHAR, Detokenizer, Tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def gemma_like():
    """BPE with byte_fallback: a vocabulary of 4 special tokens, 256 bytes, some characters and a few merges."""
    chars = [*"▁abcdefghijklmnopqrstuvwxyz.,!?ABC0123\n", "é", "日", "\ufffd"]
    merges = [("t", "h"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "é"),
              ("▁", "▁"), ("\n", "\n")]
    pieces = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *chars,
                            *(left + right for left, right in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_special_tokens(["<start_of_turn>"])
    backend.add_tokens(["<tool>"])
    return backend


def byte_level():
    """ByteLevel BPE, as Llama 4's: one visible character a byte, and merges that end inside a character."""
    spell = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    merges = [tuple(spell[byte] for byte in pair) for pair in (b"th", "é".encode(), "日".encode()[:2], b" t")]
    pieces = [*spell.values(), *(left + right for left, right in merges)]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|eot|>"])
    backend.add_tokens(["<日 tool>"])          # not spelled in byte characters
    return backend


def word_level(decoder, words=("▁the", "▁", "cat", "▁cat", "é", "<0xE9>", "<0x20>", "a")):
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    return backend


GEMMA, BYTES = Tokenizer(gemma_like(), {"bos_token": "<bos>"}, False), Tokenizer(byte_level(), {}, False)
BOTH = pytest.mark.parametrize("tokenizer", [GEMMA, BYTES], ids=["byte_fallback", "byte_level"])


def save(directory, backend=None, **files):
    """tokenizer.json, and further files given as name=value; returns the directory."""
    (backend or gemma_like()).save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def pieces_of(tokenizer, ids, chunk=1):
    """What a stream shows, piece by piece."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*pieces, detokenizer.finish()]


# --- streams

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("the cat é日😀👩‍👩‍👧\ufffd▁\n "),
                max_size=30)


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, chunk=st.integers(1, 5))
@example(text="  the cat", chunk=1)
@example(text="日\ufffd\ufffd😀", chunk=1)
@example(text="👩‍👩‍👧", chunk=2)
@example(text="<eos>the<bos>", chunk=1)
def test_pieces_add_up_to_the_text(tokenizer, text, chunk):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids, chunk)
    assert "".join(pieces) == tokenizer._backend.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    for piece in pieces[:-1]:
        assert text.count("\ufffd") or "\ufffd" not in piece        # half a character would show as U+FFFD
    assert pieces[-1] == ""                                         # nothing of a whole text is held back


@BOTH
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(tokenizer, data):
    """Whatever a model with random weights writes: pieces, chunks and `decode` agree, and agree with `tokenizers`
    wherever that does not give up a run of bytes because of one of them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=20))
    whole = tokenizer.decode(ids)
    assert "".join(pieces_of(tokenizer, ids)) == "".join(pieces_of(tokenizer, ids, 3)) == whole
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=True)
    assert whole == theirs or (tokenizer is GEMMA and "\ufffd" in theirs)


@BOTH
def test_a_character_comes_when_its_last_byte_does(tokenizer):
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


@BOTH
def test_complete_characters_do_not_wait_for_the_rest(tokenizer):
    """A run of bytes with an unfinished tail: `tokenizers` shows only U+FFFD for such a run."""
    ids = tokenizer.encode("ûý😀", add_special_tokens=False)
    assert pieces_of(tokenizer, ids[:-1]) == ["", "û", "", "ý", "", "", "", "\ufffd" * (3 if tokenizer is GEMMA else 1)]


def test_stray_bytes_are_shown_once_known_to_be_stray():
    ids = [GEMMA.token_id(piece) for piece in ("<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "▁cat", "<0x80>", "a", "<0xF0>")]
    assert pieces_of(GEMMA, ids) == ["", "é", "", "", "\ufffd\ufffd cat", "\ufffd", "a", "", "\ufffd"]
    assert GEMMA.decode(ids[2:]) == GEMMA._backend.decode(ids[2:])      # nothing good in the run: as the library


@BOTH
def test_a_written_replacement_character_is_text(tokenizer):
    ids = tokenizer.encode("\ufffda\ufffd", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == "\ufffda\ufffd"
    assert pieces_of(tokenizer, ids)[-1] == ""


def test_special_tokens_are_skipped_unless_wanted():
    ids = GEMMA.encode("<start_of_turn>the<tool> cat<eos>")
    assert GEMMA.decode(ids) == "the<tool> cat"
    assert GEMMA.decode(ids, skip_special_tokens=False) == "<bos><start_of_turn>the<tool> cat<eos>"
    assert Detokenizer(GEMMA, skip_special_tokens=False).add(ids[:1]) == "<bos>"


def test_special_tokens_do_not_end_a_character():
    first, second = (GEMMA.token_id(piece) for piece in ("<0xC3>", "<0xBB>"))
    assert pieces_of(GEMMA, [first, GEMMA.token_id("<eos>"), second]) == ["", "", "û", ""]


def test_ids_outside_the_vocabulary_show_nothing():
    """A model's embedding is often padded beyond the tokenizer's last id."""
    assert GEMMA.decode([10**6, GEMMA.token_id("cat"), GEMMA.n_vocab]) == "cat"


def test_finish_begins_a_new_text():
    detokenizer = Detokenizer(GEMMA)
    assert detokenizer.add([GEMMA.token_id("<0xC3>")]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.add([GEMMA.token_id("cat")]) == "cat"


DECODERS = {
    "gemma": gemma_like().decoder,
    "llama2": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace, first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "none": None,
    "fuse": decoders.Fuse(),
}


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 7]), max_size=8))        # all but the stray byte 5
def test_spaces_between_tokens_are_kept_by_every_decoder(kind, ids):
    tokenizer = Tokenizer(word_level(DECODERS[kind]), {}, False)
    expected = tokenizer._backend.decode(ids)
    assert "".join(pieces_of(tokenizer, ids)) == expected
    assert tokenizer.decode(ids) == expected                # a second text begins like the first


@pytest.mark.parametrize("decoder", [
    decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC(), decoders.Strip(" ", 1, 0),
    decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
    decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    decoders.Sequence([decoders.ByteLevel()]),
], ids=str)
def test_decoders_unknown_here_are_refused_by_name(tmp_path, decoder):
    save(tmp_path, word_level(decoder))
    with pytest.raises(CheckpointError, match=r'tokenizer\.json: decoder step \d is \{"type": ".*expected ByteLevel'):
        Tokenizer.load(tmp_path)


def test_each_token_is_decoded_once():
    """Work per token does not grow with the text: the backend is asked once for each distinct id."""
    class Counting:
        n_calls = 0

        def id_to_token(self, token_id):
            self.n_calls += 1
            return GEMMA._backend.id_to_token(token_id)

    tokenizer = Tokenizer(gemma_like(), {}, False)
    tokenizer._backend = counting = Counting()
    ids = list(range(4, 14)) * 1000
    pieces_of(tokenizer, ids)
    assert counting.n_calls <= 11           # ten ids, and once more for the first token of the text


# --- encoding

def test_encode_adds_bos_where_the_file_says_so(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path))
    cat = tokenizer.token_id("cat")
    assert tokenizer.encode("cat") == [2, cat]
    assert tokenizer.encode("cat", add_special_tokens=False) == [cat]
    assert tokenizer.encode("<bos>cat", add_special_tokens=False) == [2, cat]
    assert tokenizer.encode("") == [2]


def test_add_bos_token_of_the_config(tmp_path):
    """Only where the encoding has none yet, and not where the caller asks for none."""
    backend = gemma_like()
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    config = {"bos_token": "<bos>", "add_bos_token": True}
    tokenizer = Tokenizer.load(save(tmp_path, backend, tokenizer_config=config))
    cat = tokenizer.token_id("cat")
    assert tokenizer.encode("cat") == tokenizer.encode("<bos>cat") == [2, cat]
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("cat", add_special_tokens=False) == [cat]
    save(tmp_path, backend, tokenizer_config={**config, "add_bos_token": False})
    assert Tokenizer.load(tmp_path).encode("cat") == [cat]
    save(tmp_path, backend, tokenizer_config={**config, "bos_token": "<s>"})
    with pytest.raises(CheckpointError, match="add_bos_token is true, and the vocabulary has no bos_token '<s>'"):
        Tokenizer.load(tmp_path)


def test_a_file_does_not_cut_or_pad_prompts(tmp_path):
    backend = gemma_like()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(Tokenizer.load(save(tmp_path, backend)).encode("abcdefgh")) == 9


@pytest.mark.parametrize(("text", "expected"), [
    (None, "prompt is NoneType, expected str"), (b"cat", "prompt is bytes, expected str"),
    ("ab\ud83d", r"half a surrogate pair, U\+D83D, at character 2"), ("\udc00", r"U\+DC00, at character 0"),
])
def test_what_is_not_text(text, expected):
    with pytest.raises(PromptError, match=expected):
        GEMMA.encode(text)


# --- files

def test_no_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model and no tokenizer\.json; make one with transform"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_broken_files_are_named(tmp_path, name, text):
    save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(tmp_path)


def test_json_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: "):
        Tokenizer.load(tmp_path)


def test_special_tokens_for_templates(tmp_path):
    config = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>", "pad_token": None,
              "boi_token": "<img>", "add_bos_token": False, "add_eos_token": None, "model_max_length": 9,
              "extra_special_tokens": {"audio_token": "<audio>"}}
    more = {"unk_token": {"content": "<unk>"}, "eos_token": "</s>", "additional_special_tokens": ["<x>"]}
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=config, special_tokens_map=more))
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                                        "boi_token": "<img>", "audio_token": "<audio>"}
    assert tokenizer.token_id("<eos>") == 1
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.n_vocab == gemma_like().get_vocab_size()


@pytest.mark.parametrize("value", [7, ["<bos>"], {"content": None}])
def test_special_token_of_the_wrong_type(tmp_path, value):
    save(tmp_path, tokenizer_config={"bos_token": value})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: bos_token is .*expected a string"):
        Tokenizer.load(tmp_path)
