"""Ops of experts: routing, products by expert, the sum. What each is measured on, and what its twin makes of it."""

import numpy as np

from engine import reference
from engine.routes import Routes
from measure.kernel.kernel_inputs import (
    EXACT,
    FLOAT32,
    FLOAT32_SUM,
    ONE_ROUNDING,
    WEIGHT_SCALE,
    Comparison,
    Op,
    f64,
    rows_of,
    spread,
)
from measure.kernel.op_rows import columns_in_runs, runs


def uniform_routes(rng, s):
    """Host Routes that every set of experts is as likely in as any other."""
    n, k = s["n_tokens"], s["experts_per_token"]
    experts = np.argsort(rng.random((n, s["n_experts"]), np.float32), axis=1)[:, :k].astype(np.int32)
    begins = np.searchsorted(np.sort(experts, axis=None), np.arange(s["n_experts"] + 1)).astype(np.int32)
    order = np.argsort(experts, axis=None, kind="stable").astype(np.int32)
    return Routes(experts, rng.random((n, k), np.float32), order, begins)


class MoeRoute(Op):
    outputs = ("experts", "weights", "order", "begins")
    words = "{experts_per_token} of {n_experts} experts by {routing}"

    def make(self, data, s, first=None):
        n, n_experts = s["n_tokens"], s["n_experts"]
        routes = Routes.empty(n, s["experts_per_token"], n_experts, data.empty)
        scale = data.normal((n_experts,)) if s["routing"] == "softmax" else None
        return {"logits": data.normal((n, n_experts)), "scale": scale, **routes._asdict()}

    def call(self, a, s):
        return (a["logits"], a["scale"], s["routing"], Routes(*(a[name] for name in Routes._fields))), {}

    def compare(self, lane, a, s, run):
        run()
        rows = spread(s["n_tokens"], 64)
        logits = f64(rows_of(lane, a["logits"], rows))
        want = Routes.empty(len(rows), s["experts_per_token"], s["n_experts"], np.empty)
        want = want._replace(weights=np.empty(want.weights.shape))
        reference.moe_route(logits, None if a["scale"] is None else f64(lane.to_host(a["scale"])), s["routing"], want)
        yield Comparison("experts", rows_of(lane, a["experts"], rows), want.experts, EXACT)
        limit = FLOAT32 if s["routing"] == "softmax" else ONE_ROUNDING
        yield Comparison("weights", rows_of(lane, a["weights"], rows), want.weights, limit)
        experts = lane.to_host(a["experts"]).reshape(-1)
        order = np.argsort(experts, kind="stable").astype(np.int32)
        begins = np.searchsorted(experts[order], np.arange(s["n_experts"] + 1)).astype(np.int32)
        yield Comparison("order", lane.to_host(a["order"]), order, EXACT)
        yield Comparison("begins", lane.to_host(a["begins"]), begins, EXACT)


