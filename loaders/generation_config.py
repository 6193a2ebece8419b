"""generation_config.json: the ids that end a text, and the sampling defaults a checkpoint asks for."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from loaders.config import Config

FILE = "generation_config.json"
INTS = {"top_k": ("top_k", -1), "max_new_tokens": ("max_tokens", 1), "min_new_tokens": ("min_tokens", 0)}
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json says.

    eos_token_ids   every id that ends a text, in the file's order; empty when the file names none
    sampling        {SamplingParams field: value}, of the fields that the file sets and no others
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict = field(default_factory=dict)


def load_generation_config(directory):
    """Reads `directory`/generation_config.json; without the file, an empty GenerationConfig.

    null counts as absent, and keys that are not about sampling are passed over: the file carries many. `do_sample:
    false` is greedy whatever the other filters say. Upper bounds are SamplingParams' to check.
    Raises CheckpointError for a file that is not JSON, ConfigError for a value of the wrong type.
    """
    if not (Path(directory) / FILE).is_file():
        return GenerationConfig()
    config = Config.load(directory, FILE)
    sampling = {}
    for key, (name, least) in INTS.items():
        if key in config:
            sampling[name] = config.int(key, least=least)
    for key in NUMBERS:
        if key in config:
            sampling[key] = _number(config, key)
    if config.bool("do_sample", True) is False:
        sampling = {name: value for name, value in sampling.items() if name not in ("top_k", "top_p", "min_p")}
        sampling["temperature"] = 0.0
    return GenerationConfig(config.ids("eos_token_id"), sampling)


def load_suppressed(directory):
    """The ids that `directory`/generation_config.json suppresses; () without the file. Raises as the other does."""
    if not (Path(directory) / FILE).is_file():
        return ()
    return Config.load(directory, FILE).ids("suppress_tokens")


def _number(config, key):
    value = config.values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise config.error(key, "a number")
    return float(value)
