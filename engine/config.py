"""EngineConfig: every LLM argument, checked once at the door."""

from dataclasses import dataclass
from os import PathLike

from engine.checks import is_int, is_number
from engine.draft_length import AUTO_DRAFTS, MOST_DRAFTS
from engine.errors import ConfigError
from engine.thinking import RelaxedRule


@dataclass(frozen=True)
class EngineConfig:
    """The arguments of LLM besides the model; see LLM for what each means. relaxed_acceptance becomes a RelaxedRule.
    Raises ConfigError."""

    device: str = "auto"
    dtype: str = "auto"
    draft: str | PathLike | None = None
    n_draft_tokens: int | str = 4
    max_seq_len: int | None = None
    max_seqs: int = 64
    max_batch_tokens: int = 2048
    page_size: int = 16
    kv_cache_bytes: int | None = None
    encoder_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    graphs: str | bool = "auto"
    gemm: str = "own"
    ple: str = "device"
    draft_sampling: str = "argmax"
    relaxed_acceptance: object = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        for name in ("max_seqs", "max_batch_tokens", "page_size"):
            self._whole(name, 1)
        for name in ("max_seq_len", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        if self.encoder_cache_bytes is not None:
            self._whole("encoder_cache_bytes", 0)
        self._whole("seed", 0)
        if self.seed >= 2**64:
            raise ConfigError(f"seed is {self.seed}, expected an int below 2**64")
        if not is_number(self.memory_fraction) or not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction!r}, expected a number in (0, 1]")
        choices = {"prefix_caching": (True, False), "progress": (True, False), "graphs": ("auto", True, False),
                   "gemm": ("own", "cublas"), "ple": ("device", "host"), "draft_sampling": ("argmax", "sample")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}")
        self._check_drafts()

    @property
    def most_drafts(self):
        """Tokens drafted for a sequence in one step at most: 0 without a draft model."""
        if self.draft is None:
            return 0
        return AUTO_DRAFTS if self.n_draft_tokens == "auto" else self.n_draft_tokens

    @property
    def max_slots(self):
        """Rows of a step whose next token is decided at most, but for prompts: a sequence's last token and drafts."""
        return self.max_seqs * (1 + self.most_drafts)

    def _check_drafts(self):
        if not isinstance(self.draft, (str, PathLike, type(None))):
            raise ConfigError(f"draft is of type {type(self.draft).__name__}, expected a checkpoint directory or a "
                              "Hugging Face repo id")
        n = self.n_draft_tokens
        if n != "auto" and not (is_int(n) and 0 <= n <= MOST_DRAFTS):
            raise ConfigError(f"n_draft_tokens is {n!r}, expected an int from 0 to {MOST_DRAFTS}, or 'auto'")
        if n != "auto":
            object.__setattr__(self, "n_draft_tokens", int(n))
        if self.relaxed_acceptance is None:
            return
        object.__setattr__(self, "relaxed_acceptance", RelaxedRule.of(self.relaxed_acceptance))
        if self.draft is None:
            raise ConfigError("relaxed_acceptance is about drafted tokens: it needs a draft model, pass it as `draft`")
        if self.draft_sampling == "sample":
            raise ConfigError("relaxed_acceptance does not go with draft_sampling='sample': it judges the likeliest "
                              "drafts; take draft_sampling='argmax'")

    def _whole(self, name, least):
        value = getattr(self, name)
        if not is_int(value) or value < least:
            raise ConfigError(f"{name} is {value!r}, expected an int >= {least}")
        object.__setattr__(self, name, int(value))              # a NumPy int would overflow in later arithmetic
