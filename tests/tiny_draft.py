"""Tiny random draft models for the checkpoints of tests/tiny_models.py."""

import numpy as np
from tokenizers import Tokenizer

from engine.models import describe
from engine.models.gemma4_assistant import describe_assistant
from engine.tensors import PRE_PROJECTION, TOKEN_ORDERING, assistant_targets
from engine.thinking import CLOSE, OPEN
from loaders.config import Config
from tests import tiny

SHARED = ("sliding_window", "head_dim", "global_head_dim", "num_attention_heads", "num_key_value_heads",
          "num_global_key_value_heads", "attention_k_eq_v", "rope_parameters", "vocab_size", "rms_norm_eps")


def config_for(target, n_centroids=8, **fields):
    """The config.json of a draft model for the target in a directory; n_centroids 0: a head of all tokens; `fields`
    change the text section."""
    values = Config.load(target).values
    values = values.get("text_config", values)
    config = tiny.draft("gemma4", **{key: values[key] for key in SHARED if key in values}, **fields)
    return {**config, "use_ordered_embeddings": bool(n_centroids), "num_centroids": n_centroids or 8}


def write_draft(directory, target, seed=0, **options):
    """A draft model for the target in a directory; returns `directory`. options: config_for's."""
    config, rng = config_for(target, **options), np.random.default_rng([seed, 7])
    spec = describe_assistant(Config(config), describe(Config.load(target)))
    shapes = {name: shape for of in assistant_targets(spec) for name, shape in of.parts}
    shapes[PRE_PROJECTION] = spec.hidden, 2 * spec.backbone
    tensors = {name: 1 + 0.2 * rng.standard_normal(shape) if len(shape) == 1 else
               rng.standard_normal(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    ordering = {TOKEN_ORDERING: rng.permutation(spec.vocab)} if spec.n_centroids else None
    return tiny.write_checkpoint(directory, config, tensors, prefix="", extra=ordering)


def add_thinking(directory):
    """Gives the tokenizer of a checkpoint the marks of thinking; returns their ids."""
    file = str(directory / "tokenizer.json")
    backend = Tokenizer.from_file(file)
    backend.add_special_tokens([OPEN, CLOSE])
    backend.save(file)
    return tuple(map(backend.token_to_id, (OPEN, CLOSE)))
