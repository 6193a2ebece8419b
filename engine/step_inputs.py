"""What a step reads besides weights, cache and activations, packed into one buffer: one copy to the device."""

from dataclasses import dataclass, fields
from math import prod

import numpy as np

from engine.kernels.paged import ITEM, PagedInputs, blocks, plan, work_capacity
from engine.sampler import NO_EDITS, LogitEdits, SamplingBatch

ALIGNED = 16                # bytes: whatever a kernel loads at once begins on such a boundary
EDITS_A_ROW = 512           # LogitEdits that a captured decode step has room for, a sequence
EDITS_OF_ROWS = ("edits.repetition", "edits.presence", "edits.frequency")       # the others are one an edit


class Packed:
    """Named arrays in one step buffer, at places fixed by their capacities.

    buffer  a lane's step buffer
    fields  {name: (dtype, capacity shape)}; the last one may be filled in part, and only what is filled is sent
    """

    def __init__(self, buffer, fields):
        self._buffer, self._host, self.device, at = buffer, {}, {}, 0
        for name, (dtype, shape) in fields.items():
            n_bytes = prod(shape) * np.dtype(dtype).itemsize
            for views, memory in ((self._host, buffer.host), (self.device, buffer.device)):
                views[name] = memory[at:at + n_bytes].view(dtype).reshape(shape)
            self._last, at = (name, at), at + -(-n_bytes // ALIGNED) * ALIGNED

    @staticmethod
    def n_bytes(fields):
        """Bytes of a buffer that holds `fields`."""
        return sum(-(-prod(shape) * np.dtype(dtype).itemsize // ALIGNED) * ALIGNED for dtype, shape in fields.values())

    def send(self, arrays, padding=None):
        """Writes {name: array} and starts the copy. Where an array is shorter than its place, the rest is zero, or what
        {name: value} `padding` says."""
        n_last = 0
        for name, array in arrays.items():
            place, n = self._host[name], len(array)
            place[:n] = array
            if n < len(place) and name != self._last[0]:
                place[n:] = (padding or {}).get(name, 0)
            if name == self._last[0]:
                n_last = n * place.itemsize * prod(place.shape[1:])
        self._buffer.send(self._last[1] + n_last)


@dataclass
class StagedBatch:
    """A Batch as ops on a lane read it: the same names, arrays in the lane's memory.

    pools, kept_pools  one PagedInputs per KV pool; of kept_pools only the one that the last layer uses
    edits, sampling    StagedEdits, SamplingBatch
    """

    token_ids: object
    positions: object
    kept: object
    pools: tuple
    kept_pools: dict
    take_rows: object
    take_next: object
    sample_rows: object
    edits: object
    sampling: SamplingBatch

    @property
    def n_tokens(self):
        return len(self.token_ids)

    def kept_pool(self, p):
        """Pool p with the kept tokens as its queries."""
        return self.kept_pools[p]


@dataclass(frozen=True)
class StagedEdits(LogitEdits):
    """LogitEdits with room to spare: only the first n_edits [1] i32 entries count."""

    n_edits: object


class DecodeInputs:
    """The inputs of decode steps of up to so many sequences, at addresses that never change: what a graph reads.

    batch  the StagedBatch, of the largest size; rows beyond a step's own compute what nobody reads and write no k or v
    """

    def __init__(self, packed, batch, arrays_of, n_edits):
        self.batch, self._packed, self._arrays_of, self._n_edits = batch, packed, arrays_of, n_edits

    def holds(self, batch):
        """Whether the batch's edits fit."""
        return len(batch.edits.token) <= self._n_edits

    def send(self, batch):
        """Starts the copy of a decode Batch."""
        arrays = self._arrays_of(batch)
        self._packed.send(arrays, {**{name: -1 for name in arrays if name.startswith("slots")},
                                    "cu_seqlens": batch.n_tokens, "sampling.is_greedy": True})


class Stager:
    """Brings the batches of one engine to its lane."""

    def __init__(self, spec, kv_cache, max_seq_len, max_tokens, lane):
        self._lane, self._kv_cache, self._max_seq_len = lane, kv_cache, max_seq_len
        self._heads = spec.layers[0].attention.n_heads
        self._last = kv_cache.layer_slot[len(spec.layers) - 1][0]
        n_ints = 16 * max_tokens + sum(
            pages.n_pages + ITEM * work_capacity(max_tokens, pool.n_kv_heads, pool.head_dim)
            for pool, pages in zip(kv_cache.specs, kv_cache.allocators, strict=True))
        self._buffer = lane.step_buffer(4 * n_ints + (1 << 16))         # of edits there may be more

    def __call__(self, batch):
        """The StagedBatch of a Batch; it is good until the next one."""
        arrays = self._arrays(batch)
        fields = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        n_bytes = Packed.n_bytes(fields)
        if n_bytes > len(self._buffer.host):                # penalties on long texts
            self._buffer = self._lane.step_buffer(2 * n_bytes)
        packed = Packed(self._buffer, fields)
        packed.send(arrays)
        return self._staged(packed.device)

    def decode(self, n_seqs):
        """The DecodeInputs for up to n_seqs sequences."""
        n_edits = n_seqs * EDITS_A_ROW
        ints = {"token_ids": (n_seqs,), "positions": (n_seqs,), "take_rows": (0,), "take_next": (0,),
                "sample_rows": (n_seqs,), "context_lens": (n_seqs,), "cu_seqlens": (n_seqs + 1,), "edits.n_edits": (1,)}
        n_pages = 0
        for p, (spec, pages) in enumerate(zip(self._kv_cache.specs, self._kv_cache.allocators, strict=True)):
            ints |= {f"page_begin{p}": (n_seqs,), f"slots{p}": (n_seqs,), f"work{p}.n_decode": (1,),
                     f"work{p}.decode": (work_capacity(n_seqs, spec.n_kv_heads, spec.head_dim), ITEM),
                     f"work{p}.n_prefill": (1,), f"work{p}.prefill": (0, ITEM)}
            n_pages += min(pages.n_pages, n_seqs * -(-self._max_seq_len // self._kv_cache.page_size))
        places = {name: (np.int32, shape) for name, shape in ints.items()}
        places |= {name: (column.dtype, (n_seqs,))
                   for name, column in _columns("sampling", SamplingBatch.build(())).items()}
        places |= {name: (column.dtype, (n_seqs if name in EDITS_OF_ROWS else n_edits,))
                   for name, column in _columns("edits", NO_EDITS).items()}
        places |= {"page_table": (np.int32, (n_pages,))}
        packed = Packed(self._lane.step_buffer(Packed.n_bytes(places)), places)
        return DecodeInputs(packed, self._staged(packed.device), self._arrays, n_edits)

    def _arrays(self, batch):
        """{name: host array} of everything that is staged; the page tables, whose size varies most, are last."""
        first, page_begins = 0, {}
        for p, pool in enumerate(batch.pools):
            page_begins[f"page_begin{p}"] = pool.page_begin + np.int32(first)
            first += len(pool.page_table)
        arrays = {"token_ids": batch.token_ids, "positions": batch.positions, "take_rows": batch.take_rows,
                  "take_next": batch.take_next, "sample_rows": batch.sample_rows,
                  "context_lens": batch.pools[0].context_lens, "cu_seqlens": batch.pools[0].cu_seqlens, **page_begins,
                  **_columns("sampling", batch.sampling), **_columns("edits", batch.edits),
                  "edits.n_edits": np.array([len(batch.edits.token)], np.int32)}
        for p, pool in enumerate(batch.pools):
            arrays |= {f"slots{p}": pool.slots, **self._work(f"work{p}", p, pool)}
        if batch.kept is not None:
            kept = batch.kept_pool(self._last)
            arrays |= {"kept": batch.kept, "kept_cu_seqlens": kept.cu_seqlens,
                       **self._work("kept_work", self._last, kept)}
        return arrays | {"page_table": np.concatenate([pool.page_table for pool in batch.pools])}

    def _work(self, name, p, pool):
        spec = self._kv_cache.specs[p]
        work = plan(pool.rows, n_heads=self._heads, n_kv_heads=spec.n_kv_heads, head_dim=spec.head_dim,
                    window=spec.window)
        return {f"{name}.decode": work.decode, f"{name}.n_decode": np.array([len(work.decode)], np.int32),
                f"{name}.prefill": work.prefill, f"{name}.n_prefill": np.array([len(work.prefill)], np.int32)}

    def _staged(self, arrays):
        """The StagedBatch of arrays on the lane."""
        pools = tuple(self._paged(arrays, p, f"work{p}", "cu_seqlens") for p in range(len(self._kv_cache.specs)))
        kept = arrays.get("kept")
        kept_pools = {}
        if kept is not None:
            kept_pools[self._last] = self._paged(arrays, self._last, "kept_work", "kept_cu_seqlens")
        return StagedBatch(arrays["token_ids"], arrays["positions"], kept, pools, kept_pools, arrays["take_rows"],
                           arrays["take_next"], arrays["sample_rows"], _of(StagedEdits, "edits", arrays),
                           _of(SamplingBatch, "sampling", arrays))

    def _paged(self, arrays, p, work, cu_seqlens):
        n_kv_heads = self._kv_cache.specs[p].n_kv_heads
        decode, prefill = arrays[f"{work}.decode"], arrays[f"{work}.prefill"]
        return PagedInputs(slots=arrays[f"slots{p}"], page_table=arrays["page_table"],
                           page_begin=arrays[f"page_begin{p}"], context_lens=arrays["context_lens"],
                           cu_seqlens=arrays[cu_seqlens], last_visible=None,
                           page_size=self._kv_cache.page_size, decode_work=decode,
                           n_decode_work=arrays[f"{work}.n_decode"], n_decode_blocks=blocks(len(decode), n_kv_heads),
                           prefill_work=prefill, n_prefill_work=arrays[f"{work}.n_prefill"],
                           n_prefill_blocks=blocks(len(prefill), n_kv_heads))


def _columns(prefix, columns):
    """{prefix.field: array} of a dataclass of arrays."""
    return {f"{prefix}.{field.name}": getattr(columns, field.name) for field in fields(columns)}


def _of(kind, prefix, arrays):
    """The dataclass whose columns _columns took apart."""
    return kind(**{field.name: arrays[f"{prefix}.{field.name}"] for field in fields(kind)})
