"""LLM.explain(): what runs where and why, as text."""

from itertools import groupby

from engine.floor import floor
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, SiglipSpec

LANES = {"cpu": "ops from engine/reference.py, matrix products by NumPy's BLAS",
         "emulated": "the kernels of cuda/*.cu, compiled by g++",
         "cuda": "the kernels of cuda/*.cu, compiled by NVRTC"}


def explain(llm):
    """Lane, layers with the op each uses, the vision part, pools with their ledgers, the least a step costs, settings
    without effect, tensors left unread."""
    spec, config = llm.spec, llm.config
    lines = [f"{spec.architecture}: {len(spec.layers)} layers, hidden {spec.hidden}, vocabulary {spec.vocab}",
             f"lane {llm.lane.name}, {llm.lane.dtype}: " + LANES[llm.lane.name]
             + (" (device='auto': no GPU was found)" if config.device == "auto" and llm.lane.name == "cpu" else "")]
    at = 0
    for layer, group in groupby(spec.layers):
        n = len(list(group))
        lines.append(f"  layers {at}..{at + n - 1}: {_attention(layer)}; {_mlp(layer)}")
        at += n
    if spec.first_shared is not None:
        lines.append(f"  layers from {spec.first_shared} on own no K and V: a prompt's positions whose states nobody "
                     f"asked for end before layer {spec.first_shared} of {len(spec.layers)}")
    if spec.per_layer_input:
        lines.append(f"per-layer inputs: {spec.per_layer_input} values for each of {len(spec.layers)} layers, table of "
                     f"{spec.per_layer_vocab} rows " + ("on the lane (ple='device')" if config.ple == "device" else
                     "in the checkpoint's file; a step's rows are copied with its inputs (ple='host')"))
    if spec.media:
        lines += _vision(llm)
    for pool, pages in zip(llm.plan().pools, llm.kv_cache.allocators, strict=True):
        lines.append(f"  pool {pool.kind}: {pages.n_pages} pages of {pool.page_size} tokens, {pages.n_free} free")
    lines.append("head: " + ("its own matrix" if llm.weights.head is not llm.weights.embed else
                 "tied to the embedding" + ("" if spec.tied else ": the file has none of its own")))
    lines += _least(spec, llm.lane.dtype.itemsize, llm.plan().max_seq_len, config.max_batch_tokens)
    if llm.lane.stages:
        lines += llm.lane.ops.explain(spec, config.max_batch_tokens)
    if llm.lane.has_graphs:
        lines.append(str(llm.graphs) + (" (cuBLAS cannot be captured)" if config.gemm == "cublas" else ""))
    elif config.gemm != "own" or config.graphs is True:
        lines.append("gemm and graphs: choices of the cuda lane, no effect here")
    lines.append(f"prefix caching: {'asked for, not built yet: no effect' if config.prefix_caching else 'off'}")
    lines += _draft(llm)
    if llm.weights.unused:
        lines.append(f"tensors in the file that a text run does not read: {len(llm.weights.unused)} "
                     f"({', '.join(llm.weights.unused[:3])}{', ...' if len(llm.weights.unused) > 3 else ''})")
    return "\n".join(lines)


def _attention(layer):
    a = layer.attention
    return (f"{a.kind} attention, {a.n_heads} query and {a.n_kv_heads} KV heads of {a.head_dim}"
            + (", v is the k projection" if a.v_is_k else "")
            + (", a picture's tokens see all of it" if a.sees_whole_blocks else
               ", a picture's tokens see its later ones" if a.sees_blocks else "")
            + (", no positions (NoPE)" if a.rope is None else "")
            + ("" if a.temperature is None else f", queries grow from position {a.temperature.floor - 1} on")
            + ("" if layer.kv_from is None else f", K and V of layer {layer.kv_from}"))


def _vision(llm):
    """The tower, what a picture takes, who sees it whole, and what is kept of it."""
    media, counts = llm.spec.media, llm.encoder_cache.stats()
    tower, processor = media.tower, llm.pictures
    kind = {Gemma4TowerSpec: "tower", SiglipSpec: "SigLIP tower", BlockEmbedderSpec: "embedder"}[type(tower)]
    yield f"vision: {kind} of hidden {tower.hidden}" + (
        f", {tower.n_layers} layers, {tower.n_heads} heads of {tower.head_dim}" if hasattr(tower, "n_layers") else
        " and no layers") + f", patches of {tower.patch_side} x {tower.patch_side} pixels"
    others = [budget for budget in tower.budgets if budget != processor.image_tokens]
    yield (f"  a picture takes at most {processor.image_tokens} soft tokens"
           + (f" (image_tokens: also {', '.join(map(str, others))})" if others else "")
           + ("; no videos" if media.video_token is None else
              f", a video {processor.n_frames} frames of at most {processor.video_tokens}"))
    yield "  a picture is " + ("computed whole in one step, which grows past max_batch_tokens for it"
                               if llm.spec.has_blocks else "seen causally, and split between steps as text is")
    yield (f"  encoder cache: {counts['pictures']} pictures in {counts['bytes']} of {counts['capacity_bytes']} bytes; "
           f"{counts['hits']} hits of {counts['lookups']} lookups")


def _draft(llm):
    """The draft model, what it reads, by which rules its tokens are taken, and how many were."""
    assistant, config = llm._core.draft, llm.config
    if assistant is None:
        yield "draft: none"
        return
    spec = assistant.spec
    yield (f"draft: {len(spec.layers)} layers, hidden {spec.hidden}; a step drafts for a sequence "
           + (f"up to {config.most_drafts} tokens, as many as its acceptance and the number of sequences pay for"
              if config.n_draft_tokens == "auto" else f"{config.most_drafts} tokens"))
    for layer, group in groupby(spec.layers):
        n = len(list(group))
        yield f"  {n} layer{'s' * (n > 1)}: {_attention(layer)} of the target; {_mlp(layer)}"
    yield "  head: " + (f"the tokens of {spec.centroids_per_token} of {spec.n_centroids} centroids" if spec.n_centroids
                        else "all tokens")
    yield "  draft_sampling: " + ("the likeliest tokens are drafted; a text is the same as without a draft"
                                  if config.draft_sampling == "argmax" else "tokens are drawn and kept by the ratio of "
                                  "probabilities; sampled text has the same distribution as without a draft"
                                  ) + (", but for what cuBLAS rounds otherwise" if config.gemm == "cublas" else "")
    if rule := config.relaxed_acceptance:
        yield (f"  relaxed_acceptance: LOSSY. While the model thinks, sampled text takes a drafted token that is among "
               f"the {rule.top_k} likeliest and at most {rule.delta:g} less probable than the likeliest")
    yield from llm._core.control.health.lines()


def _mlp(layer):
    if layer.moe is None:
        return f"dense MLP {layer.dense.intermediate}"
    moe = layer.moe
    return (f"{moe.n_experts} experts of {moe.intermediate}, {moe.experts_per_token} a token by {moe.routing}, beside "
            f"a dense MLP {moe.dense.intermediate}")


def _least(spec, itemsize, max_seq_len, max_batch_tokens):
    """What no implementation moves or computes less than, for one token and for a prompt."""
    n_prompt = min(max_seq_len, max_batch_tokens)
    for what, n_query, context in ((f"a token after {max_seq_len - 1}", 1, max_seq_len),
                                   (f"a prompt of {n_prompt} tokens", n_prompt, n_prompt)):
        least = floor(spec, [(1, n_query, context)], itemsize, itemsize, drops=True)
        yield f"least work, {what}: {least.bytes / 1e9:.3g} GB and {least.flops / 1e9:.3g} GFLOP"
