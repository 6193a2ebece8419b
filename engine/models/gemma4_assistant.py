"""Gemma 4 Assistant: a draft model of a few layers with queries alone, which read the K and V of a Gemma 4 target.

Its embedding is the head of its own logits; tokens enter through the target's. The K and V are those of the target's
last layer of the same kind that has a cache of its own. Source: Gemma 4 model cards; HF modeling_gemma4_assistant.
"""

from dataclasses import dataclass, replace

from engine.errors import ConfigError
from engine.models.common import GLOBAL, SLIDING, n_layers
from engine.models.fields import COMMON, USED, check_fields, ignored, only
from engine.models.gemma4 import ABSENT as TARGET_ABSENT
from engine.models.gemma4 import ABSENT_UNIFIED as TARGET_ABSENT_UNIFIED
from engine.models.gemma4 import TEXT_FIELDS as TARGET_FIELDS
from engine.models.gemma4 import attention_specs
from engine.models.spec import DenseSpec, LayerSpec

TIED = only(True, otherwise="a draft whose head is not its embedding")
FIELDS = {
    **COMMON,
    "model_type": only("gemma4_assistant", "gemma4_unified_assistant", otherwise="no draft model"),
    **dict.fromkeys(["text_config", "backbone_hidden_size", "use_ordered_embeddings", "num_centroids",
                     "centroid_intermediate_top_k"], USED),
    "tie_word_embeddings": TIED,
    **ignored("the target says what ends a text, and where media are", "eos_token_id", "image_token_id",
              "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id",
              "eoa_token_index"),
}
TEXT_FIELDS = {
    **TARGET_FIELDS,
    "tie_word_embeddings": TIED,
    "hidden_size_per_layer_input": only(0, otherwise="inputs of every layer in a draft"),
    "vocab_size_per_layer_input": only(0, otherwise="inputs of every layer in a draft"),
    "enable_moe_block": only(False, otherwise="experts in a draft"),
    "use_double_wide_mlp": only(False, otherwise="MLPs of twice the width in a draft"),
    **ignored("there are no experts", "num_experts", "top_k_experts", "moe_intermediate_size"),
    **ignored("a draft's logits are not capped, its positions are the target's, and so is what ends a text",
              "final_logit_softcapping", "max_position_embeddings", "eos_token_id"),
}
ARCHITECTURES = {"Gemma4AssistantForCausalLM": "gemma4_assistant",
                 "Gemma4UnifiedAssistantForCausalLM": "gemma4_unified_assistant"}
# What keys that are left out mean, by class: (backbone_hidden_size, sliding_window).
ABSENT = {"gemma4_assistant": (1536, TARGET_ABSENT["sliding_window"]),
          "gemma4_unified_assistant": (3840, TARGET_ABSENT_UNIFIED["sliding_window"])}


@dataclass(frozen=True)
class AssistantSpec:
    """A draft model for one target.

    hidden               width of the draft's own states
    backbone             the target's hidden
    vocab                of both
    layers               LayerSpecs without K and V: kv_from is the number of the target's layer that each reads
    n_centroids          0: logits of all tokens; else of the tokens of some centroids, which share them out evenly
    centroids_per_token  how many centroids that is
    suppressed           ids that are never drafted

    Where a draft looks, P being the last position in the cache. Either choice changes how many drafts are accepted, and
    no text. Engines differ; 0 and 0 are vLLM's and SGLang's, transformers has 1 and 1.
    pos_offset           its RoPE position is P + pos_offset, 0 or 1
    extra_keys           sliding layers see so many keys beyond the target's window
    """

    hidden: int
    backbone: int
    vocab: int
    layers: tuple
    norm_eps: float
    n_centroids: int = 0
    centroids_per_token: int = 0
    suppressed: tuple = ()
    pos_offset: int = 0
    extra_keys: int = 0

    # What code that it shares with ModelSpecs asks for.
    norm_rounds_first = False
    per_layer_input = 0
    media = None

    @property
    def reads(self):
        """Number of the target's layer whose K and V each layer reads."""
        return tuple(layer.kv_from for layer in self.layers)

    @property
    def seen_layers(self):
        """The layers with the windows that they see."""
        return tuple(layer if layer.attention.window is None else
                     replace(layer, attention=replace(layer.attention, window=layer.attention.window + self.extra_keys))
                     for layer in self.layers)

    @property
    def widest_dense(self):
        """The largest intermediate of a MLP."""
        return max(layer.dense.intermediate for layer in self.layers)

    @property
    def projections(self):
        """(n_rows, n_in) of the matrices beside those of layers and head."""
        shapes = (self.hidden, self.backbone), (self.backbone, self.hidden)
        return (*shapes, (self.n_centroids, self.hidden)) if self.n_centroids else shapes


