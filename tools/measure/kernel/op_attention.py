"""Ops between q, k, v and the KV cache. What each is measured on, and what its twin makes of it."""

from dataclasses import replace

import numpy as np

from engine import reference
from engine.batch import PagedBatch
from engine.kernels import paged
from engine.kernels.paged import PagedInputs
from engine.kv_cache import PageList
from measure.kernel.kernel_inputs import (
    EPS,
    FLOAT32,
    ONE_ROUNDING,
    PAGE_SIZE,
    TWO_ROUNDINGS,
    WEIGHT_OFFSET,
    Comparison,
    Op,
    f64,
    rows_of,
    spread,
)

LONG_CONTEXT = 16384        # from here on one token is compared


class RopeAngles(Op):
    words = "{n_pairs} pairs"

    def make(self, data, s, first=None):
        n, n_pairs = s["n_tokens"], s["n_pairs"]
        return {"positions": data.put(data.rng.integers(0, 32768, (n, 2) if s.get("n_axes") == 2 else n)),
                "inv_freq": data.put(1e4 ** (-np.arange(n_pairs) / n_pairs), np.float32),
                "out": data.empty((n, 2, n_pairs), np.float32)}

    def call(self, a, s):
        return (a["positions"], a["inv_freq"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        want = np.empty((len(rows), 2, s["n_pairs"]))
        reference.rope_angles(lane.to_host(a["positions"])[rows], lane.to_host(a["inv_freq"]), want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, FLOAT32)


class AttentionTemperature(Op):
    words = "floor {floor}"

    def make(self, data, s, first=None):
        return {"positions": data.put(data.rng.integers(0, 1 << 20, s["n_tokens"])),
                "out": data.empty((s["n_tokens"],), np.float32)}

    def call(self, a, s):
        return (a["positions"], s["scale"], s["floor"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        want = np.empty(len(rows))
        reference.attention_temperature(lane.to_host(a["positions"])[rows], s["scale"], s["floor"], want)
        yield Comparison("out", lane.to_host(a["out"])[rows], want, FLOAT32)


class QkNormRopeCache(Op):
    words = "{n_heads} query and {n_kv_heads} KV heads of {head_dim}"

    def make(self, data, s, first=None):
        n, heads, kv_heads, head_dim = s["n_tokens"], s["n_heads"], s["n_kv_heads"], s["head_dim"]
        n_in = heads + (kv_heads * (1 if s["v_is_k"] else 2) if s["has_kv"] else 0)
        pages = -(-n // PAGE_SIZE) + 1, PAGE_SIZE, kv_heads, head_dim
        made = {"qkv": data.normal((n, n_in * head_dim)), "out": data.empty((n, heads * head_dim)),
                **dict.fromkeys(("q_norm", "k_norm", "angles", "temperature", "slots", "k_pages", "v_pages"))}
        if s["qk_norm"] == "weighted":
            made |= {"q_norm": data.normal((head_dim,)), "k_norm": data.normal((head_dim,)) if s["has_kv"] else None}
        if s["n_pairs"] is not None:
            angle = data.rng.uniform(0, 2 * np.pi, (n, 1, s["n_pairs"]))
            made["angles"] = data.put(np.concatenate([np.cos(angle), np.sin(angle)], axis=1), np.float32)
        if s["has_temperature"]:
            made["temperature"] = data.put(data.rng.uniform(1, 2, n), np.float32)
        if s["has_kv"]:
            made |= {"slots": data.put(data.rng.permutation(pages[0] * PAGE_SIZE)[:n]), "k_pages": data.empty(pages),
                     "v_pages": data.empty(pages)}
        return made

    def _kwargs(self, s):
        return {"n_heads": s["n_heads"], "v_norm": s["v_norm"], "v_is_k": s["v_is_k"], "eps": EPS,
                "weight_offset": WEIGHT_OFFSET, "interleaved": s["interleaved"], "qk_norm": s["qk_norm"]}

    def call(self, a, s):
        return (a["qkv"], a["q_norm"], a["k_norm"], a["angles"], a["slots"], a["k_pages"], a["v_pages"]), \
            {**self._kwargs(s), "temperature": a["temperature"], "out": a["out"]}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 32)
        want = np.empty((len(rows), s["n_heads"] * s["head_dim"]))
        pages, to = (None, None), None
        if s["has_kv"]:
            pages = np.zeros((2, 1, len(rows), s["n_kv_heads"], s["head_dim"]))
            to = np.arange(len(rows), dtype=np.int32)
        norms = [None if a[name] is None else f64(lane.to_host(a[name])) for name in ("q_norm", "k_norm")]
        angles, temperature = (None if a[name] is None else f64(rows_of(lane, a[name], rows))
                               for name in ("angles", "temperature"))
        reference.qk_norm_rope_cache(f64(rows_of(lane, a["qkv"], rows)), *norms, angles, to, *pages, **self._kwargs(s),
                                     temperature=temperature, out=want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, ONE_ROUNDING)
        if not s["has_kv"]:
            return
        slots = lane.to_host(a["slots"])[rows].tolist()
        for name, cached in zip(("k_pages", "v_pages"), pages, strict=True):
            flat = a[name].reshape(-1, s["n_kv_heads"], s["head_dim"])
            yield Comparison(name, rows_of(lane, flat, slots), cached[0], ONE_ROUNDING)


class Attention(Op):
    words = "{rows}, {n_heads} query and {n_kv_heads} KV heads of {head_dim}, window {window}"

    def make(self, data, s, first=None):
        batch, n_pages = self._batch(data.rng, s)
        pages = n_pages, PAGE_SIZE, s["n_kv_heads"], s["head_dim"]
        shape = batch.rows[-1][1], s["n_heads"] * s["head_dim"]
        size = paged.scratch_size(s["n_kv_heads"], s["head_dim"])
        return {"q": data.normal(shape), "k_pages": data.normal(pages), "v_pages": data.normal(pages), "batch": batch,
                "paged": self._paged(data, s, batch), "out": data.empty(shape),
                "scratch": first["scratch"] if first else data.scratch(size)}

    @staticmethod
    def _batch(rng, s):
        """(PagedBatch of sizes["rows"] over shuffled pages, pages in all). Pages that no new token sees are gone."""
        rows, end = [], 0
        for n_seqs, n_query, context in s["rows"]:
            for _ in range(n_seqs):
                rows.append((end, end + n_query, context))
                end += n_query
        firsts = [first_seen(context - (end - begin), s) // PAGE_SIZE for begin, end, context in rows]
        counts = [-(-context // PAGE_SIZE) - first for (_, _, context), first in zip(rows, firsts, strict=True)]
        pages = rng.permutation(sum(counts)).tolist()
        lists = [PageList([pages.pop() for _ in range(n)], first) for n, first in zip(counts, firsts, strict=True)]
        slots = [held.pages[at // PAGE_SIZE - held.first] * PAGE_SIZE + at % PAGE_SIZE
                 for held, (begin, end, context) in zip(lists, rows, strict=True)
                 for at in range(context - (end - begin), context)]
        last_visible = None                                 # of pictures every patch sees the last one
        if s.get("sees_all"):
            last_visible = np.array([context - 1 for begin, end, context in rows for _ in range(begin, end)], np.int32)
        return PagedBatch(lists, np.array(slots, np.int32), rows, PAGE_SIZE, last_visible), sum(counts)

    @staticmethod
    def _paged(data, s, batch):
        """What the lane's attention reads of the batch."""
        if not data.lane.stages:
            return batch
        work = paged.plan(batch.rows, n_heads=s["n_heads"], n_kv_heads=s["n_kv_heads"], head_dim=s["head_dim"],
                          window=s["window"], chunk=s["chunk"], last_visible=batch.last_visible)
        n_blocks = [paged.blocks(len(items), s["n_kv_heads"]) for items in work]
        return PagedInputs(
            slots=data.put(batch.slots), page_table=data.put(batch.page_table), page_begin=data.put(batch.page_begin),
            context_lens=data.put(batch.context_lens), cu_seqlens=data.put(batch.cu_seqlens),
            last_visible=None if batch.last_visible is None else data.put(batch.last_visible), page_size=PAGE_SIZE,
            decode_work=data.put(work.decode), n_decode_work=data.put([len(work.decode)]),
            n_decode_blocks=n_blocks[0], prefill_work=data.put(work.prefill),
            n_prefill_work=data.put([len(work.prefill)]), n_prefill_blocks=n_blocks[1])

    def call(self, a, s):
        return (a["q"], a["k_pages"], a["v_pages"], a["paged"]), {
            "scale": s["head_dim"] ** -0.5, "out": a["out"], "scratch": a["scratch"], "window": s["window"],
            "chunk": s["chunk"]}

    def counted(self, a, s):
        (q, k, v, inputs), kwargs = self.call(a, s)
        if isinstance(inputs, PagedInputs):
            batch = a["batch"]
            inputs = replace(inputs, cu_seqlens=batch.cu_seqlens, context_lens=batch.context_lens,
                             last_visible=batch.last_visible)
        return (q, k, v, inputs), kwargs

    def compare(self, lane, a, s, run):
        """Single tokens against all they see, in float32 where that is long: its error is far below bfloat16's."""
        run()
        batch, got, want = a["batch"], [], []
        last = len(batch.rows) - 1
        tokens = {(0, batch.rows[0][0]), (last, batch.rows[last][1] - 1),
                  (last // 2, sum(batch.rows[last // 2][:2]) // 2)}
        if batch.rows[last][2] >= LONG_CONTEXT:             # a token takes the host a second and more
            tokens = {(last, batch.rows[last][1] - 1)}
        for i, token in sorted(tokens):
            held, (_, end, context) = batch.lists[i], batch.rows[i]
            seen = context if s.get("sees_all") else context - (end - 1 - token)
            first = first_seen(seen - 1, s) // PAGE_SIZE
            pages = held.pages[first - held.first:-(-seen // PAGE_SIZE) - held.first]
            dtype = np.float64 if len(pages) < 256 else np.float32
            k, v = (rows_of(lane, a[name], pages).astype(dtype) for name in ("k_pages", "v_pages"))
            alone = PagedBatch([PageList(list(range(len(pages))), first)], None, [(0, 1, seen)], PAGE_SIZE)
            q = rows_of(lane, a["q"], [token]).astype(dtype)
            want.append(np.empty(q.shape, dtype))
            reference.attention(q, k, v, alone, scale=s["head_dim"] ** -0.5, out=want[-1], window=s["window"],
                                chunk=s["chunk"])
            got.append(rows_of(lane, a["out"], [token]))
        yield Comparison("out", np.concatenate(got), np.concatenate(want), TWO_ROUNDINGS)


def first_seen(position, s):
    """The first position that the token at `position` sees."""
    in_chunk = position % s["chunk"] if s["chunk"] else position
    return position - min(in_chunk, s["window"] - 1 if s["window"] else position)
