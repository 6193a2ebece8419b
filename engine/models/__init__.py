"""Models as data: `describe(config)` turns a config.json into a ModelSpec, or refuses it by name."""

from engine.models.registry import describe
from engine.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec, TemperatureSpec

__all__ = ["AttentionSpec", "DenseSpec", "LayerSpec", "ModelSpec", "MoeSpec", "RopeSpec", "TemperatureSpec",
           "describe"]
