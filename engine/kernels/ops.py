"""The op table of the lanes that run kernels, `cuda` and `emulated`: launchers, by the names of engine/reference.py."""

from types import SimpleNamespace

from engine.errors import ConfigError
from engine.kernels import centroids, cublas, gemm, moe, paged, sampling
from engine.kernels.activation import add_bias, clamp, gate_per_layer, logit_softcap
from engine.kernels.attention import MOST_GROUP, MOST_HEAD_DIM, MULTIPLE, attention
from engine.kernels.centroids import candidate_argmax, candidate_logits, pick_centroids
from engine.kernels.embedding import add_rows, embed, place_rows, pool_rows, scale_rows, select_rows
from engine.kernels.gemm import gated_linear, linear
from engine.kernels.moe import MOST_CHOSEN, MOST_EXPERTS, moe_combine, moe_gated_linear, moe_linear, moe_route
from engine.kernels.rejection import accept_drafts, relax_drafts, sample_drafts, sample_with_drafts
from engine.kernels.rmsnorm import MOST_HIDDEN, add_norm, add_norms, layer_norm, mix_per_layer, rms_norm, router_norm
from engine.kernels.rope import attention_temperature, qk_norm_rope_cache, rope_angles
from engine.kernels.sampling import apply_edits, sample, top_logprobs
from engine.models.gemma4_assistant import AssistantSpec
from engine.models.vision_spec import BlockEmbedderSpec

__all__ = ["accept_drafts", "add_bias", "add_norm", "add_norms", "add_rows", "apply_edits", "attention",
           "attention_temperature", "candidate_argmax", "candidate_logits", "check", "clamp", "embed", "explain",
           "gate_per_layer", "gated_linear", "layer_norm", "linear", "logit_softcap", "mix_per_layer", "moe_combine",
           "moe_gated_linear", "moe_linear", "moe_route", "pick_centroids", "place_rows", "pool_rows",
           "qk_norm_rope_cache", "relax_drafts", "rms_norm", "rope_angles", "router_norm", "sample", "sample_drafts",
           "sample_with_drafts", "scale_rows", "scratch_size", "select_rows", "top_logprobs", "vision_scratch_size"]


def scratch_size(spec, max_tokens, max_logit_rows):
    """(floats, counters) of the Scratch that the ops of a ModelSpec or AssistantSpec want: the most that one of them
    wants."""
    sizes = [sampling.scratch_size(max_logit_rows, spec.vocab)]
    sizes += [gemm.scratch_size(*shape, max_tokens) for shape in gemm.layer_shapes(spec)]
    sizes.append(gemm.scratch_size(spec.vocab, spec.hidden, max_logit_rows))
    sizes += [paged.scratch_size(a.n_kv_heads, a.head_dim)
              for a in dict.fromkeys(layer.attention for layer in spec.layers)]
    return tuple(map(max, zip(*sizes, strict=True)))


def vision_scratch_size(tower, hidden, max_patches):
    """The same of a tower's ops, for pictures of up to max_patches patches together; hidden is the decoder's."""
    sizes = [gemm.scratch_size(*shape, max_patches) for shape in gemm.tower_shapes(tower, hidden)]
    if head_dim := getattr(tower, "head_dim", 0):
        sizes.append(paged.scratch_size(tower.n_heads, head_dim))
    return tuple(map(max, zip(*sizes, strict=True)))


def with_cublas():
    """The same table with matrix products by cuBLAS."""
    table = {name: globals()[name] for name in __all__}

    def scratch_with_cublas(spec, max_tokens, max_logit_rows):
        sizes = [scratch_size(spec, max_tokens, max_logit_rows)]
        sizes += [cublas.scratch_size(2 * spec.widest_dense, spec.hidden, max_tokens)]
        return tuple(map(max, zip(*sizes, strict=True)))

    def vision_scratch_with_cublas(tower, hidden, max_patches):
        sizes = [vision_scratch_size(tower, hidden, max_patches)]
        sizes += [cublas.scratch_size(*shape, max_patches) for shape in gemm.tower_shapes(tower, hidden)]
        return tuple(map(max, zip(*sizes, strict=True)))

    def explain_with_cublas(spec, max_tokens):
        yield "matrix products: cuBLAS, so a row's bits may depend on its batch"
        yield from explain_attention(spec)
    return SimpleNamespace(**{**table, "linear": cublas.linear, "gated_linear": cublas.gated_linear,
                              "scratch_size": scratch_with_cublas, "explain": explain_with_cublas,
                              "vision_scratch_size": vision_scratch_with_cublas})


