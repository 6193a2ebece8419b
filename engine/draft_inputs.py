"""What a step reads of its Slots on lanes that stage their inputs: host arrays by name, and places for them."""

from dataclasses import dataclass, fields
from math import prod

import numpy as np

from engine.kernels.paged import ITEM, NO_ITEMS, PagedInputs, blocks, plan_drafts, work_capacity
from engine.sampler import SamplingBatch

PREFIX = "slots."
RULES = PREFIX + "rules."


@dataclass
class StagedSlots:
    """Slots as ops on a lane read them: the same names, arrays in the lane's memory, None where nothing reads them.

    pools  {number of a KV pool: PagedInputs} of one query a sequence, without the lengths that the lane finds out
    """

    drafts: object
    begin: object
    positions: object
    prob_rows: object
    is_relaxed: object
    rules: SamplingBatch | None
    pools: dict


class DraftStager:
    """Stages the Slots of one engine.

    attentions  {number of a KV pool: the AttentionSpec that drafting reads it with}
    samples     drafts are drawn: rules and prob_rows are read
    relaxed     RelaxedRule: is_relaxed is read; or None
    """

    def __init__(self, attentions, page_size, max_seq_len, samples=False, relaxed=None):
        self._attentions, self._page_size, self._max_seq_len = attentions, page_size, max_seq_len
        self._samples, self._relaxes = samples, relaxed is not None

    def arrays(self, slots, page_begins):
        """{name: host array} of Slots. page_begins: {number of a KV pool: page_begin of the batch's sequences}."""
        named = {"drafts": slots.drafts, "begin": slots.begin, "positions": slots.positions}
        if self._samples:
            named["prob_rows"] = slots.prob_rows
            named |= {f"rules.{name}": column for name, column in vars(slots.rules).items()}
        if self._relaxes:
            named["is_relaxed"] = slots.is_relaxed
        n_drafts = np.diff(slots.begin) - 1
        ranges = list(zip(slots.positions.tolist(), (slots.positions + n_drafts).tolist(), strict=True))
        for p, attention in self._attentions.items():
            work = plan_drafts(ranges, n_heads=attention.n_heads, n_kv_heads=attention.n_kv_heads,
                               head_dim=attention.head_dim, window=attention.window)
            named |= {f"page_begin{p}": page_begins[p][slots.numbers], f"work{p}": work,
                      f"n_work{p}": np.array([len(work)], np.int32)}
        return {PREFIX + name: array for name, array in named.items()}

    def places(self, n_seqs, n_slots):
        """{name: (dtype, shape)} of the arrays of up to so many sequences and slots."""
        i32 = np.int32
        named = {"drafts": (i32, (n_slots,)), "begin": (i32, (n_seqs + 1,)), "positions": (i32, (n_seqs,))}
        if self._samples:
            named["prob_rows"] = i32, (n_slots,)
            named |= {f"rules.{name}": (column.dtype, (n_seqs,))
                      for name, column in vars(SamplingBatch.build(())).items()}
        if self._relaxes:
            named["is_relaxed"] = bool, (n_slots,)
        for p, attention in self._attentions.items():
            n_items = work_capacity(n_seqs, self._max_seq_len, attention.n_kv_heads, attention.head_dim,
                                    attention.window)
            named |= {f"page_begin{p}": (i32, (n_seqs,)), f"work{p}": (i32, (n_items, ITEM)), f"n_work{p}": (i32, (1,))}
        return {PREFIX + name: place for name, place in named.items()}

    @staticmethod
    def padding(n_slots):
        """{name: value} of what is beyond the n_slots slots of a step: sequences without slots."""
        return {PREFIX + "drafts": -1, PREFIX + "begin": n_slots, PREFIX + "positions": 0, PREFIX + "prob_rows": 0,
                PREFIX + "is_relaxed": False, RULES + "is_greedy": True}

    def n_bytes(self, n_seqs, n_slots):
        """Bytes of the places of so many sequences and slots, but for what lies between them."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in self.places(n_seqs, n_slots).values())

    def staged(self, arrays):
        """The StagedSlots of arrays on the lane; None where there are none among them."""
        if PREFIX + "drafts" not in arrays:
            return None
        rules = SamplingBatch(*(arrays[RULES + field.name] for field in fields(SamplingBatch))) \
            if self._samples else None
        return StagedSlots(*(arrays.get(PREFIX + name) for name in
                             ("drafts", "begin", "positions", "prob_rows", "is_relaxed")), rules,
                           {p: self._paged(arrays, p) for p in self._attentions})

    def _paged(self, arrays, p):
        work, n_kv_heads = arrays[f"{PREFIX}work{p}"], self._attentions[p].n_kv_heads
        return PagedInputs(slots=None, page_table=arrays["page_table"], page_begin=arrays[f"{PREFIX}page_begin{p}"],
                           context_lens=None, cu_seqlens=None, last_visible=None, page_size=self._page_size,
                           decode_work=work, n_decode_work=arrays[f"{PREFIX}n_work{p}"],
                           n_decode_blocks=blocks(len(work), n_kv_heads), prefill_work=NO_ITEMS, n_prefill_work=None,
                           n_prefill_blocks=0)
