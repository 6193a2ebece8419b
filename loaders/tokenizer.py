"""Text ↔ token ids, and ids → text while they are still coming, without ever splitting a character."""

import codecs
import json
import re
from pathlib import Path

from loaders.errors import CheckpointError, PromptError
from loaders.json_file import read_json

BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")         # how a byte_fallback vocabulary spells a byte
# ByteLevel spells each byte as one visible character: itself where Latin-1 prints it, else the next one from U+0100
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_OF_CHAR = {**{chr(byte): byte for byte in _VISIBLE}, **{chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}}

# how a stray byte is shown: bytes of a byte_fallback vocabulary one by one, as its own decoder does
codecs.register_error("replace_each", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """A checkpoint's tokenizer.json, with the special tokens that its config names.

    special_tokens  {"bos_token": "<bos>", ...}: the names a chat template may use
    n_vocab         number of tokens, added ones included
    """

    def __init__(self, backend, special_tokens, add_bos, source="tokenizer.json"):
        """backend: a tokenizers.Tokenizer; add_bos: put bos_token before a text whose encoding lacks it."""
        backend.no_truncation()         # the file may ask for both; either would change a prompt in silence
        backend.no_padding()
        self.special_tokens = special_tokens
        self.n_vocab = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        self._bos_id = self.token_id(special_tokens.get("bos_token", "")) if add_bos else None
        if add_bos and self._bos_id is None:
            raise CheckpointError(f"{source}: add_bos_token is true, and the vocabulary has no bos_token "
                                  f"{special_tokens.get('bos_token')!r}")
        self._special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._piece_bytes, self._errors = _piece_decoder(decoder, source)
        self._known_bytes = {}          # {id: bytes}, of the ids met so far

    @classmethod
    def load(cls, directory):
        """The tokenizer of a checkpoint directory, or None where it has no tokenizer files. Raises CheckpointError."""
        directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            if (directory / "tokenizer.model").is_file():
                raise CheckpointError(f"{directory}: has tokenizer.model and no tokenizer.json; make one with "
                                      "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)")
            return None
        from tokenizers import Tokenizer as Backend
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:      # the library raises bare Exceptions
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
        special_tokens, add_bos = {}, False
        for name in ("special_tokens_map.json", "tokenizer_config.json"):       # the second one overrules
            if (directory / name).is_file():
                config = read_json(directory / name)
                special_tokens.update(_special_tokens(config, directory / name))
                add_bos = add_bos or config.get("add_bos_token") is True
        return cls(backend, special_tokens, add_bos, file)

    def encode(self, text, add_special_tokens=True):
        """The ids of a text, <bos> in front where the checkpoint wants it. Raises PromptError for what is not text."""
        if not isinstance(text, str):
            raise PromptError(f"prompt is {type(text).__name__}, expected str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"prompt has half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
                              f"{error.start}; expected whole characters") from error
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def decode(self, ids, skip_special_tokens=True):
        """The text of ids: exactly what a Detokenizer's pieces add up to."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.add(ids) + detokenizer.finish()

    def token_id(self, text):
        """The id of the token spelled `text`, or None."""
        return self._backend.token_to_id(text)

    def special_text(self, token_id):
        """How a special token is spelled, or None where there is no such token. From now on that spelling is this token
        wherever it stands in a text: some files have <|video|> as an ordinary piece of their vocabulary."""
        text = self._backend.id_to_token(token_id)
        if text is not None and token_id not in self._special_ids:
            self._backend.add_special_tokens([text])
            self._special_ids.add(token_id)
        return text

    def _token_bytes(self, token_id, is_first):
        """UTF-8 of one token, where it may begin or end inside a character; None for an id outside the vocabulary."""
        if token_id in self._known_bytes and not is_first:
            return self._known_bytes[token_id]
        piece = self._backend.id_to_token(token_id)
        data = None if piece is None else self._piece_bytes(piece, is_first)
        if not is_first:
            self._known_bytes[token_id] = data
        return data


class Detokenizer:
    """Ids → text, a few at a time, in time proportional to their number.

    Each token is bytes, and one UTF-8 decoder holds back those that do not make a character yet. Bytes that never make
    one come out as U+FFFD, at the latest in `finish`.

    It shows what `tokenizers` shows for the whole list, with one difference: where a byte_fallback run holds a stray
    byte, that library gives up the whole run, and this keeps the run's good characters, which may be on screen already.
    """

    def __init__(self, tokenizer, skip_special_tokens=True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        self._is_first = True           # some vocabularies drop the space before the first token

    def add(self, token_ids):
        """The text that these ids complete; may be empty."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._skipped:
                continue
            data = self._tokenizer._token_bytes(token_id, self._is_first)
            if data is not None:
                pieces.append(data)
                self._is_first = False
        return self._utf8.decode(b"".join(pieces))

    def finish(self):
        """The text of what was held back; the next `add` begins a new text."""
        self._is_first = True
        return self._utf8.decode(b"", final=True)


def _piece_decoder(decoder, source):
    """(function (piece, is_first) -> bytes, name of the UTF-8 error handler) for the `decoder` of a tokenizer.json.

    Each kind acts as its namesake in `tokenizers` (docs, "Decoders"). Raises CheckpointError for a kind unknown here.
    """
    if decoder is None:
        return lambda piece, is_first: (piece if is_first else " " + piece).encode(), "replace"
    if decoder["type"] == "ByteLevel":
        return lambda piece, is_first: _byte_level(piece), "replace"
    replaced, dropped, stripped, has_byte_pieces = [], "", "", False
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for i, step in enumerate(steps):
        kind, is_fused = step["type"], any(before["type"] == "Fuse" for before in steps[:i])
        if kind == "Replace" and "String" in step["pattern"] and not (is_fused or has_byte_pieces):
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not is_fused:
            replaced.append((step["replacement"], " "))
            dropped = "" if step["prepend_scheme"] == "never" else step["replacement"]
        elif kind == "ByteFallback" and not is_fused:
            has_byte_pieces = True
        elif kind == "Strip" and is_fused and step["start"] == 1 and step["stop"] == 0:
            stripped = step["content"]
        elif kind != "Fuse":
            raise CheckpointError(f"{source}: decoder step {i} is {json.dumps(step, ensure_ascii=False)}, "
                                  "expected ByteLevel, Metaspace, or Replace, ByteFallback, Fuse, Strip in this order")

    def piece_bytes(piece, is_first):
        if is_first and dropped:
            piece = piece.replace(dropped, "")
        for old, new in replaced:
            piece = piece.replace(old, new)
        byte = BYTE_PIECE.fullmatch(piece) if has_byte_pieces else None
        data = piece.encode() if byte is None else bytes([int(byte[1], 16)])
        return data.removeprefix(stripped.encode()) if is_first else data

    return piece_bytes, "replace_each" if has_byte_pieces else "replace"


def _byte_level(piece):
    try:
        return bytes([BYTE_OF_CHAR[char] for char in piece])
    except KeyError:                    # an added token, spelled as it reads
        return piece.encode()


def _special_tokens(config, file):
    """{name: text} of every `..._token` that a config names, as a string or as {"content": string}."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named.update(extra)
    found = {}
    for key, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
        elif value is not None and key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            raise CheckpointError(f"{file}: {key} is {value!r}, expected a string or {{'content': string}}")
    return found
