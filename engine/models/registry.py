"""Supported checkpoints, one row each; everything else refuses at load, by name."""

from engine.models import gemma3, gemma4, llama4
from engine.models.gemma4_assistant import draft_type

ARCHITECTURES = {
    "Gemma3ForCausalLM": gemma3.describe_text,
    "Gemma3ForConditionalGeneration": gemma3.describe_multimodal,
    "Gemma4ForCausalLM": gemma4.describe_text,
    "Gemma4ForConditionalGeneration": gemma4.describe_multimodal,
    "Gemma4UnifiedForConditionalGeneration": gemma4.describe_unified,
    "Llama4ForCausalLM": llama4.describe_text,
    "Llama4ForConditionalGeneration": llama4.describe_multimodal,
}
# For files without `architectures`.
MODEL_TYPES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
}


def describe(config):
    """The ModelSpec of a loaders Config. Raises ConfigError for an architecture or a field it does not support."""
    if draft_type(config):
        raise config.error("architectures", "a model that generates: this one drafts for another, pass it as `draft`")
    named = config.list("architectures", [])
    if not named and "model_type" in config:
        named = [MODEL_TYPES[config.str("model_type", one_of=tuple(MODEL_TYPES))]]
    for name, describe_it in ARCHITECTURES.items():
        if name in named:
            return describe_it(config)
    raise config.error("architectures", "one of " + ", ".join(ARCHITECTURES))