class Experts(Op):
    """What both products share; a["routes"] is on the lane, a["host_routes"] the same on the host."""

    def make(self, data, s, first=None):
        routes = uniform_routes(data.rng, s)
        on_lane = Routes(*(data.put(array, array.dtype) for array in routes))
        n_rows, n_pairs = self.n_rows(s), s["n_tokens"] * s["experts_per_token"]
        matrix = (s["n_in"], n_rows) if s["in_out"] else (n_rows, s["n_in"])
        return {"x": data.normal((self.n_x(s), s["n_in"])),
                "weight": data.normal((s["n_experts"], *matrix), WEIGHT_SCALE),
                "out": data.empty((n_pairs, s["n_out"]), self.dtype), "routes": on_lane, "host_routes": routes}

    def counted(self, a, s):
        return self.call({**a, "routes": a["host_routes"]}, s)

    def outputs_of(self, lane, a, s, out_rows):
        """(some columns of rows of out, what they should be)"""
        routes, columns = a["host_routes"], columns_in_runs(s["n_out"], 128)
        halves = [columns] if self.n_rows(s) == s["n_out"] else [columns, [s["n_out"] + i for i in columns]]
        want = np.empty((len(out_rows), len(columns)))
        alone = Routes(np.zeros((1, 1), np.int32), None, np.zeros(1, np.int32), np.array([0, 1], np.int32))
        for i, out_row in enumerate(out_rows):
            pair, x_row = self.pair_and_x_row(s, routes.order, out_row)
            expert = int(routes.experts.reshape(-1)[pair])
            weight = np.concatenate([self.outputs_in(lane, a["weight"][expert], half, s["in_out"]) for half in halves])
            self.twin(f64(rows_of(lane, a["x"], [x_row])), f64(weight)[None], alone, want[i:i + 1], s)
        return rows_of(lane, a["out"], out_rows)[:, columns], want

    @staticmethod
    def outputs_in(lane, matrix, columns, in_out):
        """[len(columns), n_in] of one expert on the host, of some of its outputs."""
        parts = [matrix[:, begin:end] if in_out else matrix[begin:end] for begin, end in runs(columns)]
        return np.concatenate([lane.to_host(part.copy()).T if in_out else lane.to_host(part) for part in parts])

    def compare(self, lane, a, s, run):
        run()
        yield Comparison("out", *self.outputs_of(lane, a, s, spread(len(a["out"]), 8)), self.limit)


class MoeGatedLinear(Experts):
    words = "{experts_per_token} of {n_experts} experts, {n_in} -> 2 x {n_out}"
    dtype, limit = None, ONE_ROUNDING

    def n_rows(self, s):
        return 2 * s["n_out"]

    def n_x(self, s):
        return s["n_tokens"] * (s["experts_per_token"] if s["by_pair"] else 1)

    def pair_and_x_row(self, s, order, out_row):
        pair = int(order[out_row])
        return pair, pair if s["by_pair"] else pair // s["experts_per_token"]

    def call(self, a, s):
        return (a["x"], a["weight"], a["routes"], a["out"], s["by_pair"], s["activation"], s["in_out"]), {}

    def twin(self, x, weight, routes, out, s):
        reference.moe_gated_linear(x, weight, routes, out, True, s["activation"], False)


class MoeLinear(Experts):
    words = "{experts_per_token} of {n_experts} experts, {n_in} -> {n_out}"
    dtype, limit = np.float32, FLOAT32_SUM

    def n_rows(self, s):
        return s["n_out"]

    def n_x(self, s):
        return s["n_tokens"] * s["experts_per_token"]

    def pair_and_x_row(self, s, order, out_row):
        return out_row, int(np.flatnonzero(order == out_row)[0])

    def call(self, a, s):
        return (a["x"], a["weight"], a["routes"], a["out"], s["in_out"]), {}

    def twin(self, x, weight, routes, out, s):
        reference.moe_linear(x, weight, routes, out, False)


class MoeCombine(Op):
    words = "{experts_per_token} x {hidden}"

    def make(self, data, s, first=None):
        n, k = s["n_tokens"], s["experts_per_token"]
        weights = data.normal((n, k), dtype=np.float32) if s["routing"] == "softmax" else None
        return {"y": data.normal((n * k, s["hidden"]), dtype=np.float32), "weights": weights,
                "out": data.empty((n, s["hidden"]))}

    def call(self, a, s):
        return (a["y"], a["weights"], a["out"]), {}

    def compare(self, lane, a, s, run):
        run()
        rows, k = spread(s["n_tokens"], 64), s["experts_per_token"]
        y = f64(rows_of(lane, a["y"], [row * k + i for row in rows for i in range(k)]))
        want = np.empty((len(rows), s["hidden"]))
        weights = None if a["weights"] is None else f64(rows_of(lane, a["weights"], rows))
        reference.moe_combine(y, weights, want)
        yield Comparison("out", rows_of(lane, a["out"], rows), want, ONE_ROUNDING)
