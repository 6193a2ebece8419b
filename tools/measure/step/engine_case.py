"""One case on an open Core: its step, the ops of it, and what the engine's loop makes of it, as rows of a report."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from engine.cost import Ceilings, floor
from measure.clock import clock_of
from measure.drafts import drafting_cost
from measure.kernel.kernel_cases import COLD_BYTES
from measure.loading import memory
from measure.report import Row, Stat, percentile
from measure.step.seats import VERIFY, WARMUPS, Needs, random_tokens, seated, step_of, submit
from measure.step.timeline import NEGATIVE, PARTS, attribution, grouped, ops_of, recording

GPU_LAUNCHES = 16       # of a group in one sample: starting a graph takes some us by itself
EMULATED_STEPS = 2      # of the loop, decoding: nothing is timed there


@dataclass
class EngineCase:
    """One case on an open Core, and its rows for the report."""

    core: object
    model: object
    need: Needs
    ceilings: Ceilings | None
    args: object
    report: object

    def __post_init__(self):
        self.case, self.lane = self.need.case, self.core.lane
        self.clock, self.rng = clock_of(self.lane), np.random.default_rng(self.args.seed)
        self.notes = ["nvtx ranges: no graphs, and each op is called through one"] if self.args.nvtx else []
        key = "preset" if self.model.path is None else "model"
        self.shape = {key: self.model.name, "layers": self.model.n_layers, "case": str(self.case),
                      "lane": self.args.lane}
        if self.core.weights.per_layer_rows is not None:
            self.shape["ple"] = "host"

    def measure(self):
        """All that the case can say."""
        if self.need.is_one_step:
            with seated(self.core, self.case.rows, self.rng) as sequences:
                self.measure_step(step_of(self.core, sequences, self.case.label == VERIFY))
        if self.case.is_decode:
            self.measure_decode()
        if self.case.is_prompt:
            self.measure_prefill()

    def floor_of(self, rows):
        """The Cost of weights, K and V for those rows, on this lane, and where they are drafts that are checked, of
        drafting as many as the sequence with the most has."""
        itemsize = self.lane.dtype.itemsize
        least = floor(self.core.spec, rows, weight_bytes=itemsize, kv_bytes=itemsize, drops=True)
        if not self.checks_drafts:
            return least
        return least + drafting_cost(self.core.draft.spec, [(n, context) for n, _, context, _ in rows],
                                     max(n_query for _, n_query, *_ in rows) - 1, itemsize, itemsize)

    @property
    def checks_drafts(self):
        """Whether the step checks drafted tokens and drafts anew, as an engine with a draft model does."""
        return self.case.label == VERIFY and self.core.draft is not None

    def add(self, name, stats, notes=()):
        self.report.add(Row("engine", name, self.shape, {**stats, **memory_stats(self.lane)}, (*self.notes, *notes)))

    def against_floor(self, rows, seconds):
        """Stats of what so many seconds are to a floor."""
        if self.ceilings is None:
            return {}
        floor_s = self.floor_of(rows).time_s(self.ceilings)
        return {"floor": Stat("s", floor_s, "lower"),
                "percent_of_floor": Stat("%", [100 * floor_s / s for s in seconds], "higher")}

    # --- one step, repeated

    def measure_step(self, build):
        is_bare, graphs = self.case.label == VERIFY and not self.checks_drafts, self.core.graphs
        was_enabled, graphs.enabled = graphs.enabled, graphs.enabled and not is_bare
        try:
            batch = build()
            for _ in range(WARMUPS if self.clock.is_real else 0):
                self.core.step.run(batch)
            with recording(self.core) as calls:
                self.core.step.run(batch)
            ops = ops_of(calls, self.core, batch)
            stats = {"tokens": Stat("1", self.case.n_tokens), "n_ops": Stat("1", len(ops), "lower")}
            walls, gpu, notes = self.timed(build, ops) if self.clock.is_real else ([], [], [])
        finally:
            graphs.enabled = was_enabled
        if is_bare:
            notes.append("the target's rows alone, each sampled: no draft model" + ", no graph" * was_enabled)
        self.add("step", stats | (self.step_stats(walls, gpu) if walls else {}), notes)
        if self.args.ops:
            self.add_ops(grouped(ops), walls, gpu)

    def timed(self, build, ops):
        """([seconds from building the batch to having its tokens], [seconds of the launches alone], notes). They take
        turns: clocks drift. Each step stages the same inputs at the same place, so the launches find theirs."""
        launches = self.clock.timed([op.launch for op in ops])
        walls, gpu = [], []
        for _ in range(self.args.repeats):
            began = time.perf_counter()
            self.core.step.run(build())
            walls.append(time.perf_counter() - began)
            gpu.append(launches.samples(2)[-1])             # the first waits for its launch to reach the GPU
        return walls, gpu, [f"gpu: launched one by one, {launches.why_eager}"] if launches.why_eager else []

    def step_stats(self, walls, gpu):
        return {"wall": Stat("s", walls, "lower"),
                "gpu" if self.lane.name == "cuda" else "ops": Stat("s", gpu, "lower"),
                "host_gap": Stat("%", [100 * (1 - a / b) for a, b in zip(gpu, walls, strict=True)], "lower"),
                "rate": Stat("tokens/s", [self.case.n_tokens / s for s in walls], "higher"),
                **self.against_floor(self.need.rows(), walls)}

    # --- its ops

    def add_ops(self, groups, walls, gpu):
        """A row a group, and where the wall time went."""
        wall_s = median(walls) if walls else None
        kernels_s = 0.0
        for group in groups:
            cost, notes = group.cost, []
            stats = {"bytes": Stat("bytes", cost.bytes), "flops": Stat("flop", cost.flops),
                     "extra_bytes": Stat("bytes", cost.extra_bytes, "lower")}
            if walls:
                seconds = self.group_seconds(group)
                kernels_s += median(seconds)
                stats = {"time": Stat("s", seconds, "lower"), **self.roof_stats(group, seconds), **stats,
                         "share": Stat("%", 100 * median(seconds) / wall_s)}
                is_by_memory = self.ceilings is None or cost.bound(self.ceilings) == "memory"
                if is_by_memory and cost.bytes < COLD_BYTES:    # of the group, before its turn comes again
                    notes.append("its bytes may be in a cache still: bench.py kernels has it cold")
            shape = {**self.shape, "order": group.order, "n_launches": len(group.ops), "n_rows": group.ops[0].n_rows}
            self.report.add(Row("step", group.name, shape, stats, notes))
        if walls:
            self.add_parts(groups, wall_s, median(gpu), kernels_s)
        else:
            cost = self.floor_of(self.need.rows())
            stats = {"bytes": Stat("bytes", cost.bytes), "flops": Stat("flop", cost.flops)}
            self.report.add(Row("step", "floor", self.shape, stats, PARTS["floor"]))

    def group_seconds(self, group):
        """Of all launches of the group, in order, each on its own weights."""
        n_turns = -(-GPU_LAUNCHES // len(group.ops)) if self.lane.name == "cuda" else 1
        launches = [op.launch for op in group.ops] * n_turns
        return [seconds / n_turns for seconds in self.clock.samples(launches, self.args.repeats)]

    def roof_stats(self, group, seconds):
        if self.ceilings is None:
            return {}
        roof_s = group.roof_s(self.ceilings)
        return {"floor": Stat("s", roof_s, "lower"),
                "percent_of_roof": Stat("%", [100 * roof_s / s for s in seconds], "higher")}

    def add_parts(self, groups, wall_s, launches_s, kernels_s):
        """Rows of attribution(); without ceilings only those that need none."""
        floor_s = traffic_s = 0.0
        if self.ceilings is not None:
            floor_s = self.floor_of(self.need.rows()).time_s(self.ceilings)
            traffic_s = sum(group.traffic_s(self.ceilings) for group in groups)
        parts = attribution(wall_s, launches_s, kernels_s, traffic_s, floor_s)
        for name in parts if self.ceilings is not None else ("gaps", "host"):
            stats = {"time": Stat("s", parts[name]), "share": Stat("%", 100 * parts[name] / wall_s)}
            notes = [PARTS[name], *[NEGATIVE.get(name)] * (parts[name] < 0)]
            self.report.add(Row("step", name, self.shape, stats, notes))

    # --- through the loop

    def measure_decode(self):
        """Steps of the loop on from the case's context, or as near to it as they still fit."""
        first = self.need.first_context
        parts = [(part.n_seqs, 1, max(first[part], 2)) for part in self.case.parts]
        if not self.clock.is_real:
            self.decode(parts, 0, EMULATED_STEPS)
            self.add("decode", {"steps": Stat("1", EMULATED_STEPS),
                                "tokens": Stat("1", EMULATED_STEPS * self.case.n_seqs)})
            return
        n = self.args.steps
        runs = [self.decode(parts, WARMUPS, n) for _ in range(self.args.repeats)]
        gaps = [[after - before for before, after in pairwise(ends)] for ends in runs]
        tpots = [(ends[-1] - ends[0]) / (len(ends) - 1) for ends in runs]
        middle = [(n_seqs, 1, context + WARMUPS + n // 2) for n_seqs, _, context in parts]
        notes = [f"decode steps of {bucket} ran eagerly: {why}" for bucket, why in self.core.graphs.failures.items()]
        notes.append(f"contexts {', '.join(str(context + WARMUPS) for *_, context in parts)} and the {n - 1} after")
        self.add("decode", {
            "tpot": Stat("s", tpots, "lower"),
            **{f"itl p{percent}": Stat("s", [percentile(of_run, percent) for of_run in gaps], "lower")
               for percent in (50, 90, 99)},
            "rate": Stat("tokens/s", [self.case.n_seqs / s for s in tpots], "higher"),
            **self.against_floor(middle, tpots)}, notes)

    def decode(self, parts, n_warm, n):
        """When each of n steps of the loop ended, after n_warm others."""
        ends = []
        with seated(self.core, parts, self.rng):
            for _ in range(n_warm):
                self.core.loop.step()
            for _ in range(n):
                self.core.loop.step()
                ends.append(time.perf_counter())
        return ends

    def measure_prefill(self):
        """Whole prompts, all submitted at once, until each has its first token."""
        is_real = self.clock.is_real
        runs = [self.prefill() for _ in range(1 + self.args.repeats if is_real else 1)]
        steps = Stat("1", runs[0][1], "lower")
        if not is_real:
            self.add("prefill", {"steps": steps, "tokens": Stat("1", self.case.n_tokens)})
            return
        ttfts = [found for found, _ in runs[1:]]            # the first compiles kernels and loads modules
        lasts = [max(found) for found in ttfts]
        self.add("prefill", {
            "ttft": Stat("s", [s for found in ttfts for s in found], "lower"),
            "rate": Stat("tokens/s", [self.case.n_tokens / s for s in lasts], "higher"), "steps": steps,
            **self.against_floor(self.case.rows, lasts)})

    def prefill(self):
        """([seconds to each sequence's first token], steps of the loop)."""
        core = self.core
        prompts = [random_tokens(core.spec, self.rng, part.context) for part in self.case.parts
                   for _ in range(part.n_seqs)]
        began, seconds, n_steps = time.perf_counter(), {}, 0
        sequences = [submit(core, tokens) for tokens in prompts]
        try:
            while len(seconds) < len(sequences):
                core.loop.step()
                n_steps += 1
                now = time.perf_counter() - began
                for i, sequence in enumerate(sequences):
                    if sequence.task.output.token_ids:
                        seconds.setdefault(i, now)
        finally:
            for sequence in sequences:
                core.loop.withdraw(sequence)
        return list(seconds.values()), n_steps


def memory_stats(lane):
    """What the process has taken at most; on a GPU what of its memory is in use, by whomever."""
    if lane.name == "cuda":
        with lane.device:
            free, total = lane.cupy.cuda.runtime.memGetInfo()
        return {"memory": Stat("bytes", total - free, "lower")}
    return {"memory": Stat("bytes", memory("VmHWM"), "lower")}
