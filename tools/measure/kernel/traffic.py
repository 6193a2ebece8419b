"""What kernels move, counted without a GPU: the emulator's checker beside the cost model, and what ptxas makes of them.

Kernels run on slices of a model's shapes: whole rows (k, head_dim and hidden are true), but fewer of them, and shorter
contexts. moved is every warp's request in sectors of 32 bytes, as if nothing were cached, but for operands under 64 KB,
which are read again from a cache; distinct is each byte once. Both are told as ratios to the cost model's bytes, with
what our kernels move besides (partial sums, bins). The wide tile of a prompt's matrix products is not run: it wants
more rows than an emulator has time for. What a kernel takes of an SM is told of everything the presets launch.

Goals: moved is at most 1.1 of the cost where a kernel is bound by memory, and what its note says where it moves more;
no bank conflicts; no kernel spills or has fewer blocks on an SM than compiled.py says.
"""

import os
from dataclasses import replace
from math import ceil

import numpy as np

from engine.errors import ConfigError
from engine.kernels import device, gemm, host, moe
from engine.kernels.checker import SMALL_BYTES
from engine.kernels.paged import geometry
from engine.kernels.resources import LIMITS
from engine.models import presets
from measure.kernel import compiled
from measure.kernel.kernel_cases import cases_of, some
from measure.kernel.kernel_inputs import Data
from measure.report import BenchError, Goal, Row, Stat

PRESETS = ["gemma-3-1b", "gemma-4-31b"]
MORE = ["gemma-4-26b-a4b", "gemma-4-e2b", "gemma-3-4b", "llama-4-scout"]    # of which only ways not taken before
N_TOKENS, CONTEXTS, BATCHES = [1, 16, 64], [1024], [1]
# Of a slice, at most.
MOST = {"n_out": 256, "intermediate": 128, "n_kv_heads": 4, "n_experts": 16, "n_places": 4096}
MOST_OF_EXPERT = 128                # columns that one expert gives
MOST_ROTATED = 32                   # tokens of qk_norm_rope_cache: their angles are under 64 KB, which heads share
VOCAB = 4096                        # rows of an embedding table; logits have all of theirs
SLACK = 1.1                         # of the cost: sectors that are not whole, index lists
LATENCY = "single elements of 4 bytes are gathered, a sector of 32 each: bound by latency"
ROUTES = "the block of an expert reads the experts of all pairs, from the L2 cache: bound by latency"
BINS = "every block adds to its row's bins, in the L2 cache; tokens of one bin meet in one bank"
GREEDY = "a greedy row passes over its logits once, the cost counts three times"
PREFILL = "each tile of queries reads K and V anew, from the L2 cache, and writes half a sector at a time"
ODD_ROWS = "rows of no multiple of 16 bytes are copied 8 bytes at a time, which meet in banks and share sectors"
TEN_CHUNKS = "rows of 80 are 10 chunks of 16 bytes, 8 of which fill the banks: copies meet in some"
HALVES = "halves of heads begin within a sector of 32 bytes"
CONFLICTS = {BINS, ODD_ROWS, TEN_CHUNKS}        # notes that say why banks are met
SECTORS = "rows of cos and of sin begin within a sector of 32 bytes"
PLACES = "patches of one column or row read its place anew, from the L2 cache"
TILES = "every tile of weights reads its tokens anew, from the L2 cache"
# Most that moved was of the cost when it was counted, of 1 and 8 rows of 202048 and 262144 logits. More is new.
ADDED_TO_BINS = {"sample": 1.66, "sample_drafts": 1.41, "sample_with_drafts": 1.57, "top_logprobs": 1.18}
GREEDY_PASSES = 1 / 3               # of those that the cost counts


