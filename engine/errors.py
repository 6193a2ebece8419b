"""Every error a caller can cause, in one place; those about files are defined beside the loaders."""

from loaders.errors import CheckpointError, ConfigError, PromptError, RawgemError


class ParamsError(RawgemError):
    """A SamplingParams field is out of range, or asks for something this model does not have."""


class MemoryPlanError(RawgemError):
    """The weights, the KV cache or the workspace do not fit the memory there is."""


class ShapeError(RawgemError):
    """An op was given an array of the wrong shape or dtype."""


class KernelError(RuntimeError):
    """A kernel does not compile, or did what it must not: our fault, never a caller's."""


__all__ = ["CheckpointError", "ConfigError", "KernelError", "MemoryPlanError", "ParamsError", "PromptError",
           "RawgemError", "ShapeError"]
