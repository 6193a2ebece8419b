"""Ops of vision towers on rows: places, biases, bounds, LayerNorm, soft tokens. What each is measured on, and what its
twin makes of it."""

import numpy as np

from engine import reference
from measure.kernel.kernel_inputs import (
    EPS,
    EXACT,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    Comparison,
    Op,
    f64,
    rows_of,
    spread,
)


class PlaceRows(Op):
    words = "{width}"

    def make(self, data, s, first=None):
        n = s["n_tokens"]
        return {"x": data.normal((n, s["width"])), "source": data.put(data.rng.permutation(n)),
                "rows": data.put(data.rng.permutation(n)), "out": data.empty((n, s["width"]))}

    def call(self, a, s):
        return (a["x"], a["source"], a["rows"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        some = spread(s["n_tokens"], 64)
        source, rows = (lane.to_host(a[name])[some].tolist() for name in ("source", "rows"))
        yield Comparison("out", rows_of(lane, a["out"], rows), rows_of(lane, a["x"], source), EXACT)


class AddRows(Op):
    """The patches of a square picture: columns have the first half of the table, rows the second."""

    words = "{hidden}, {n_axes} of {n_places} places each"

    def make(self, data, s, first=None):
        n = s["n_tokens"]
        at = np.arange(n)[:, None]
        if s["n_axes"] == 2:
            y, x = np.divmod(at, round(n**0.5))
            at = np.concatenate([x, s["n_places"] // 2 + y], axis=1)
        return {"x": data.normal((n, s["hidden"])), "rows": data.put(at), "out": data.empty((n, s["hidden"])),
                "table": first["table"] if first else data.normal((s["n_places"], s["hidden"]))}

    def call(self, a, s):
        return (a["x"], a["table"], a["rows"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        some = spread(s["n_tokens"], 64)
        places = lane.to_host(a["rows"])[some]
        table, numbers = np.unique(places, return_inverse=True)
        want = np.empty((len(some), s["hidden"]))
        reference.add_rows(f64(rows_of(lane, a["x"], some)), f64(rows_of(lane, a["table"], table.tolist())),
                           numbers.reshape(places.shape), want)
        yield Comparison("out", rows_of(lane, a["out"], some), want, TWO_ROUNDINGS)


class PoolRows(Op):
    words = "{hidden}, {k} each"

    def make(self, data, s, first=None):
        n, k, width = s["n_tokens"], s["k"], s["hidden"]
        weights = {name: data.normal((width,)) if s["standardize"] else None for name in ("bias", "scale")}
        return {"x": data.normal((n * k, width)), "groups": data.put(data.rng.permutation(n * k).reshape(n, k)),
                "out": data.empty((n, width)), **weights}

    def call(self, a, s):
        return (a["x"], a["groups"], s["hidden"] ** 0.5, a["bias"], a["scale"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        some = spread(s["n_tokens"], 64)
        groups = lane.to_host(a["groups"])[some]
        weights = (None if a[name] is None else f64(lane.to_host(a[name])) for name in ("bias", "scale"))
        want = np.empty((len(some), s["hidden"]))
        reference.pool_rows(f64(rows_of(lane, a["x"], groups.ravel().tolist())),
                            np.arange(groups.size).reshape(groups.shape), s["hidden"] ** 0.5, *weights, want)
        yield Comparison("out", rows_of(lane, a["out"], some), want, TWO_ROUNDINGS)


class Clamp(Op):
    """Into the last columns of `out`; the others stay."""

    words = "{width} of {n_columns}"
    outputs = ()

    def make(self, data, s, first=None):
        n = s["n_tokens"]
        return {"x": data.normal((n, s["width"])), "bounds": data.put([-0.5, 0.5], data.lane.dtype),
                "out": data.normal((n, s["n_columns"]))}

    def call(self, a, s):
        return (a["x"], a["bounds"], a["out"]), {"first": s["n_columns"] - s["width"]}

    def compare(self, lane, a, s, run):
        some = spread(s["n_tokens"], 64)
        want = rows_of(lane, a["out"], some)
        run()
        reference.clamp(rows_of(lane, a["x"], some), lane.to_host(a["bounds"]), want, s["n_columns"] - s["width"])
        yield Comparison("out", rows_of(lane, a["out"], some), want, EXACT)


class AddBias(Op):
    words = "{width}"

    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["width"]
        return {"x": data.normal(shape), "bias": data.normal(shape[1:]), "out": data.empty(shape),
                "residual": data.normal(shape) if s["residual"] else None}

    def call(self, a, s):
        return (a["x"], a["bias"], a["out"]), {"activation": s["activation"], "residual": a["residual"]}

    def compare(self, lane, a, s, run):
        run()
        some = spread(s["n_tokens"], 64)
        residual = None if a["residual"] is None else f64(rows_of(lane, a["residual"], some))
        want = np.empty((len(some), s["width"]))
        reference.add_bias(f64(rows_of(lane, a["x"], some)), f64(lane.to_host(a["bias"])), want, s["activation"],
                           residual)
        yield Comparison("out", rows_of(lane, a["out"], some), want, ONE_ROUNDING)


class LayerNorm(Op):
    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["hidden"]
        return {"x": data.normal(shape), "weight": data.normal(shape[1:]), "bias": data.normal(shape[1:]),
                "out": data.empty(shape)}

    def call(self, a, s):
        return (a["x"], a["weight"], a["bias"], EPS, a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        some = spread(s["n_tokens"], 64)
        want = np.empty((len(some), s["hidden"]))
        weights = (f64(lane.to_host(a[name])) for name in ("weight", "bias"))
        reference.layer_norm(f64(rows_of(lane, a["x"], some)), *weights, EPS, want)
        yield Comparison("out", rows_of(lane, a["out"], some), want, ONE_ROUNDING)