def run(args, report, lane):
    """A row for each slice, and one for each kernel on each architecture. 1 where a goal is missed."""
    def of(presets):
        return cases_of(presets, args.n_tokens or N_TOKENS, args.context or CONTEXTS, args.batch or BATCHES, args.op)
    whole = of(args.preset) if args.preset else with_other_ways(of(PRESETS), *(of([one]) for one in MORE))
    cases = sliced(some(whole, args.op))
    built = {}
    with Data(lane, np.random.default_rng(args.seed)) as data:
        for case in report.bar(cases, "traffic"):
            row, launches = counted(case, lane, data)
            report.add(row)
            built.update({repr(launch.build): (launch.build, launch.block[0], launch.smem_bytes)
                          for launch in launches})
    launched = list(built.values()) if args.op else compiled.variants(args.preset or list(presets.PRESETS))
    for row in resources(launched, report):
        report.add(row)
    return 0 if report.is_met else 1


def with_other_ways(cases, *more):
    """The cases, and those of each further list whose op takes a way through its kernel that none before it takes."""
    found = list(cases)
    for others in more:
        known = {_way(case) for case in found}
        found += [case for case in others if _way(case) not in known]
    return found


def _way(case):
    """An op and all of its sizes that are no numbers: flags, names, and whether there is a window or RoPE."""
    def kind(value):
        return value if isinstance(value, (bool, str, type(None))) else "some"
    return case.op, tuple(sorted((key, kind(value)) for key, value in case.sizes.items()))


def sliced(cases):
    """The cases at sizes that the emulator has time for; those that become the same, once."""
    found = {}
    for case in cases:
        s = {key: min(value, MOST.get(key, value)) if value is not None and key in MOST else value
             for key, value in case.sizes.items()}
        if "n_experts" in s and "n_out" in s:
            s["n_out"] = min(MOST_OF_EXPERT, s["n_out"])
        if "n_heads" in s:
            s["n_heads"] = case.sizes["n_heads"] // case.sizes["n_kv_heads"] * s["n_kv_heads"]
        if case.op == "qk_norm_rope_cache":
            s["n_tokens"] = min(MOST_ROTATED, s["n_tokens"])
        if case.op == "embed":
            s["vocab"] = min(VOCAB, s["vocab"])
        found.setdefault((case.preset, case.op, repr(sorted(s.items(), key=str))), replace(case, sizes=s))
    return list(found.values())


def counted(case, lane, data):
    """(the Row of a case, its launches)"""
    prepared = case.prepare(lane, data.rng, 1, data)
    with host.checking() as launches:
        prepared.check()
    traffic = [launch.traffic for launch in launches]
    cost, distinct = prepared.cost.traffic_bytes, sum(t.distinct_bytes for t in traffic)
    moved = sum(t.moved_bytes - t.small_reread_bytes for t in traffic)
    reread, conflicts = (sum(getattr(t, name) for t in traffic) for name in ("small_reread_bytes", "bank_conflicts"))
    most, notes = bound(case, cost)
    stats = {"cost": Stat("bytes", cost), "moved": Stat("bytes", moved, "lower"),
             "moved / cost": Stat("x", moved / cost, "lower"), "bank conflicts": Stat("1", conflicts, "lower"),
             "distinct": Stat("bytes", distinct), "distinct / cost": Stat("x", distinct / cost),
             "small rereads": Stat("bytes", reread), "flops": Stat("flop", prepared.cost.flops)}
    goal = None if most is None else Goal("moved / cost", at_most=most)
    if conflicts and CONFLICTS.isdisjoint(notes):
        goal = Goal("bank conflicts", at_most=0)
    return Row("traffic", case.name, case.shape, stats, notes, goal), list(launches)


