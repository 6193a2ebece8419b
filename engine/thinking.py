"""Thinking: which tokens of a text are the model's reasoning, where drafts may be judged by a relaxed rule."""

from dataclasses import dataclass, fields

from engine.checks import is_int, is_number
from engine.errors import ConfigError

OPEN, CLOSE = "<|channel>", "<channel|>"        # how Gemma 4 brackets what it thinks


@dataclass(frozen=True)
class RelaxedRule:
    """The LLM argument relaxed_acceptance: while the model thinks, a drafted token is accepted where it is one of the
    top_k likeliest and at most delta less likely than the likeliest. Other text comes out than without drafts."""

    top_k: int = 10
    delta: float = 0.6

    @classmethod
    def of(cls, value):
        """The rule that a dict, or a RelaxedRule, asks for. Raises ConfigError."""
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or set(value) - set(known):
            raise ConfigError(f"relaxed_acceptance is {value!r}, expected None or a dict with {' and '.join(known)}, "
                              "like {'top_k': 10, 'delta': 0.6}")
        rule = cls(**value)
        if not is_int(rule.top_k) or rule.top_k < 1:
            raise ConfigError(f"relaxed_acceptance: top_k is {rule.top_k!r}, expected an int >= 1")
        if not is_number(rule.delta) or not 0 <= rule.delta <= 1:
            raise ConfigError(f"relaxed_acceptance: delta is {rule.delta!r}, expected a number from 0 to 1")
        return cls(min(int(rule.top_k), 2**31 - 1), float(rule.delta))      # as an op takes it


@dataclass(frozen=True)
class ThinkingMarks:
    """The ids of the tokens that begin and end what a model thinks."""

    open_id: int
    close_id: int

    @classmethod
    def of(cls, tokenizer):
        """Those of a Tokenizer, or None where it lacks one of them, or there is no tokenizer."""
        ids = [tokenizer.token_id(text) for text in (OPEN, CLOSE)] if tokenizer else [None]
        return None if None in ids else cls(*ids)

    def after(self, is_thinking, tokens):
        """Whether the model thinks behind `tokens`, where it did or did not before them."""
        for token in reversed(tokens):
            if token in (self.open_id, self.close_id):
                return token == self.open_id
        return is_thinking

    def along(self, is_thinking, drafts):
        """For each drafted token whether it would be thought, where the ones before it hold: a drafted end of thinking
        is thought itself, what follows it is not."""
        flags = []
        for token in drafts:
            flags.append(is_thinking)
            is_thinking = self.after(is_thinking, (token,))
        return flags
