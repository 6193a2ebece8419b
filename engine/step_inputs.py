"""What a step reads besides weights, cache and activations, packed into one buffer: one copy to the device."""

from dataclasses import dataclass, fields
from math import prod

import numpy as np

from engine.draft_inputs import DraftStager, StagedSlots
from engine.kernels.paged import ITEM, TILE_ROWS, PagedInputs, blocks, geometry, plan, work_capacity
from engine.sampler import NO_EDITS, LogitEdits, SamplingBatch

ALIGNED = 16                # bytes: whatever a kernel loads at once begins on such a boundary
EDITS_A_ROW = 512           # LogitEdits that a step has room for, of each row whose next token is decided
MOST_FIELDS = 96            # of a step, each of which may leave ALIGNED bytes unused
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
            self._last, at = (name, at), at + _aligned(n_bytes)

    @staticmethod
    def n_bytes(fields):
        """Bytes of a buffer that holds `fields`."""
        return sum(_aligned(prod(shape) * np.dtype(dtype).itemsize) for dtype, shape in fields.values())

    def send(self, arrays, padding=None):
        """Writes {name: array} and starts the copy. Where an array is shorter than its place, the rest gets the value
        that {name: value} `padding` has, or may hold anything."""
        n_last = 0
        for name, array in arrays.items():
            place, n = self._host[name], len(array)
            place[:n] = array
            if n < len(place) and padding and name in padding:
                place[n:] = padding[name]
            if name == self._last[0]:
                n_last = n * place.itemsize * prod(place.shape[1:])
        self._buffer.send(self._last[1] + n_last)


