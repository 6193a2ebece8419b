"""EngineConfig: every LLM argument, checked once at the door."""

from dataclasses import dataclass
from os import PathLike

from engine.checks import is_int, is_number
from engine.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """The arguments of LLM besides the model; see LLM for what each means. Raises ConfigError."""

    device: str = "auto"
    dtype: str = "auto"
    draft: str | PathLike | None = None
    n_draft_tokens: int = 4
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
        self._whole("n_draft_tokens", 0)
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
        if self.draft is not None:
            raise ConfigError(f"draft is {self.draft!r}: speculative decoding is not built yet; leave draft=None")
        if self.relaxed_acceptance is not None:
            raise ConfigError("relaxed_acceptance needs a draft model, which is not built yet; leave it None")

    def _whole(self, name, least):
        value = getattr(self, name)
        if not is_int(value) or value < least:
            raise ConfigError(f"{name} is {value!r}, expected an int >= {least}")
        object.__setattr__(self, name, int(value))              # a NumPy int would overflow in later arithmetic
