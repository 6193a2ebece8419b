"""Config readings that the Gemma families share."""

SLIDING, GLOBAL = "sliding_attention", "full_attention"
MOST_LAYERS = 1000          # released models have up to 62; a slip in the file must not fill the memory with LayerSpecs


def layer_types(config, pattern):
    """The kind of each layer: the list in the file, else every `pattern`-th layer is global."""
    n = config.int("num_hidden_layers")
    if n > MOST_LAYERS:
        raise config.error("num_hidden_layers", f"at most {MOST_LAYERS}")
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


def refuse_unknown(section, allowed):
    """Raises ConfigError for a key of `section` outside `allowed`."""
    for key in section:
        if key not in allowed:
            raise section.error(key, "no field but " + ", ".join(allowed))


def is_tied(config, text):
    """tie_word_embeddings of a file with a text section. Versions of transformers differ on which level decides, so a
    file that says it twice must say the same."""
    inner = text.bool("tie_word_embeddings", config.bool("tie_word_embeddings", True))
    if config.bool("tie_word_embeddings", inner) != inner:
        raise text.error("tie_word_embeddings", "the value that the top level has")
    return inner