def check(spec):
    """Raises ConfigError for a ModelSpec, or the AssistantSpec of a draft, with a size that no kernel takes."""
    if type(spec) is AssistantSpec:
        centroids.check(spec.n_centroids)
    if spec.hidden > MOST_HIDDEN:
        raise ConfigError(f"hidden_size is {spec.hidden}: the norm kernels take up to {MOST_HIDDEN}; device='cpu' "
                          "takes any")
    sizes = {"hidden_size": spec.hidden, "vocab_size": spec.vocab,
             "hidden_size_per_layer_input": spec.per_layer_input}
    for layer in spec.layers:
        attention = layer.attention
        sizes["head_dim"] = attention.head_dim
        if layer.dense:
            sizes["intermediate_size"] = layer.dense.intermediate
        if layer.moe:
            sizes |= {"the experts' intermediate size": layer.moe.intermediate,
                      "the number of experts": layer.moe.n_experts}
            if layer.moe.n_experts > MOST_EXPERTS or layer.moe.experts_per_token > MOST_CHOSEN:
                raise ConfigError(f"{layer.moe.experts_per_token} of {layer.moe.n_experts} experts a token: the "
                                  f"kernels take up to {MOST_CHOSEN} of {MOST_EXPERTS}; device='cpu' takes any")
        if attention.head_dim > MOST_HEAD_DIM or attention.n_heads > MOST_GROUP * attention.n_kv_heads:
            raise ConfigError(f"{attention.n_heads} query and {attention.n_kv_heads} KV heads of {attention.head_dim}: "
                              f"the attention kernel takes up to {MOST_GROUP} query heads a KV head, of at most "
                              f"{MOST_HEAD_DIM}; device='cpu' takes any")
        _check_multiples(sizes)
    if spec.media:
        _check_tower(spec.media.tower)


def _check_tower(tower):
    """Raises ConfigError for a vision tower with a size that no kernel takes."""
    sizes = {"hidden_size": tower.hidden, "values of a patch": tower.patch_width}
    if not isinstance(tower, BlockEmbedderSpec):
        sizes |= {"intermediate_size": tower.intermediate, "head_dim": tower.head_dim}
        if tower.head_dim > MOST_HEAD_DIM:
            raise ConfigError(f"vision_config: head_dim is {tower.head_dim}: the attention kernel takes up to "
                              f"{MOST_HEAD_DIM}; device='cpu' takes any")
    normed = tower.hidden if not isinstance(tower, BlockEmbedderSpec) else max(tower.hidden, tower.patch_width)
    if normed > MOST_HIDDEN:
        raise ConfigError(f"vision_config: rows of {normed} are normed: the norm kernels take up to {MOST_HIDDEN}; "
                          "device='cpu' takes any")
    _check_multiples(sizes, "vision_config: ")


def _check_multiples(sizes, prefix=""):
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ConfigError(f"{prefix}{name} is {size}: the kernels take multiples of {MULTIPLE}; device='cpu' takes "
                              "any")


def explain(spec, max_tokens):
    """Lines that say which variant of the matrix product and of attention each layer uses, and why: it follows from the
    shapes alone."""
    tiles = {n: {gemm.plan(*shape, n).tile for shape in gemm.shapes(spec)} for n in (1, max_tokens)}
    for n, used in tiles.items():
        yield (f"matrix products of {n} token{'s' * (n != 1)}: tiles of "
               + ", ".join(f"{tile.rows} weights x {tile.tokens} tokens" for tile in sorted(used)))
    for n_rows, n_in in dict.fromkeys(gemm.shapes(spec)):
        n_splits, length = gemm.splits(n_rows, n_in)
        yield f"  [{n_rows}, {n_in}]: " + (f"{n_splits} sums of {length}, whose blocks fill the machine for one token"
                                           if n_splits > 1 else "one sum")
    for e in moe.experts(spec):
        used = [moe.tile_for(n, e.experts_per_token, e.n_experts, e.in_out) for n in (1, max_tokens)]
        yield (f"{e.n_experts} experts of {e.intermediate}: tiles of {used[0].rows} weights x {used[0].tokens} tokens "
               f"for one token, {used[1].rows} x {used[1].tokens} for {max_tokens}")
    yield from explain_attention(spec)


def explain_attention(spec):
    """A line for each kind of attention."""
    for a in dict.fromkeys(layer.attention for layer in spec.layers):
        decode, prefill = (paged.geometry(a.head_dim, is_decode) for is_decode in (True, False))
        split = paged.split_keys(a.n_kv_heads, a.window, a.chunk)
        yield (f"{a.kind} attention, head_dim {a.head_dim}: {decode.rows} rows a block for decoding, {prefill.rows} "
               f"for prefill; tiles of {decode.keys} keys, partial sums every {split}")
