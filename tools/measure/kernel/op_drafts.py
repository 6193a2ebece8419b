"""Ops that judge drafted tokens. What each is measured on, and what its twin makes of it."""

from dataclasses import fields

import numpy as np

from engine import reference
from engine.accepted import Accepted
from engine.kernels import sampling
from engine.sampler import SamplingBatch
from engine.sampling_params import SamplingParams
from measure.kernel.kernel_inputs import EXACT, Comparison, Op, rows_of, spread


def _batch(data, s):
    rule = SamplingParams(temperature=s["temperature"], top_k=s["top_k"], top_p=s["top_p"])
    return SamplingBatch.build([(rule, int(data.rng.integers(2**62)), int(data.rng.integers(2**20)))
                                for _ in range(s["n_rows"])])


def _scratch(data, s, first):
    return first["scratch"] if first else data.scratch(sampling.scratch_size(s["n_rows"], s["vocab"]))


def _rows(batch, rows):
    return SamplingBatch(*(getattr(batch, field.name)[rows] for field in fields(SamplingBatch)))


class AcceptDrafts(Op):
    """Every sequence has as many drafts; one in five is wrong."""

    outputs = Accepted._fields
    words = "{n_drafts} drafts"

    def make(self, data, s, first=None):
        n_seqs, n_slots = s["n_rows"] // (s["n_drafts"] + 1), s["n_rows"]
        tokens = data.rng.integers(0, 2**18, n_slots)
        drafts = np.where(data.rng.random(n_slots) < 0.2, tokens + 1, tokens)
        drafts[s["n_drafts"]::s["n_drafts"] + 1] = -1
        arrays = {name: data.empty((n_seqs,), np.int32) for name in Accepted._fields}
        return {"tokens": data.put(tokens), "drafts": data.put(drafts), "slot_rows": data.put(np.arange(n_slots)),
                "slot_begin": data.put(np.arange(0, n_slots + 1, s["n_drafts"] + 1)),
                "from_positions": data.put(data.rng.integers(0, 2**17, n_seqs)), **arrays, "out": Accepted(**arrays)}

    def call(self, a, s):
        return tuple(a[name] for name in ("tokens", "drafts", "slot_begin", "slot_rows", "from_positions", "out")), {}

    def compare(self, lane, a, s, run):
        run()
        want = Accepted(*(np.empty(len(a["out"].positions), np.int32) for _ in Accepted._fields))
        reference.accept_drafts(*(lane.to_host(array) for array in self.call(a, s)[0][:-1]), want)
        for name in Accepted._fields:
            yield Comparison(name, lane.to_host(a[name]), getattr(want, name), EXACT)


class SampleDrafts(Op):
    outputs = ("out", "probs")
    words = "{vocab}"

    def make(self, data, s, first=None):
        batch, shape = _batch(data, s), (s["n_rows"], s["vocab"])
        return {"logits": data.normal(shape, 3.0, np.float32), "host_batch": batch, "batch": data.columns(batch),
                "out": data.empty(shape[:1], np.int32), "probs": data.empty(shape, np.float32),
                "scratch": _scratch(data, s, first)}

    def call(self, a, s):
        return (a["logits"], a["batch"], a["out"], a["probs"], a["scratch"]), {}

    def counted(self, a, s):
        return (a["logits"], a["host_batch"], a["out"], a["probs"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_rows"], 8)
        out, probs = np.empty(len(rows), np.int32), np.empty((len(rows), s["vocab"]), np.float32)
        reference.sample_drafts(rows_of(lane, a["logits"], rows), _rows(a["host_batch"], rows), out, probs)
        yield Comparison("out", lane.to_host(a["out"])[rows], out, EXACT)
        yield Comparison("probs", rows_of(lane, a["probs"], rows), probs, EXACT)


class SampleWithDrafts(Op):
    """Drafts are tokens that the target rarely takes: most are rejected, which is all the work there can be."""

    words = "{vocab}"

    def make(self, data, s, first=None):
        batch, shape = _batch(data, s), (s["n_rows"], s["vocab"])
        probs = np.full(s["vocab"], 1 / s["vocab"], np.float32)
        return {"logits": data.normal(shape, 3.0, np.float32), "host_batch": batch, "batch": data.columns(batch),
                "drafts": data.put(data.rng.integers(0, s["vocab"], s["n_rows"])),
                "draft_probs": data.put(np.broadcast_to(probs, shape), np.float32),
                "out": data.empty(shape[:1], np.int32), "scratch": _scratch(data, s, first)}

    def call(self, a, s):
        return (a["logits"], a["batch"], a["drafts"], a["draft_probs"], a["out"], a["scratch"]), {}

    def counted(self, a, s):
        return (a["logits"], a["host_batch"], a["drafts"], a["draft_probs"], a["out"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_rows"], 8)
        want = np.empty(len(rows), np.int32)
        reference.sample_with_drafts(rows_of(lane, a["logits"], rows), _rows(a["host_batch"], rows),
                                     lane.to_host(a["drafts"])[rows], rows_of(lane, a["draft_probs"], rows), want)
        yield Comparison("out", lane.to_host(a["out"])[rows], want, EXACT)


class RelaxDrafts(Op):
    outputs = ()
    words = "{vocab}"

    def make(self, data, s, first=None):
        n_rows, put = s["n_rows"], data.put
        return {"logits": data.normal((n_rows, s["vocab"]), 3.0, np.float32),
                "drafts": put(data.rng.integers(0, s["vocab"], n_rows)), "is_relaxed": put(np.ones(n_rows), np.bool_),
                "tokens": put(np.full(n_rows, -1)), "scratch": _scratch(data, s, first)}

    def call(self, a, s):
        return (a["logits"], a["drafts"], a["is_relaxed"], s["top_k"], s["delta"], a["tokens"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        rows = spread(s["n_rows"], 8)
        want = np.array(lane.to_host(a["tokens"]))[rows]
        run()
        drafts, is_relaxed = (lane.to_host(a[name])[rows] for name in ("drafts", "is_relaxed"))
        reference.relax_drafts(rows_of(lane, a["logits"], rows), drafts, is_relaxed, s["top_k"], s["delta"], want)
        yield Comparison("tokens", lane.to_host(a["tokens"])[rows], want, EXACT)
