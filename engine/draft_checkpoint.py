"""A draft model's checkpoint: where it is, and what it describes beside its target. Errors name it."""

from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.models.gemma4_assistant import describe_assistant
from loaders.config import Config
from loaders.generation_config import load_suppressed
from loaders.hub import resolve


def draft_path(draft, **options):
    """The directory that the LLM argument `draft` names; options: of resolve. Raises CheckpointError."""
    try:
        return Path(resolve(draft, **options))
    except CheckpointError as error:
        raise CheckpointError(f"draft: {error}") from error


def describe_draft(path, target):
    """The AssistantSpec of a directory for the ModelSpec `target`. Raises ConfigError, CheckpointError; so it is where
    the draft was made for another target."""
    try:
        return describe_assistant(Config.load(path), target, load_suppressed(path))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"draft {path}: {error}") from error
