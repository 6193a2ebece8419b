"""Attention by other libraries on an attention case: its queries, and K and V from the same pages.

Peers that know no pages get contiguous copies, made beforehand, of the positions that a row's queries see: their best
layout, and no gathering in what is timed.
"""

from contextlib import nullcontext
from itertools import chain

import numpy as np

from measure.peer.torch_arrays import as_torch, compiled

FLASHINFER_BYTES = 256 << 20        # the workspace its wrappers want


def why_not(case):
    """Why no peer here takes a case, or None."""
    if len(case.sizes["rows"]) != 1:
        return "sequences of unequal lengths"
    if case.sizes.get("chunk"):
        return "chunked attention"
    (_, n_query, context), = case.sizes["rows"]
    return None if n_query in (1, context) else "a prompt that goes on from a cache"


def oldest(sizes):
    """The first position that any query of the case's rows sees."""
    (_, n_query, context), = sizes["rows"]
    return max(0, context - n_query - sizes["window"] + 1) if sizes["window"] else 0


def gathered(prepared, arrays):
    """q [n_seqs, n_heads, n_query, head_dim], and contiguous k, v [n_seqs, n_kv_heads, n_keys, head_dim]."""
    import torch
    s, batch = prepared.case.sizes, arrays["batch"]
    (n_seqs, n_query, context), = s["rows"]
    positions = np.arange(oldest(s), context)
    slots = np.empty((n_seqs, len(positions)), np.int64)
    for i, held in enumerate(batch.lists):
        pages = np.array(held.pages)[positions // batch.page_size - held.first]
        slots[i] = pages * batch.page_size + positions % batch.page_size
    q = as_torch(arrays["q"]).view(n_seqs, n_query, s["n_heads"], s["head_dim"]).transpose(1, 2).contiguous()
    where = torch.from_numpy(slots).to(q.device)
    k, v = (as_torch(arrays[name]).flatten(0, 1)[where].transpose(1, 2).contiguous() for name in ("k_pages", "v_pages"))
    return q, k, v


def flat(mixed):
    """[n_seqs, n_heads, n_query, head_dim] as the op's output has it."""
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


def needs_window(sizes):
    (_, n_query, context), = sizes["rows"]
    return n_query > 1 and bool(sizes["window"]) and context > sizes["window"]


def sdpa(prepared, backend=None):
    """A decode step puts the queries of one KV head into one product, so that no key is read twice. Prompts are causal,
    where a window cuts them by a mask; patches of a picture see all of it.

    backend  one of torch's SDPBackend by name; None leaves the choice to torch
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(*tensors, **options):
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
            return F.scaled_dot_product_attention(*tensors, **options)
    s = prepared.case.sizes
    (_, n_query, context), = s["rows"]
    options = {"scale": s["head_dim"] ** -0.5}

    def bind(arrays):
        q, k, v = gathered(prepared, arrays)
        if n_query == 1:
            grouped = q.reshape(len(q), s["n_kv_heads"], -1, s["head_dim"])
            return lambda: flat(attend(grouped, k, v, **options).reshape(q.shape))
        seen = {"is_causal": not s.get("sees_all")}
        if needs_window(s):
            at = torch.arange(context, device=q.device)
            seen = {"attn_mask": (at <= at[:, None]) & (at > at[:, None] - s["window"])}
        group = s["n_heads"] // s["n_kv_heads"]
        if group > 1 and (s["head_dim"] > 256 or needs_window(s)):      # only kernels without grouped heads take these
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        return lambda: flat(attend(q, k, v, enable_gqa=group > 1, **seen, **options))
    return [bind(arrays) for arrays in prepared.sets]


def flex(prepared):
    """Compiled, with the blocks that causality and the window leave; decode steps and patches see every key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    s = prepared.case.sizes
    (_, n_query, context), = s["rows"]
    window, blocks = s["window"] or context, None

    def is_seen(seq, head, query, key):
        return (key <= query) & (key > query - window)
    run = compiled(flex_attention, prepared.lane)
    options = {"scale": s["head_dim"] ** -0.5, "enable_gqa": s["n_heads"] > s["n_kv_heads"]}

    def bind(arrays):
        q, k, v = gathered(prepared, arrays)
        return lambda: flat(run(q, k, v, block_mask=blocks, **options))
    launches = [bind(arrays) for arrays in prepared.sets]
    if n_query > 1 and not s.get("sees_all"):
        device = as_torch(prepared.sets[0]["q"]).device
        blocks = create_block_mask(is_seen, None, None, n_query, context, device=device)
    return launches


def flashinfer(prepared):
    """Its paged decode or prefill on our own pages, planned beforehand; pages that no query sees are left out."""
    import flashinfer as library
    import torch
    s = prepared.case.sizes
    (n_seqs, n_query, context), = s["rows"]
    workspace = torch.empty(FLASHINFER_BYTES, dtype=torch.uint8, device=as_torch(prepared.sets[0]["q"]).device)

    def bind(arrays):
        q, pages = as_torch(arrays["q"]), tuple(as_torch(arrays[name]) for name in ("k_pages", "v_pages"))
        size, first = arrays["batch"].page_size, oldest(s) // arrays["batch"].page_size
        indices = [held.pages[first - held.first:-(-context // size) - held.first] for held in arrays["batch"].lists]

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=q.device)
        indptr = ints(np.cumsum([0, *map(len, indices)]).tolist())
        tables = indptr, ints(list(chain.from_iterable(indices))), ints([(context - 1) % size + 1] * n_seqs)
        heads = s["n_heads"], s["n_kv_heads"], s["head_dim"], size
        options = {"window_left": s["window"] - 1 if s["window"] else -1, "q_data_type": q.dtype,
                   "kv_data_type": q.dtype, "sm_scale": s["head_dim"] ** -0.5}
        if n_query == 1:
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(*tables, *heads, **options)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(ints([i * n_query for i in range(n_seqs + 1)]), *tables, *heads,
                         causal=not s.get("sees_all"), **options)
        rows = q.view(-1, s["n_heads"], s["head_dim"])
        return lambda: wrapper.run(rows, pages).flatten(1)
    return [bind(arrays) for arrays in prepared.sets]
