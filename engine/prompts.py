"""What a caller passes as a prompt → token ids, or a PromptError that says what is wrong with it."""

from collections.abc import Iterable, Set
from numbers import Number

from engine.checks import is_int
from engine.errors import PromptError

KEYS = ("prompt", "token_ids", "images", "videos")
NO_MEDIA = "images and videos are not supported yet; this engine runs the text part of a checkpoint"
FORMS = "a str, a list of token ids, a dict with prompt or token_ids"


def as_prompts(prompts):
    """A str or a dict as it is, anything else that can be iterated as a list. Raises PromptError."""
    return prompts if isinstance(prompts, (str, dict)) else as_list(prompts, "prompts", FORMS + ", or a list of those")


def is_single(prompts):
    """Whether what as_prompts returned is one prompt (text, a dict, a list of ids) and not a list of them.

    Any numbers are meant as ids: those that cannot be are an error of that one prompt.
    """
    return isinstance(prompts, (str, dict)) or (bool(prompts) and all(isinstance(i, Number) for i in prompts))


def token_ids_of(prompt, tokenizer, vocab):
    """The token ids of one prompt: a str, ids, or {"prompt" | "token_ids": ...}. Raises PromptError."""
    if isinstance(prompt, dict):
        if unknown := [key for key in prompt if key not in KEYS]:
            raise PromptError(f"a prompt dict has key {unknown[0]!r}, expected {', '.join(KEYS)}")
        refuse_media(prompt.get("images"), prompt.get("videos"))
        given = [key for key in ("prompt", "token_ids") if prompt.get(key) is not None]
        if len(given) != 1:
            raise PromptError(f"a prompt dict has {' and '.join(given) or 'neither'}, expected prompt or token_ids")
        prompt = prompt[given[0]]
        if isinstance(prompt, str) != (given[0] == "prompt"):
            raise PromptError(f"{given[0]} is of type {type(prompt).__name__}, expected "
                              + ("a str" if given[0] == "prompt" else "a list of ids"))
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError("the prompt is text, but the checkpoint has no tokenizer files; pass token ids")
        if not prompt:
            raise PromptError("the prompt is empty; to begin from nothing pass the id of the begin-of-text token",
                              n_tokens=0)
        return checked_ids(tokenizer.encode(prompt), vocab)
    return checked_ids(prompt, vocab)


def refuse_media(images, videos):
    """Raises PromptError if there are any: None, and lists of nothing or of None, are fine."""
    for media in (images, videos):
        if any(not _is_nothing(entry) for entry in (media if isinstance(media, (list, tuple)) else [media])):
            raise PromptError(NO_MEDIA)


def refuse_media_parts(messages):
    """Raises PromptError if a message has a part that is not text: a template would drop it in silence."""
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                raise PromptError(f"a message has a part of type {part.get('type')!r}: {NO_MEDIA}")


def _is_nothing(entry):
    return entry is None or (isinstance(entry, (list, tuple)) and not entry)


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


def check_length(n_tokens, limit, what="the prompt"):
    """Raises PromptError when more than `limit` tokens came."""
    if n_tokens > limit:
        raise PromptError(f"{what} has {n_tokens} tokens, at most {limit} fit; shorten it or raise max_seq_len",
                          n_tokens=n_tokens, limit=limit)
