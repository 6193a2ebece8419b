"""Ops on logits. What each is measured on, and what its twin makes of it."""

from dataclasses import fields

import numpy as np

from engine import reference, sampler
from engine.kernels import sampling
from engine.sampler import LogitEdits, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.step_inputs import StagedEdits
from measure.kernel.kernel_inputs import EXACT, FLOAT32, Comparison, Op, f64, rows_of, spread


class LogitSoftcap(Op):
    outputs = ()
    words = "{vocab}"

    def make(self, data, s, first=None):
        return {"logits": data.normal((s["n_rows"], s["vocab"]), 20.0, np.float32)}

    def call(self, a, s):
        return (a["logits"], s["cap"]), {}

    def compare(self, lane, a, s, run):
        rows = spread(s["n_rows"], 4)
        want = f64(rows_of(lane, a["logits"], rows))
        run()
        reference.logit_softcap(want, s["cap"])
        yield Comparison("logits", rows_of(lane, a["logits"], rows), want, FLOAT32)


class ApplyEdits(Op):
    outputs = ()
    words = "{vocab}, {n_edits} edits"

    def make(self, data, s, first=None):
        rng, n_rows, n = data.rng, s["n_rows"], s["n_rows"] * s["n_edits"]
        token = np.concatenate([np.sort(rng.choice(s["vocab"], s["n_edits"], replace=False)) for _ in range(n_rows)])
        edits = LogitEdits(
            np.repeat(np.arange(n_rows, dtype=np.int32), s["n_edits"]), token.astype(np.int32),
            rng.standard_normal(n, np.float32), rng.random(n) < 0.5, rng.integers(0, 3, n, np.int32),
            rng.random(n) < 0.1, *(np.full(n_rows, x, np.float32) for x in (1.1, 0.1, 0.1)))
        arrays = {"logits": data.normal((n_rows, s["vocab"]), 3.0, np.float32), "host_edits": edits, "edits": edits}
        if data.lane.stages:
            staged = data.columns(edits)
            arrays["edits"] = StagedEdits(**vars(staged), n_edits=data.put([n]))
        return arrays

    def call(self, a, s):
        return (a["logits"], a["edits"]), {}

    def counted(self, a, s):
        return (a["logits"], a["host_edits"]), {}

    def compare(self, lane, a, s, run):
        want = np.array(lane.to_host(a["logits"]))
        run()
        reference.apply_edits(want, a["host_edits"])
        yield Comparison("logits", lane.to_host(a["logits"]), want, EXACT)


class Sample(Op):
    words = "{vocab}"

    def make(self, data, s, first=None):
        rule = SamplingParams(temperature=s["temperature"], top_k=s["top_k"], top_p=s["top_p"])
        batch = SamplingBatch.build([(rule, int(data.rng.integers(2**62)), int(data.rng.integers(2**20)))
                                     for _ in range(s["n_rows"])])
        return {"logits": data.normal((s["n_rows"], s["vocab"]), 3.0, np.float32), "host_batch": batch,
                "batch": data.columns(batch), "out": data.empty((s["n_rows"],), np.int32),
                "scratch": first["scratch"] if first else data.scratch(sampling.scratch_size(s["n_rows"], s["vocab"]))}

    def call(self, a, s):
        return (a["logits"], a["batch"], a["out"], a["scratch"]), {}

    def counted(self, a, s):
        return (a["logits"], a["host_batch"], a["out"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_rows"], 8)
        batch = SamplingBatch(*(getattr(a["host_batch"], field.name)[rows] for field in fields(SamplingBatch)))
        want = sampler.sample(rows_of(lane, a["logits"], rows), batch)
        yield Comparison("out", lane.to_host(a["out"])[rows], want, EXACT)


class TopLogprobs(Op):
    outputs = ("out_chosen", "out_ids", "out_logprobs")
    words = "{vocab}, {n} likeliest"

    def make(self, data, s, first=None):
        n_rows, n = s["n_rows"], s["n"]
        return {"logits": data.normal((n_rows, s["vocab"]), 3.0, np.float32),
                "chosen": data.put(data.rng.integers(0, s["vocab"], n_rows)),
                "out_chosen": data.empty((n_rows,), np.float32), "out_ids": data.empty((n_rows, n), np.int32),
                "out_logprobs": data.empty((n_rows, n), np.float32),
                "scratch": first["scratch"] if first else data.scratch(sampling.scratch_size(n_rows, s["vocab"]))}

    def call(self, a, s):
        return (a["logits"], a["chosen"], s["n"], a["out_chosen"], a["out_ids"], a["out_logprobs"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_rows"], 8)
        wants = sampler.top_logprobs(rows_of(lane, a["logits"], rows), lane.to_host(a["chosen"])[rows], s["n"])
        for name, want, limit in zip(self.outputs, wants, (FLOAT32, EXACT, FLOAT32), strict=True):
            yield Comparison(name, rows_of(lane, a[name], rows), np.asarray(want, a[name].dtype), limit)
