"""Fused mixture-of-experts products in Triton, as servers that use it have them: one launch for all experts, tiles of
rows that share one, the gate in the epilogue. Imported where Triton runs.

Which expert a tile of rows is of is worked out beforehand; of the tiles in TILES the fastest runs.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from measure.peer.torch_arrays import as_torch

ROWS = (16, 32, 64, 128)                                # of a tile
TILES = ((64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 8, 4))     # columns, step along n_in, warps, stages
GROUP = 8                                               # tiles of rows that follow each other: they share weights in L2
TUNE_MS = 10                                            # of launches, to find out how fast tiles are


@triton.jit
def product(x, weight, out, order, tile_experts, tile_begins, begins, n_tiles, n_in: tl.constexpr, n_out, per_expert,
            per_in, per_out, pairs_per_row, is_gated: tl.constexpr, is_silu: tl.constexpr, by_order: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr):
    """Gated: out[p] = act(x[order[p] // pairs_per_row] @ gate) * (that @ up); else out[order[p]] = x[p] @ weight."""
    program, n_columns = tl.program_id(0), (n_out + COLUMNS - 1) // COLUMNS
    group = program // (GROUP * n_columns)
    in_group = tl.minimum(n_tiles - group * GROUP, GROUP)
    tile = group * GROUP + program % (GROUP * n_columns) % in_group
    column = program % (GROUP * n_columns) // in_group
    expert = tl.load(tile_experts + tile).to(tl.int64)
    places = tl.load(tile_begins + tile) + tl.arange(0, ROWS)
    is_row = places < tl.load(begins + expert + 1)
    pairs = tl.load(order + places, mask=is_row, other=0)
    rows = pairs // pairs_per_row if by_order else places
    columns, steps = column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, STEP)
    is_column = columns < n_out
    x += rows[:, None].to(tl.int64) * n_in + steps[None]
    weight += expert * per_expert + columns[None].to(tl.int64) * per_out + steps[:, None] * per_in
    first = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    second = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for begin in range(0, n_in, STEP):
        is_step = steps < n_in - begin
        a = tl.load(x, mask=is_row[:, None] & is_step[None], other=0.0)
        is_there = is_step[:, None] & is_column[None]
        first = tl.dot(a, tl.load(weight, mask=is_there, other=0.0), first, input_precision="ieee")
        if is_gated:
            up = tl.load(weight + n_out * per_out, mask=is_there, other=0.0)
            second = tl.dot(a, up, second, input_precision="ieee")
        x += STEP
        weight += STEP * per_in
    if is_gated:
        turned = first if is_silu else 1.5957691216057308 * (first + 0.044715 * first * first * first)
        first = first / (1.0 + tl.exp(-turned)) * second    # tanh(z / 2) = 2 / (1 + exp(-z)) - 1
    at = (places if by_order else pairs)[:, None].to(tl.int64) * n_out + columns[None]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None])


def tiles_of(begins, n_rows):
    """(expert, first place) of every tile of n_rows places, int32; begins [n_experts + 1] on the host."""
    found = [(expert, place) for expert in range(len(begins) - 1)
             for place in range(begins[expert], begins[expert + 1], n_rows)]
    return np.array(found, np.int32).reshape(-1, 2).T


def row_sizes(begins):
    """The two of ROWS that suit the rows that an expert has, of those in use."""
    counts = np.diff(begins)
    at = int(np.searchsorted(ROWS, np.mean(counts[counts > 0])))
    return ROWS[max(0, min(at, len(ROWS) - 1) - 1):][:2]


def bound(prepared, arrays, n_rows, tile):
    """A function that computes the case on one set, with these tiles, and returns its output."""
    s, is_gated = prepared.case.sizes, prepared.case.op == "moe_gated_linear"
    x, weight, routes = as_torch(arrays["x"]), as_torch(arrays["weight"]), arrays["routes"]
    order, begins = as_torch(routes.order), as_torch(routes.begins)
    experts, places = (torch.from_numpy(np.ascontiguousarray(column)).to(x.device)
                       for column in tiles_of(arrays["host_routes"].begins, n_rows))
    out = torch.empty((len(order), s["n_out"]), dtype=x.dtype if is_gated else torch.float32, device=x.device)
    per_out, per_in = weight.stride()[1:] if not s["in_out"] else weight.stride()[:0:-1]
    columns, step, warps, stages = tile
    grid = (len(experts) * triton.cdiv(s["n_out"], columns),)
    pairs_per_row = 1 if s.get("by_pair", True) else s["experts_per_token"]

    def launch():
        product[grid](x, weight, out, order, experts, places, begins, len(experts), s["n_in"], s["n_out"],
                      weight.stride(0), per_in, per_out, pairs_per_row, is_gated=is_gated,
                      is_silu=s.get("activation") == "silu", by_order=is_gated, ROWS=n_rows, COLUMNS=columns, STEP=step,
                      GROUP=GROUP, num_warps=warps, num_stages=stages)
        return out
    return launch


def fastest(prepared, choices):
    """Of choices [(n_rows, tile)] the one that computes the first set in the least time."""
    def seconds(choice):
        try:
            return triton.testing.do_bench(bound(prepared, prepared.sets[0], *choice), TUNE_MS, TUNE_MS)
        except OutOfResources:
            return float("inf")
    return min(choices, key=seconds)


def experts(prepared):
    """A build of moe_gated_linear and moe_linear."""
    choices = [(n_rows, tile) for n_rows in row_sizes(prepared.sets[0]["host_routes"].begins) for tile in TILES]
    choice = fastest(prepared, choices) if prepared.lane.name == "cuda" else choices[0]
    return [bound(prepared, arrays, *choice) for arrays in prepared.sets]
