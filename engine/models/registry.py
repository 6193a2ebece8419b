"""Supported checkpoints, one row each; everything else refuses at load, by name."""

from engine.errors import ConfigError
from engine.models import gemma3, gemma4

ARCHITECTURES = {
    "Gemma3ForCausalLM": gemma3.describe_text,
    "Gemma3ForConditionalGeneration": gemma3.describe_multimodal,
    "Gemma4ForCausalLM": gemma4.describe_text,
    "Gemma4ForConditionalGeneration": gemma4.describe_multimodal,
    "Gemma4UnifiedForConditionalGeneration": gemma4.describe_multimodal,
}
# For files without `architectures`.
MODEL_TYPES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
}


def describe(config):
    """The ModelSpec of a loaders Config. Raises ConfigError for an architecture or a field it does not support."""
    named = config.list("architectures", None) or [MODEL_TYPES.get(config.str("model_type", ""))]
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](config)
    came = named if named != [None] else f"model_type {config.values.get('model_type')!r}"
    raise ConfigError(f"{config.where}: architectures is {came}, which is not supported; supported: "
                      + ", ".join(ARCHITECTURES))