def bound(case, cost):
    """(the most that moved may be of the cost, in bytes, or None, notes that say why)"""
    s = case.sizes
    if case.op == "attention" and any(query > 1 for _, query, _ in s["rows"]):
        most = SLACK * (cost + _tiles_again(s)) / cost
        return most, [PREFILL, *[TEN_CHUNKS] * (geometry(s["head_dim"], False).head_dim == 80)]
    if case.op == "qk_norm_rope_cache" and s["head_dim"] % 32:
        return None, [HALVES]
    if case.op in ("linear", "gated_linear") and s["n_in"] % 8:
        return None, [ODD_ROWS]
    if case.op in ("accept_drafts", "apply_edits", "attention_temperature", "candidate_logits", "moe_route",
                   "pick_centroids"):
        return None, [ROUTES if case.op == "moe_route" else LATENCY]
    if case.op == "sample" and s["temperature"] == 0:
        return SLACK * GREEDY_PASSES, [GREEDY]
    if case.op in ADDED_TO_BINS:
        return ADDED_TO_BINS[case.op], [BINS]
    if case.op in ("moe_gated_linear", "moe_linear"):
        return SLACK * (cost + _read_again(s, case.op == "moe_gated_linear")) / cost, [TILES]
    if case.op == "rope_angles" and 4 * s["n_pairs"] % 32:
        return SLACK * (cost + 2 * 32 * s["n_tokens"]) / cost, [SECTORS]
    if case.op == "add_rows" and s["n_axes"] == 2:
        again = 2 * s["hidden"] * (2 * s["n_tokens"] - ceil(2 * s["n_tokens"]**0.5))
        return SLACK * (cost + again) / cost, [PLACES]
    x_bytes = 2 * s["n_tokens"] * s["n_in"] if case.op in ("linear", "gated_linear") else 0
    if x_bytes >= SMALL_BYTES:
        n_rows = 2 * s["intermediate"] if case.op == "gated_linear" else s["n_out"]
        plan = gemm.plan(n_rows, s["n_in"], s["n_tokens"])
        again = (-(-n_rows // plan.tile.rows) - 1) * x_bytes
        return SLACK * (cost + again) / cost, [TILES]
    return SLACK, []


def _tiles_again(s):
    """Bytes of K and V that tiles of a prompt's queries read beyond once, and of out once more for its half sectors."""
    group, again = s["n_heads"] // s["n_kv_heads"], 0
    for n_seqs, query, context in s["rows"]:
        tiles = range(0, query * group, geometry(s["head_dim"], False).rows)
        last = [query - 1 if s.get("sees_all") else min(begin + tiles.step, query * group) // group - 1
                for begin in tiles]
        n_keys = sum(context - query + 1 + token for token in last) - context
        again += n_seqs * 2 * s["head_dim"] * (2 * n_keys * s["n_kv_heads"] + query * s["n_heads"])
    return again


def _read_again(s, is_gated):
    """Bytes of x that tiles of experts read beyond once."""
    n_rows, n_pairs = s["n_out"] * (1 + is_gated), s["n_tokens"] * s["experts_per_token"]
    tile = moe.plan(n_rows, s["n_experts"], s["n_tokens"], s["experts_per_token"], is_gated and s["in_out"]).tile
    once = n_pairs if s.get("by_pair", True) else s["n_tokens"]
    return 2 * s["n_in"] * (-(-n_rows // tile.rows) * n_pairs - once)


def resources(built, report):
    """Rows of (Build, threads, dynamic shared memory) on every architecture; none where there is no compiler."""
    try:
        device.nvrtc()
    except ConfigError as error:
        report.skip("registers, spills and occupancy", error)
        return
    for row in compiled.check(built, LIMITS, os.cpu_count() or 1):
        entry, _, constants = row.kernel.removesuffix(")").partition("(")
        shape = {"constants": constants, "arch": row.arch, "n_threads": row.n_threads}
        if row.taken is None:
            raise BenchError(f"{row.file}: {row.kernel} does not compile for {row.arch}: {row.error}")
        stats = {"registers": Stat("1", row.taken.registers, "lower"),
                 "spills": Stat("bytes", row.taken.spill_stores + row.taken.spill_loads, "lower"),
                 "shared memory": Stat("bytes", row.smem_bytes), "blocks an SM": Stat("1", row.blocks, "higher"),
                 "warps an SM": Stat("1", row.warps, "higher")}
        yield Row("resources", entry, shape, stats, row.problems(),
                  Goal("spills", at_most=0) if stats["spills"].median else Goal("blocks an SM", row.least_blocks))
