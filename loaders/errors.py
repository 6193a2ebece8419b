"""Errors that a caller can cause. Each message says what came, what was expected and what would work."""


class RawgemError(ValueError):
    """Base of every error that bad input to Rawgem can raise."""


class ConfigError(RawgemError):
    """An engine argument, or a field of config.json, is missing, mistyped, or names something not supported."""


class CheckpointError(RawgemError):
    """A checkpoint directory or file is not what its header, its config or the model says it should be."""


class PromptError(RawgemError):
    """One prompt cannot run. `n_tokens` and `limit` are set when the reason is its length, else None."""

    def __init__(self, message, n_tokens=None, limit=None):
        super().__init__(message)
        self.n_tokens = n_tokens
        self.limit = limit
