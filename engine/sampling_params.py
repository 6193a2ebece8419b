"""SamplingParams: how the tokens of one request are chosen, and when they end."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from engine.checks import LARGEST, is_int, is_number
from engine.errors import ParamsError

GREEDY_BELOW = 1e-5     # a temperature below this is greedy


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Every field is checked here, once; raises ParamsError.

    max_tokens          most tokens to generate, >= 1
    temperature         logits are divided by it; 0 is greedy
    top_k               keep tokens at least as likely as the k-th; 0 (or -1) keeps all
    top_p               keep the smallest most-likely set whose mass reaches this; 1.0 keeps all
    min_p               drop tokens less likely than min_p times the likeliest; 0 keeps all
    seed                64-bit; with it a request's draws are a function of (seed, position) alone. None takes
                        (LLM.seed, submission counter), fixed when the request is submitted
    n_logprobs          also report log-probabilities of the chosen token and of the n likeliest, before penalties
                        and temperature; 0 reports none
    prompt_logprobs     the same for the prompt's tokens
    stop                string or strings that end the text; not part of it
    stop_token_ids      token ids that end the text, besides the model's own
    ignore_eos          go on past the model's end-of-text ids
    min_tokens          no end-of-text or stop id before this many tokens
    repetition_penalty  > 1 makes tokens of prompt and output less likely (divides positive logits, multiplies negative)
    presence_penalty    subtracted once from the logits of tokens already in the output
    frequency_penalty   subtracted per occurrence in the output
    logit_bias          {token id: added to its logit}
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n_logprobs: int = 0
    prompt_logprobs: int = 0
    stop: tuple = ()
    stop_token_ids: tuple = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)     # noqa: E731  the one door past frozen
        put("stop", _as_tuple((self.stop,) if isinstance(self.stop, str) else self.stop))
        put("stop_token_ids", _as_tuple(self.stop_token_ids))
        if self.top_k == -1:
            put("top_k", 0)
        whole = lambda least: (lambda v: is_int(v) and v >= least, f"an int >= {least}")      # noqa: E731
        number = lambda ok, text: (lambda v: is_number(v) and ok(v), text)                    # noqa: E731
        rules = {
            "max_tokens": whole(1),
            "temperature": number(lambda v: v >= 0, "a number >= 0 (0 is greedy)"),
            "top_k": whole(0),
            "top_p": number(lambda v: 0 < v <= 1, "a number in (0, 1]"),
            "min_p": number(lambda v: 0 <= v <= 1, "a number in [0, 1]"),
            "seed": (lambda v: v is None or (is_int(v) and 0 <= v < 2**64), "None or an int in [0, 2**64)"),
            "n_logprobs": whole(0),
            "prompt_logprobs": whole(0),
            "stop": (lambda v: _is_tuple_of(v, lambda s: isinstance(s, str) and s), "non-empty strings"),
            "stop_token_ids": (lambda v: _is_tuple_of(v, lambda i: is_int(i) and i >= 0), "token ids >= 0"),
            "ignore_eos": (lambda v: isinstance(v, bool), "a bool"),
            "min_tokens": (lambda v: is_int(v) and 0 <= v <= self.max_tokens, "an int in [0, max_tokens]"),
            "repetition_penalty": number(lambda v: v >= 1 / LARGEST, "a number > 0"),
            "presence_penalty": number(lambda v: True, "a finite number"),
            "frequency_penalty": number(lambda v: True, "a finite number"),
            "logit_bias": (_is_logit_bias, "a dict {token id >= 0: finite number}"),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            is_legal, expected = rules[field.name]
            if not is_legal(value):
                raise ParamsError(f"SamplingParams: {field.name} is {value!r}, expected {expected}")

    @property
    def has_penalties(self):
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def is_greedy(self):
        return self.temperature < GREEDY_BELOW


def _as_tuple(value):
    """() for None, a tuple for what holds several things; anything else as it came, for the rules to refuse."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, dict)) else value


def _is_tuple_of(value, is_legal):
    return isinstance(value, tuple) and all(is_legal(item) for item in value)


def _is_logit_bias(value):
    return value is None or (isinstance(value, dict)
                             and all(is_int(k) and k >= 0 and is_number(v) for k, v in value.items()))
