"""Ops on rows of states: products, norms, gathers. What each is measured on, and what its twin makes of it."""

from itertools import pairwise

import numpy as np

from engine import reference
from engine.kernels import cublas, gemm
from measure.kernel.kernel_inputs import (
    EPS,
    EXACT,
    FLOAT32_SUM,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    Comparison,
    Op,
    f64,
    rows_of,
    spread,
)


class Linear(Op):
    words = "{n_in} -> {n_out}"

    def make(self, data, s, first=None):
        dtype = np.float32 if s.get("out") == "float32" else None
        n, n_in, n_out = s["n_tokens"], s["n_in"], s["n_out"]
        return {"x": data.normal((n, n_in)), "weight": data.normal((n_out, n_in), WEIGHT_SCALE),
                "out": data.empty((n, n_out), dtype),
                "scratch": first["scratch"] if first else data.scratch(gemm.scratch_size(n_out, n_in, n))}

    def call(self, a, s):
        return (a["x"], a["weight"], a["out"], a["scratch"]), {}

    def compare(self, lane, a, s, run):
        run()
        tokens, columns = spread(s["n_tokens"], 8), columns_in_runs(s["n_out"], 512)
        want = np.empty((len(tokens), len(columns)))
        reference.linear(f64(rows_of(lane, a["x"], tokens)), f64(taken(lane, a["weight"], columns)), want)
        limit = FLOAT32_SUM if a["out"].dtype == np.float32 else ONE_ROUNDING
        yield Comparison("out", rows_of(lane, a["out"], tokens)[:, columns], want, limit)


class GatedLinear(Op):
    words = "{n_in} -> 2 x {intermediate}"

    def make(self, data, s, first=None):
        n, n_in, n_out = s["n_tokens"], s["n_in"], s["intermediate"]
        sizes = gemm.scratch_size(2 * n_out, n_in, n), cublas.scratch_size(2 * n_out, n_in, n)
        return {"x": data.normal((n, n_in)), "weight": data.normal((2 * n_out, n_in), WEIGHT_SCALE),
                "out": data.empty((n, n_out)), "scratch": first["scratch"] if first else data.scratch(*sizes)}

    def call(self, a, s):
        return (a["x"], a["weight"], a["out"], a["scratch"], s.get("activation", "gelu_tanh")), {}

    def compare(self, lane, a, s, run):
        run()
        tokens, columns = spread(s["n_tokens"], 8), columns_in_runs(s["intermediate"], 256)
        rows = [*columns, *(s["intermediate"] + i for i in columns)]
        want = np.empty((len(tokens), len(columns)))
        reference.gated_linear(f64(rows_of(lane, a["x"], tokens)), f64(taken(lane, a["weight"], rows)), want,
                               activation=s.get("activation", "gelu_tanh"))
        yield Comparison("out", rows_of(lane, a["out"], tokens)[:, columns], want, ONE_ROUNDING)


def columns_in_runs(n, most):
    """About `most` numbers of 0..n - 1 in runs of 32 at most, the first and the last ones among them."""
    return sorted({i for begin in spread(max(n - 31, 1), -(-most // 32)) for i in range(begin, min(begin + 32, n))})


def taken(lane, array, rows):
    """Host copies of rows in runs: one copy a run."""
    return np.concatenate([lane.to_host(array[begin:end]) for begin, end in runs(rows)])


def runs(rows):
    """[(first, end)] of what follows upon each other in ascending numbers."""
    breaks = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    return [(rows[i], rows[j - 1] + 1) for i, j in pairwise(breaks)]


class RmsNorm(Op):
    def make(self, data, s, first=None):
        shape = s["n_tokens"], s["hidden"]
        return {"x": data.normal(shape), "weight": data.normal(shape[1:]), "out": data.empty(shape)}

    def call(self, a, s):
        return (a["x"], a["weight"], EPS, WEIGHT_OFFSET, a["out"]), _rounding(s)

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        x = f64(rows_of(lane, a["x"], rows))
        want = np.empty(x.shape)
        reference.rms_norm(x, f64(lane.to_host(a["weight"])), EPS, WEIGHT_OFFSET, want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, TWO_ROUNDINGS if _rounding(s) else ONE_ROUNDING)


def _rounding(s):
    """Keyword arguments of a norm."""
    return {"round_first": True} if s.get("round_first") else {}


class AddNorm(Op):
    def make(self, data, s, first=None):
        shape, has_next = (s["n_tokens"], s["hidden"]), s.get("next", True)
        return {"residual": data.normal(shape), "branch": data.normal(shape),
                "post_weight": None if s.get("round_first") else data.normal(shape[1:]),
                "next_weight": data.normal(shape[1:]) if has_next else None,
                "out": data.empty(shape) if has_next else None,
                # Below 1: every launch adds to the residual, which must not grow beyond all numbers.
                "layer_scalar": data.put([0.5], data.lane.dtype) if s["layer_scalar"] else None}

    def call(self, a, s):
        return (a["residual"], a["branch"], a["post_weight"], a["next_weight"], EPS, WEIGHT_OFFSET, a["layer_scalar"],
                a["out"]), _rounding(s)

    def compare(self, lane, a, s, run):
        rows = spread(s["n_tokens"], 64)
        residual = f64(rows_of(lane, a["residual"], rows))
        run()
        *weights, scalar = (None if a[name] is None else f64(lane.to_host(a[name]))
                            for name in ("post_weight", "next_weight", "layer_scalar"))
        want = None if a["out"] is None else np.empty(residual.shape)
        reference.add_norm(residual, f64(rows_of(lane, a["branch"], rows)), *weights, EPS, WEIGHT_OFFSET, scalar, want)
        stored = rows_of(lane, a["residual"], rows)
        yield Comparison("residual", stored, residual, ONE_ROUNDING)
        if want is None:
            return
        reference.rms_norm(f64(stored), weights[1], EPS, WEIGHT_OFFSET, want)       # what is stored is what is normed
        yield Comparison("out", rows_of(lane, a["out"], rows), want, TWO_ROUNDINGS if _rounding(s) else ONE_ROUNDING)


class Embed(Op):
    words = "{vocab} x {hidden}"

    def make(self, data, s, first=None):
        return {"table": first["table"] if first else data.normal((s["vocab"], s["hidden"]), WEIGHT_SCALE),
                "token_ids": data.put(data.rng.choice(s["vocab"], s["n_tokens"], replace=False)),
                "out": data.empty((s["n_tokens"], s["hidden"]))}

    def call(self, a, s):
        return (a["table"], a["token_ids"], float(s["hidden"] ** 0.5), a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        ids = lane.to_host(a["token_ids"])[rows].tolist()
        want = f64(rows_of(lane, a["table"], ids)) * np.float32(s["hidden"] ** 0.5)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, ONE_ROUNDING)


class SelectRows(Op):
    words = "{n_rows} of {n_tokens} x {width}"

    def make(self, data, s, first=None):
        return {"x": data.normal((s["n_tokens"], s["width"])),
                "rows": data.put(data.rng.permutation(s["n_tokens"])[:s["n_rows"]]),
                "out": data.empty((s["n_rows"], s["width"]))}

    def call(self, a, s):
        return (a["x"], a["rows"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_rows"], 64)
        want = rows_of(lane, a["x"], lane.to_host(a["rows"])[rows].tolist())
        yield Comparison("out", rows_of(lane, a["out"], rows), want, EXACT)
