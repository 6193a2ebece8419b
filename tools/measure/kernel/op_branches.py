"""Ops on rows between products that only some models have: two branches, experts, inputs of every layer. What each is
measured on, and what its twin makes of it."""

import numpy as np

from engine import reference
from measure.kernel.kernel_inputs import (
    EPS,
    EXACT,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    WEIGHT_OFFSET,
    Comparison,
    Op,
    f64,
    rows_of,
    spread,
)

FOUR_ROUNDINGS = 2 * TWO_ROUNDINGS


class AddNorms(Op):
    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["hidden"]
        return {"a": data.normal(shape), "a_weight": data.normal(shape[1:]), "b": data.normal(shape),
                "b_weight": data.normal(shape[1:]), "out": data.empty(shape)}

    def call(self, a, s):
        return (a["a"], a["a_weight"], a["b"], a["b_weight"], EPS, WEIGHT_OFFSET, a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        want = np.empty((len(rows), s["hidden"]))
        x, y = (f64(rows_of(lane, a[name], rows)) for name in ("a", "b"))
        x_weight, y_weight = (f64(lane.to_host(a[name])) for name in ("a_weight", "b_weight"))
        reference.add_norms(x, x_weight, y, y_weight, EPS, WEIGHT_OFFSET, want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, ONE_ROUNDING)


class RouterNorm(Op):
    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["hidden"]
        return {"x": data.normal(shape), "scale": data.normal(shape[1:]), "out": data.empty(shape)}

    def call(self, a, s):
        return (a["x"], a["scale"], s["hidden"] ** -0.5, EPS, a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        want = np.empty((len(rows), s["hidden"]))
        reference.router_norm(f64(rows_of(lane, a["x"], rows)), f64(lane.to_host(a["scale"])), s["hidden"] ** -0.5, EPS,
                              want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, FOUR_ROUNDINGS)


class ScaleRows(Op):
    words = "{k} x {hidden}"

    def make(self, data, s, first=None):
        n, k = s["n_tokens"], s["k"]
        return {"x": data.normal((n, s["hidden"])), "weights": data.put(data.rng.random((n, k)), np.float32),
                "out": data.empty((n * k, s["hidden"]))}

    def call(self, a, s):
        return (a["x"], a["weights"], a["out"]), {}

    def compare(self, lane, a, s, run):
        """A product of two bfloat16 fits float32: it is known bit for bit."""
        run()
        rows, k, dtype = spread(s["n_tokens"], 64), s["k"], a["x"].dtype
        want = np.empty((len(rows) * k, s["hidden"]))
        weights = lane.to_host(a["weights"])[rows].astype(dtype)
        reference.scale_rows(f64(rows_of(lane, a["x"], rows)), f64(weights), want)
        got = rows_of(lane, a["out"], [row * k + i for row in rows for i in range(k)])
        yield Comparison("out", got, want.astype(dtype), EXACT)


class MixPerLayer(Op):
    words = "{n_layers} x {width}"

    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["n_layers"] * s["width"]
        return {"context": data.normal(shape, s["hidden"] ** 0.5), "tokens": data.normal(shape),
                "weight": data.normal((s["width"],)), "out": data.empty(shape)}

    def call(self, a, s):
        return (a["context"], a["tokens"], a["weight"], s["hidden"] ** -0.5, EPS, a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 16)
        want = np.empty((len(rows), s["n_layers"] * s["width"]))
        reference.mix_per_layer(f64(rows_of(lane, a["context"], rows)), f64(rows_of(lane, a["tokens"], rows)),
                                f64(lane.to_host(a["weight"])), s["hidden"] ** -0.5, EPS, want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, FOUR_ROUNDINGS)


class GatePerLayer(Op):
    words = "{width} of {n_layers}"

    def make(self, data, s, first=None):
        n, width = s["n_tokens"], s["width"]
        return {"gate": data.normal((n, width)), "inputs": data.normal((n, s["n_layers"] * width)),
                "out": data.empty((n, width))}

    def call(self, a, s):
        return (a["gate"], a["inputs"], s["n_layers"] - 1, a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        want = np.empty((len(rows), s["width"]))
        reference.gate_per_layer(f64(rows_of(lane, a["gate"], rows)), f64(rows_of(lane, a["inputs"], rows)),
                                 s["n_layers"] - 1, want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, ONE_ROUNDING)
