"""Config readings that several families share."""

from loaders.config import REQUIRED

SLIDING, GLOBAL = "sliding_attention", "full_attention"
MOST_LAYERS = 1000          # released models have up to 62; a slip in the file must not fill the memory with LayerSpecs


def n_layers(config):
    """The number of layers, within reason."""
    n = config.int("num_hidden_layers")
    if n > MOST_LAYERS:
        raise config.error("num_hidden_layers", f"at most {MOST_LAYERS}")
    return n


def layer_types(config, pattern):
    """The kind of each layer: the list in the file, else every `pattern`-th layer is global."""
    n = n_layers(config)
    listed = config.list("layer_types", None, length=n, one_of=(SLIDING, GLOBAL))
    return listed or [GLOBAL if (i + 1) % pattern == 0 else SLIDING for i in range(n)]


def kv_heads(config, key, n_heads, default):
    """A number of KV heads, which must divide the query heads."""
    n_kv_heads = config.int(key, default)
    if n_heads % n_kv_heads:
        raise config.error(key, f"a divisor of the {n_heads} query heads")
    return n_kv_heads


def head_dim(config, key, default):
    """A head dimension, which RoPE needs even."""
    dim = config.int(key, default)
    if dim % 2:
        raise config.error(key, "an even int: RoPE rotates pairs")
    return dim


def experts_per_token(config, key, n_experts, default=REQUIRED):
    """How many of its experts a layer uses for a token."""
    n = config.int(key, default)
    if n > n_experts:
        raise config.error(key, f"at most the {n_experts} experts")
    return n


def refuse_unknown(section, allowed):
    """Raises ConfigError for a key of `section` outside `allowed`."""
    for key in section:
        if key not in allowed:
            raise section.error(key, "no field but " + ", ".join(allowed))


def is_tied(config, text, default=True):
    """tie_word_embeddings of a file with a text section. Versions of transformers differ on which level decides, so a
    file that says it twice must say the same."""
    inner = text.bool("tie_word_embeddings", config.bool("tie_word_embeddings", default))
    if config.bool("tie_word_embeddings", inner) != inner:
        raise text.error("tie_word_embeddings", "the value that the top level has")
    return inner
