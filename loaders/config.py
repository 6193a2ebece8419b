"""Typed, loud reads of config.json: every error names the file, the field, what it holds and what was expected."""

import json
from pathlib import Path

from loaders.errors import CheckpointError, ConfigError
from loaders.json_file import read_json

REQUIRED = object()


class Config:
    """One JSON object of a config file; `section` opens a nested one. A null counts as absent.

    `config.int("hidden_size")` raises ConfigError when the key is absent, `config.int("head_dim", 256)` does not.
    """

    def __init__(self, values, where="config.json", path=""):
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {path or 'the file'} is {_show(values)}, expected a JSON object")
        self.values, self.where, self.path = values, where, path

    @classmethod
    def load(cls, directory, name="config.json"):
        """Reads `directory/name`. Raises CheckpointError when it is absent or not a JSON object."""
        file = Path(directory) / name
        if not file.is_file():
            raise CheckpointError(f"{directory}: no {name} here; a Hugging Face checkpoint directory has one")
        return cls(read_json(file), name)

    def __contains__(self, key):
        return self.values.get(key) is not None

    def __iter__(self):
        """The keys that hold something (null counts as absent)."""
        return (key for key in self.values if key in self)

    def name(self, key):
        """The full path of a key, for messages: `text_config.hidden_size`."""
        return f"{self.path}.{key}" if self.path else key

    def error(self, key, expected):
        """A ConfigError that says what `key` holds and what was expected of it."""
        came = f"is {_show(self.values[key])}" if key in self else "is missing"
        return ConfigError(f"{self.where}: {self.name(key)} {came}, expected {expected}")

    def _read(self, key, default, is_legal, expected):
        if key not in self:
            if default is REQUIRED:
                raise self.error(key, expected)
            return default
        value = self.values[key]
        if not is_legal(value):
            raise self.error(key, expected)
        return value

    def int(self, key, default=REQUIRED, least=1):
        return self._read(key, default, lambda v: _is_int(v) and v >= least, f"an int >= {least}")

    def float(self, key, default=REQUIRED):
        """A number > 0, and of a size that float32 arithmetic survives."""
        value = self._read(key, default, lambda v: (_is_int(v) or isinstance(v, float)) and 1e-30 <= v <= 1e30,
                           "a number from 1e-30 to 1e30")
        return None if value is None else float(value)

    def bool(self, key, default=REQUIRED):
        return self._read(key, default, lambda v: isinstance(v, bool), "true or false")

    def str(self, key, default=REQUIRED, one_of=None):
        expected = "one of " + ", ".join(one_of) if one_of else "a string"
        return self._read(key, default, lambda v: isinstance(v, str) and (one_of is None or v in one_of), expected)

    def list(self, key, default=REQUIRED, length=None, one_of=None):
        expected = ("a list" + (f" of {length}" if length is not None else "")
                    + (" from " + ", ".join(one_of) if one_of else ""))
        return self._read(key, default, lambda v: isinstance(v, list) and length in (None, len(v))
                          and (one_of is None or all(item in one_of for item in v)), expected)

    def ids(self, key):
        """Token ids, a tuple: the file holds one or a list of them; () when absent."""
        def legal(v):
            return all(_is_int(item) and item >= 0 for item in (v if isinstance(v, list) else [v]))
        value = self._read(key, [], legal, "a token id >= 0 or a list of them")
        return tuple(value) if isinstance(value, list) else (value,)

    def section(self, key, default=REQUIRED):
        """The nested object at `key` as a Config, or `default` when absent."""
        if key not in self and default is not REQUIRED:
            return default
        if key not in self:
            raise self.error(key, "a JSON object")
        return Config(self.values[key], self.where, self.name(key))


def _is_int(value):
    """Whether a JSON value is a whole number; one past 64 bits is a slip, and would overflow further on."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _show(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
