"""Rawgem: inference for Gemma checkpoints, small enough to read."""

from engine.errors import (
    CheckpointError,
    ConfigError,
    MemoryPlanError,
    ParamsError,
    PromptError,
    RawgemError,
    ShapeError,
)
from engine.llm import LLM, plan
from engine.media import Image, Video
from engine.outputs import ForwardOutput, RequestOutput, StreamPiece
from engine.sampling_params import SamplingParams

__all__ = ["LLM", "CheckpointError", "ConfigError", "ForwardOutput", "Image", "MemoryPlanError",
           "ParamsError", "PromptError", "RawgemError", "RequestOutput", "SamplingParams", "ShapeError", "StreamPiece",
           "Video", "plan"]