@dataclass
class StagedBatch:
    """A Batch as ops on a lane read it: the same names, arrays in the lane's memory.

    pools, kept_pools  one PagedInputs per KV pool; of kept_pools only those that are read once rows are dropped
    per_layer_rows     as in Batch, and so are media_rows and media_source
    edits, sampling    StagedEdits, SamplingBatch
    slots              StagedSlots, where the Batch has Slots
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
    per_layer_rows: object
    media_rows: object
    media_source: object
    slots: StagedSlots | None = None

    @property
    def n_tokens(self):
        return len(self.token_ids)


@dataclass(frozen=True)
class StagedEdits(LogitEdits):
    """LogitEdits with room to spare: only the first n_edits [1] i32 entries count."""

    n_edits: object


class DecodeInputs:
    """The inputs of decode steps of up to so many sequences, at addresses that never change: what a graph reads.

    n_seqs, n_drafts  sequences, and drafts of each to judge and to make, at most
    batch      the StagedBatch, of the largest size; rows beyond a step's own are token 0, cached nowhere, attended to
               nothing and sampled greedily, and nobody reads what comes of them
    n_edits    LogitEdits that there is room for
    """

    def __init__(self, n_seqs, n_drafts, n_edits, packed, batch, arrays_of):
        self.n_seqs, self.n_drafts, self.n_edits = n_seqs, n_drafts, n_edits
        self.batch, self._packed, self._arrays_of = batch, packed, arrays_of
        self._padding = {"token_ids": 0, "positions": 0, "sample_rows": 0, "sampling.is_greedy": True,
                         "per_layer_rows": 0,
                         **{f"slots{p}": -1 for p in range(len(batch.pools))}}

    def __str__(self):
        """What tells it from others."""
        more = [f"{self.n_drafts} drafts"] * (self.n_drafts > 0) + [f"{self.n_edits} edits"] * (self.n_edits > 0)
        return f"{self.n_seqs}{' with ' * bool(more)}{' and '.join(more)}"

    def send(self, batch):
        """Starts the copy of a decode Batch."""
        self._packed.send(self._arrays_of(batch), self._padding | DraftStager.padding(len(batch.to_sample)))


class Stager:
    """Brings the batches of one engine to its lane, through one buffer of its own.

    has_rows     batches have per_layer_rows
    longest_run  soft tokens of the largest picture, where layers see all of it
    max_slots    rows whose next token is decided, at most; None without drafts
    drafts       DraftStager, or None
    """

    def __init__(self, spec, kv_cache, max_seq_len, max_tokens, max_seqs, lane, has_rows=False, longest_run=1,
                 max_slots=None, drafts=None):
        self._lane, self._kv_cache, self._max_seq_len = lane, kv_cache, max_seq_len
        self._max_tokens, self._drafts = max_tokens, drafts
        self._heads = spec.layers[0].attention.n_heads
        self._kept_pools = sorted({kv_cache.layer_slot[i][0] for i in range(spec.drops_at, len(spec.layers))})
        self._row = (lane.dtype, spec.per_layer_width) if has_rows else None
        row_bytes = spec.per_layer_width * lane.dtype.itemsize * has_rows
        self._buffer = self._decode_buffer = lane.step_buffer(
            self.n_bytes(kv_cache.specs, max_tokens, max_seqs, max_seq_len, kv_cache.page_size, row_bytes, longest_run,
                         max_slots, drafts.n_bytes(max_seqs, max_slots) if drafts else 0))
        self._decode_inputs = {}

    @staticmethod
    def n_bytes(pools, max_tokens, max_seqs, max_seq_len, page_size, row_bytes=0, longest_run=1, max_slots=None,
                draft_bytes=0):
        """Bytes of the buffer, with row_bytes of per_layer_rows a token, and what a DraftStager wants; only a step with
        more than EDITS_A_ROW edits a slot needs another."""
        n_seqs, n_slots = min(max_seqs, max_tokens), min(max_slots or max_seqs, max_tokens)
        n_ints = 11 * max_tokens + 5 * (n_seqs + 1)
        for pool in pools:
            n_ints += max_tokens + n_seqs + 2 * ITEM * work_capacity(
                max_tokens, max_seq_len, pool.n_kv_heads, pool.head_dim, pool.window, pool.chunk, 2 * (longest_run - 1))
            n_ints += n_seqs * -(-max_seq_len // page_size)
        columns = [*_columns("", SamplingBatch.build(())).values(), *EDITS_A_ROW * [*_columns("", NO_EDITS).values()]]
        return (4 * n_ints + n_slots * sum(column.itemsize for column in columns) + max_tokens * row_bytes
                + draft_bytes + ALIGNED * MOST_FIELDS)

    def __call__(self, batch):
        """The StagedBatch of a Batch; it is good until the next one."""
        arrays = self._arrays(batch)
        fields = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        self._buffer = self._with_room(self._buffer, fields)
        packed = Packed(self._buffer, fields)
        packed.send(arrays)
        return self._staged(packed.device)

    def decode(self, n_seqs, n_drafts, n_edits):
        """The DecodeInputs for up to n_seqs sequences with n_drafts drafts each, and n_edits LogitEdits in all."""
        n_rows = min(n_seqs * (1 + n_drafts), self._max_tokens)
        n_edits = edits_room(n_rows, n_edits)
        key = n_seqs, n_drafts, n_edits
        if key not in self._decode_inputs:
            fields = self._decode_fields(n_seqs, n_drafts, n_rows, n_edits)
            self._decode_buffer = self._with_room(self._decode_buffer, fields)      # those made before keep theirs
            packed = Packed(self._decode_buffer, fields)
            self._decode_inputs[key] = DecodeInputs(*key, packed, self._staged(packed.device), self._arrays)
        return self._decode_inputs[key]

    def _with_room(self, buffer, fields):
        """The step buffer, or where `fields` do not fit a new one with room to spare."""
        n_bytes = Packed.n_bytes(fields)
        return buffer if n_bytes <= len(buffer.host) else self._lane.step_buffer(2 * n_bytes)

    def _decode_fields(self, n_seqs, n_drafts, n_rows, n_edits):
        """The fields of Packed for decode steps of so many sequences, drafts of each, rows in all and edits."""
        ints = {"token_ids": (n_rows,), "positions": (n_rows,), "take_rows": (0,), "take_next": (0,),
                "sample_rows": (n_rows,), "context_lens": (n_seqs,), "cu_seqlens": (n_seqs + 1,), "edits.n_edits": (1,)}
        n_pages = 0
        for p, (spec, pages) in enumerate(zip(self._kv_cache.specs, self._kv_cache.allocators, strict=True)):
            n_decode, n_prefill = (
                work_capacity(n_tiles, self._max_seq_len, spec.n_kv_heads, spec.head_dim, spec.window, spec.chunk)
                if n_tiles else 0 for n_tiles in (n_seqs, self._prefill_tiles(spec, n_seqs, n_drafts, n_rows)))
            ints |= {f"page_begin{p}": (n_seqs,), f"slots{p}": (n_rows,), f"work{p}.n_decode": (1,),
                     f"work{p}.decode": (n_decode, ITEM), f"work{p}.n_prefill": (1,),
                     f"work{p}.prefill": (n_prefill, ITEM)}
            n_pages += min(pages.n_pages, n_seqs * -(-self._max_seq_len // self._kv_cache.page_size))
        places = {name: (np.int32, shape) for name, shape in ints.items()}
        places |= {name: (column.dtype, (n_rows,))
                   for name, column in _columns("sampling", SamplingBatch.build(())).items()}
        places |= {name: (column.dtype, (n_rows if name in EDITS_OF_ROWS else n_edits,))
                   for name, column in _columns("edits", NO_EDITS).items()}
        if n_drafts:
            places |= self._drafts.places(n_seqs, n_rows)
        if self._row:
            places["per_layer_rows"] = self._row[0], (n_rows, self._row[1])
        return places | {"page_table": (np.int32, (n_pages,))}

    def _prefill_tiles(self, pool, n_seqs, n_drafts, n_rows):
        """Tiles of the prefill kernel that n_rows rows of n_seqs sequences make at most: where a sequence's are more
        than one tile of the decode kernel."""
        n_queries = (1 + n_drafts) * self._heads // pool.n_kv_heads
        tile = geometry(pool.head_dim, False).rows
        return min(n_seqs * -(-n_queries // tile), n_rows) if n_queries > TILE_ROWS else 0

    def _arrays(self, batch):
        """{name: host array} of everything that is staged; the page tables, whose size varies most, are last."""
        first, page_begins = 0, {}
        for p, pool in enumerate(batch.pools):
            page_begins[p] = pool.page_begin + np.int32(first)
            first += len(pool.page_table)
        arrays = {"token_ids": batch.token_ids, "positions": batch.positions, "take_rows": batch.take_rows,
                  "take_next": batch.take_next, "sample_rows": batch.sample_rows,
                  "context_lens": batch.pools[0].context_lens, "cu_seqlens": batch.pools[0].cu_seqlens,
                  **{f"page_begin{p}": begin for p, begin in page_begins.items()},
                  **_columns("sampling", batch.sampling), **_columns("edits", batch.edits),
                  "edits.n_edits": np.array([len(batch.edits.token)], np.int32)}
        for p, pool in enumerate(batch.pools):
            arrays |= {f"slots{p}": pool.slots, **self._work(f"work{p}", p, pool)}
        arrays |= _visible("", batch.pools)
        if batch.kept is not None:
            kept = {p: batch.kept_pools[p] for p in self._kept_pools}
            arrays |= {"kept": batch.kept, "kept_cu_seqlens": kept[self._kept_pools[0]].cu_seqlens}
            for p, pool in kept.items():
                arrays |= self._work(f"kept_work{p}", p, pool)
            arrays |= _visible("kept_", kept.values())
        if batch.media_rows is not None:
            arrays |= {"media_rows": batch.media_rows, "media_source": batch.media_source}
        if batch.slots is not None:
            arrays |= self._drafts.arrays(batch.slots, page_begins)
        if self._row:
            arrays["per_layer_rows"] = batch.per_layer_rows
        return arrays | {"page_table": np.concatenate([pool.page_table for pool in batch.pools])}

    def _work(self, name, p, pool):
        spec = self._kv_cache.specs[p]
        work = plan(pool.rows, n_heads=self._heads, n_kv_heads=spec.n_kv_heads, head_dim=spec.head_dim,
                    window=spec.window, chunk=spec.chunk, last_visible=pool.last_visible,
                    first_visible=pool.first_visible)
        return {f"{name}.decode": work.decode, f"{name}.n_decode": np.array([len(work.decode)], np.int32),
                f"{name}.prefill": work.prefill, f"{name}.n_prefill": np.array([len(work.prefill)], np.int32)}

    def _staged(self, arrays):
        """The StagedBatch of arrays on the lane."""
        pools = tuple(self._paged(arrays, p, "") for p in range(len(self._kv_cache.specs)))
        kept = arrays.get("kept")
        kept_pools = {} if kept is None else {p: self._paged(arrays, p, "kept_") for p in self._kept_pools}
        return StagedBatch(arrays["token_ids"], arrays["positions"], kept, pools, kept_pools, arrays["take_rows"],
                           arrays["take_next"], arrays["sample_rows"], _of(StagedEdits, "edits", arrays),
                           _of(SamplingBatch, "sampling", arrays), arrays.get("per_layer_rows"),
                           arrays.get("media_rows"), arrays.get("media_source"),
                           self._drafts and self._drafts.staged(arrays))

    def _paged(self, arrays, p, prefix):
        """The PagedInputs of pool p; prefix: "", or "kept_" for those of the kept rows."""
        spec, work = self._kv_cache.specs[p], f"{prefix}work{p}"
        n_kv_heads, decode, prefill = spec.n_kv_heads, arrays[f"{work}.decode"], arrays[f"{work}.prefill"]
        return PagedInputs(slots=arrays[f"slots{p}"], page_table=arrays["page_table"],
                           page_begin=arrays[f"page_begin{p}"], context_lens=arrays["context_lens"],
                           cu_seqlens=arrays[f"{prefix}cu_seqlens"],
                           last_visible=arrays.get(f"{prefix}last_visible") if spec.sees_blocks else None,
                           first_visible=arrays.get(f"{prefix}first_visible") if spec.sees_whole_blocks else None,
                           page_size=self._kv_cache.page_size, decode_work=decode,
                           n_decode_work=arrays[f"{work}.n_decode"], n_decode_blocks=blocks(len(decode), n_kv_heads),
                           prefill_work=prefill, n_prefill_work=arrays[f"{work}.n_prefill"],
                           n_prefill_blocks=blocks(len(prefill), n_kv_heads))


def edits_room(n_rows, n_edits):
    """LogitEdits that inputs of n_rows rows have room for if they are to hold n_edits: none, EDITS_A_ROW a row, or 4,
    16, ... times as many: a growing text seldom needs another graph, and not much is copied for nothing."""
    room = n_rows * EDITS_A_ROW
    while room < n_edits:
        room *= 4
    return room if n_edits else 0


def _aligned(n_bytes):
    """The next multiple of ALIGNED."""
    return -(-n_bytes // ALIGNED) * ALIGNED


def _visible(prefix, pools):
    """last_visible and first_visible of the pools by name, where some have them: they are the same in all that do."""
    return {prefix + name: getattr(pool, name) for name in ("last_visible", "first_visible")
            for pool in pools if getattr(pool, name) is not None}


def _columns(prefix, columns):
    """{prefix.field: array} of a dataclass of arrays."""
    return {f"{prefix}.{name}": column for name, column in vars(columns).items()}


def _of(kind, prefix, arrays):
    """The dataclass whose columns _columns took apart."""
    return kind(**{field.name: arrays[f"{prefix}.{field.name}"] for field in fields(kind)})