def draft_type(config):
    """The model type of a draft's loaders Config, by that or by its architecture; None where it is no draft's."""
    if (named := config.values.get("model_type")) in tuple(ABSENT):
        return named
    found = [kind for name, kind in ARCHITECTURES.items() if name in config.list("architectures", [])]
    return found[0] if found else None


def describe_assistant(config, target, suppressed=()):
    """The AssistantSpec of a draft's loaders Config for the ModelSpec `target`.

    suppressed  ids that the draft's generation_config.json suppresses
    Raises ConfigError for a field it does not support, and for a draft that was made for another target.
    """
    kind = draft_type(config)
    if kind is None:
        raise config.error("architectures", f"one of {', '.join(ARCHITECTURES)}: this is no draft model")
    if target.architecture != "gemma4":
        raise ConfigError(f"{config.where}: the draft reads the K and V of a Gemma 4 model, the target is "
                          f"{target.architecture}")
    check_fields(config, FIELDS)
    text = config.section("text_config")
    check_fields(text, TEXT_FIELDS)
    default_backbone, default_window = ABSENT[kind]
    backbone = config.int("backbone_hidden_size", default_backbone)
    if backbone != target.hidden:
        raise config.error("backbone_hidden_size", f"{target.hidden}, the target's hidden_size")
    vocab = text.int("vocab_size", 262144)
    if vocab != target.vocab:
        raise text.error("vocab_size", f"{target.vocab}, the target's")
    for token in suppressed:
        if token >= vocab:
            raise ConfigError(f"generation_config.json: suppress_tokens has {token}, expected ids below {vocab}")
    n_centroids, n_chosen = _centroids(config, vocab)
    return AssistantSpec(hidden=text.int("hidden_size"), backbone=backbone, vocab=vocab,
                         layers=tuple(_layers(text, target, default_window)),
                         norm_eps=text.float("rms_norm_eps", 1e-6), n_centroids=n_centroids,
                         centroids_per_token=n_chosen, suppressed=tuple(sorted(set(suppressed))))


def _centroids(config, vocab):
    """(n_centroids, centroids_per_token), 0 and 0 for a head over all tokens."""
    n_centroids, n_chosen = config.int("num_centroids", 2048), config.int("centroid_intermediate_top_k", 32)
    if not config.bool("use_ordered_embeddings", False):
        return 0, 0
    if vocab % n_centroids:
        raise config.error("num_centroids", f"a divisor of the {vocab} tokens")
    if n_chosen > n_centroids:
        raise config.error("centroid_intermediate_top_k", f"at most the {n_centroids} centroids")
    return n_centroids, n_chosen


def _layers(text, target, default_window):
    n = n_layers(text)
    kinds = text.list("layer_types", length=n, one_of=(SLIDING, GLOBAL))
    if text.int("num_kv_shared_layers", 0, least=0) not in (0, n):
        raise text.error("num_kv_shared_layers", f"{n}, all layers, or 0, which means all")
    mlp = DenseSpec(text.int("intermediate_size"))
    for i, (kind, attention) in enumerate(zip(kinds, attention_specs(text, kinds, default_window), strict=True)):
        owner = _owner(text, target, kind)
        _check_fit(text, f"layer {i} ({kind}) of the draft", attention,
                   f"layer {owner} of the target, whose K and V it reads,", target.layers[owner].attention)
        yield LayerSpec(attention, mlp, layer_scalar=True, kv_from=owner)


def _owner(text, target, kind):
    """Number of the target's last layer of a kind that has K and V of its own."""
    owners = [i for i, layer in enumerate(target.layers)
              if layer.kv_from is None and (layer.attention.window is None) == (kind == GLOBAL)]
    if not owners:
        raise text.error("layer_types", f"no {kind}: the target has no such layer with K and V of its own")
    return owners[-1]


def _check_fit(text, of, draft, by, target):
    """Raises ConfigError where an AttentionSpec cannot read what another wrote."""
    for name, words in (("n_kv_heads", "{} KV heads"), ("head_dim", "heads of {}"), ("window", "a window of {}"),
                        ("v_is_k", "attention_k_eq_v {}"), ("rope", "{}")):
        came, expected = getattr(draft, name), getattr(target, name)
        if came != expected:
            raise ConfigError(f"{text.where}: {text.path}: {of} has {words.format(came)}, {by} has "
                              f"{words.format(expected)}: the draft was made for another target")
