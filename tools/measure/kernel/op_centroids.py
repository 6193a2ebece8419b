"""Ops of a draft model's head with centroids. What each is measured on, and what its twin makes of it."""

import numpy as np

from engine import reference
from engine.kernels.centroids import COUNTERS
from measure.kernel.kernel_inputs import EXACT, FLOAT32_SUM, WEIGHT_SCALE, Comparison, Op, f64, rows_of, spread


class PickCentroids(Op):
    words = "{n_chosen} of {n_centroids} centroids"

    def make(self, data, s, first=None):
        return {"scores": data.normal((s["n_rows"], s["n_centroids"]), dtype=np.float32),
                "out": data.empty((s["n_rows"], s["n_chosen"]), np.int32)}

    def call(self, a, s):
        return (a["scores"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        want = np.empty(a["out"].shape, np.int32)
        reference.pick_centroids(lane.to_host(a["scores"]), want)
        yield Comparison("out", lane.to_host(a["out"]), want, EXACT)


class CandidateArgmax(Op):
    """Every row has centroids of its own."""

    words = "{hidden} -> {n_chosen} of {n_centroids} times {size}"

    def make(self, data, s, first=None):
        vocab = s["n_centroids"] * s["size"]
        chosen = [data.rng.permutation(s["n_centroids"])[:s["n_chosen"]] for _ in range(s["n_rows"])]
        return {"g": data.normal((s["n_rows"], s["hidden"])),
                "head": data.normal((vocab, s["hidden"]), WEIGHT_SCALE),
                "ordering": data.put(data.rng.permutation(vocab).reshape(s["n_centroids"], s["size"])),
                "chosen": data.put(chosen), "out": self.out(data, s["n_rows"], vocab),
                "scratch": data.scratch((0, COUNTERS * s["n_rows"]))}

    def out(self, data, n_rows, vocab):
        return data.empty((n_rows,), np.int32)

    def call(self, a, s):
        return tuple(a[name] for name in ("g", "head", "ordering", "chosen", "out", "scratch")), {}

    def compare(self, lane, a, s, run):
        """Two sums may differ by their roundings: what was taken must be as large as the largest, but for those."""
        run()
        for i in spread(s["n_rows"], 8):
            token, logits = int(lane.to_host(a["out"])[i]), self.wanted(lane, a, s, i)
            got = logits[token] if 0 <= token < len(logits) else np.nan
            yield Comparison("out", np.array([got]), logits.max(keepdims=True), FLOAT32_SUM)

    def wanted(self, lane, a, s, i):
        """The twin's logits of row i, [vocab]."""
        tokens = np.sort(lane.to_host(a["ordering"])[lane.to_host(a["chosen"])[i]], axis=None)
        want = np.full((s["n_centroids"] * s["size"],), -np.inf)
        want[tokens] = f64(rows_of(lane, a["head"], tokens)) @ f64(rows_of(lane, a["g"], [i]))[0]
        return want


class CandidateLogits(CandidateArgmax):
    def out(self, data, n_rows, vocab):
        return data.empty((n_rows, vocab), np.float32)

    def call(self, a, s):
        return tuple(a[name] for name in ("g", "head", "ordering", "chosen", "out")), {}

    def compare(self, lane, a, s, run):
        run()
        for i in spread(s["n_rows"], 8):
            got, want = rows_of(lane, a["out"], [i]), self.wanted(lane, a, s, i)[None]
            seen = np.isfinite(want)
            yield Comparison("out", np.isneginf(got), ~seen, EXACT)
            yield Comparison("out", got[seen][None], want[seen][None], FLOAT32_SUM)
