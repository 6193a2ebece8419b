"""What a caller passes as prompts → Prompts, or a PromptError that says what is wrong; media_prompts goes on."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from numbers import Number

from engine.checks import is_int
from engine.errors import PromptError

KEYS = ("prompt", "token_ids", "images", "videos", "image_tokens", "video_tokens")
FORMS = "a str, a list of token ids, a dict with prompt or token_ids"
FOREIGN_PARTS = {"image_url": "image", "input_image": "image", "video_url": "video", "input_video": "video"}


@dataclass(frozen=True)
class Prompt:
    """One prompt: what it says, and the media that its placeholders stand for, in their order.

    content       text, or token ids as they came
    image_tokens  soft tokens a picture may take; video_tokens: a frame; None is the checkpoint's default
    origin        how errors call it; of a text that a template wrote, which brings its own begin-of-text token
    """

    content: object
    images: tuple = ()
    videos: tuple = ()
    image_tokens: int | None = None
    video_tokens: int | None = None
    origin: str = "the prompt"
    is_rendered: bool = False


def as_prompts(prompts):
    """A str or a dict as it is, anything else that can be iterated as a list. Raises PromptError."""
    return prompts if isinstance(prompts, (str, dict)) else as_list(prompts, "prompts", FORMS + ", or a list of those")


def is_single(prompts):
    """Whether what as_prompts returned is one prompt (text, a dict, a list of ids) and not a list of them.

    Any numbers are meant as ids: those that cannot be are an error of that one prompt.
    """
    return isinstance(prompts, (str, dict)) or (bool(prompts) and all(isinstance(i, Number) for i in prompts))


def as_prompt(prompt):
    """The Prompt that a caller means by a str, ids, or {"prompt" | "token_ids": ..., "images": [...], ...}. Raises
    PromptError; what its text, ids and media hold is looked at later."""
    if not isinstance(prompt, dict):
        return Prompt(prompt)
    if unknown := [key for key in prompt if key not in KEYS]:
        raise PromptError(f"a prompt dict has key {unknown[0]!r}, expected {', '.join(KEYS)}")
    given = [key for key in ("prompt", "token_ids") if prompt.get(key) is not None]
    if len(given) != 1:
        raise PromptError(f"a prompt dict has {' and '.join(given) or 'neither'}, expected prompt or token_ids")
    content = prompt[given[0]]
    if isinstance(content, str) != (given[0] == "prompt"):
        raise PromptError(f"{given[0]} is of type {type(content).__name__}, expected "
                          + ("a str" if given[0] == "prompt" else "a list of ids"))
    return Prompt(content, media_list(prompt.get("images"), "images"), media_list(prompt.get("videos"), "videos"),
                  prompt.get("image_tokens"), prompt.get("video_tokens"))


def media_list(sources, what):
    """`sources` as a tuple; None is an empty one. Raises PromptError for what is no list: a path, one picture."""
    if sources is None:
        return ()
    if not isinstance(sources, (list, tuple)):
        kind = what.partition("[")[0]
        raise PromptError(f"{what} is of type {type(sources).__name__}, expected a list of {kind}")
    return tuple(sources)


def media_rows(sources, what, n_rows):
    """For each of n_rows prompts the tuple of its media; None is no media at all. Raises PromptError."""
    rows = media_list(sources, what) or (None,) * n_rows
    if len(rows) != n_rows:
        raise PromptError(f"{what} has {len(rows)} entries for {n_rows} rows, expected a list or None for each")
    return [media_list(row, f"{what}[{i}]") for i, row in enumerate(rows)]


def without_media(messages):
    """(messages as a chat template reads them, images, videos): parts of type image and video keep only their type.
    Raises PromptError for parts of other types, which a template would drop in silence; ChatTemplate checks the rest.
    """
    found = {"image": [], "video": []}
    if not isinstance(messages, (list, tuple)):
        return messages, (), ()
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_plain_part(part, found) for part in content]}
        plain.append(message)
    return plain, tuple(found["image"]), tuple(found["video"])


def _plain_part(part, found):
    """The part as a template reads it; the picture or video of one that has it is added to `found`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind == "text":
        return part                                     # malformed ones are the template's business
    if kind not in found:
        hint = FOREIGN_PARTS.get(kind)
        raise PromptError(f"a message has a part of type {kind!r}, expected text, image or video"
                          + (f'; write {{"type": "{hint}", "{hint}": a path, bytes or an array}}' if hint else ""))
    if part.get(kind) is None or set(part) != {"type", kind}:
        others = ", ".join(repr(key) for key in part if key not in ("type", kind)) or "nothing else"
        raise PromptError(f"a message has a part of type {kind!r} with {others}, "
                          f'expected {{"type": "{kind}", "{kind}": a path, bytes or an array}}')
    found[kind].append(part[kind])
    return {"type": kind}


def checked_ids(ids, vocab):
    """`ids` as a list of Python ints, every one inside the vocabulary. Raises PromptError."""
    ids = as_list(ids, "the prompt", FORMS)
    if not ids:
        raise PromptError("the prompt is empty, expected at least one token", n_tokens=0)
    for i, token in enumerate(ids):
        if not is_int(token):
            raise PromptError(f"token {i} of the prompt is {token!r}, expected an int")
        if not 0 <= token < vocab:
            raise PromptError(f"token {i} of the prompt is {token}, outside the vocabulary of {vocab}")
    return [int(token) for token in ids]


def as_list(values, what, expected):
    """An array or another iterable as a list. Raises PromptError, for bytes (their items are no ids)
    and sets (they have no order) too."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (bytes, bytearray, Set)) or not isinstance(values, Iterable):
        raise PromptError(f"{what} is of type {type(values).__name__}, expected {expected}")
    return list(values)


def check_length(n_tokens, limit, what="the prompt", media=()):
    """Raises PromptError when more than `limit` tokens came, of which the MediaRuns in `media` are a part."""
    if n_tokens <= limit:
        return
    largest = max((run.picture.n_tokens for run in media), default=0)
    if largest > limit:
        raise PromptError(f"{what} has {n_tokens} tokens, {largest} of them a single picture, at most {limit} fit; ask "
                          "for fewer image_tokens or video_tokens, or raise max_seq_len", n_tokens, limit)
    raise PromptError(f"{what} has {n_tokens} tokens, at most {limit} fit; shorten it or raise max_seq_len",
                      n_tokens=n_tokens, limit=limit)
