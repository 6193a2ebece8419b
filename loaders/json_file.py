"""JSON objects from checkpoint files, with every way they can be broken turned into one CheckpointError."""

import json

from loaders.errors import CheckpointError


def read_json(path):
    """The JSON object in the file at `path` (a Path), as a dict. Raises CheckpointError."""
    return parse_json(read_bytes(path), path)


def read_bytes(path):
    """The bytes of the file at `path` (a Path). Raises CheckpointError where the system refuses."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(data, source):
    """The JSON object in `data` (UTF-8 bytes), as a dict. `source` begins the message of every error.

    Raises CheckpointError for bytes that are not UTF-8 or not JSON, for a value that is not an object, and for a key
    that stands twice in one object, which plain `json.loads` would settle in silence.
    """
    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{source}: the key {key!r} stands twice in one object")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:             # a ValueError itself, and already says what is wrong
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: expected JSON, found bytes that are not UTF-8 at {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found a {type(value).__name__}")
    return value
