"""Whole models side by side: one Core, and torch on the same weights, decoding and prefilling in turns.

Both decode greedily from a cache that counts as computed: random K and V, so that a context of 32 k needs no prefill.
Before anything is timed, both compute the same prompt, whole and token by token, and their logits are compared.
"""

import time

import numpy as np

from engine.tasks import Probe
from measure.cases import Case, Part
from measure.models import models_of
from measure.peer.torch_arrays import why
from measure.peer.turns import compared, rest, take_turns
from measure.report import BenchError, Row, Stat
from measure.sm_clock import side_clocks
from measure.step import seats

PROMPT = 64             # tokens of the prompt whose logits are compared; a quarter of them one at a time
MOST_BATCH_TOKENS = 8192
# Each layer rounds about 8 values of a size with the residual stream, on each side on its own: the errors add up as a
# random walk of 16 steps a layer. Four times that is allowed, because a sharp softmax multiplies them. A model that
# computes something else is off by about 1. In float32 the bound is the one that holds the engine to transformers.
ROUNDINGS_A_LAYER = 16
BFLOAT16_ROUNDING, FLOAT32_BOUND = 2.0**-9, 2e-4


def bound_of(lane, spec):
    """How far apart the sides' logits may be, as a share of the largest."""
    if lane.dtype == np.float32:
        return FLOAT32_BOUND
    return 4 * BFLOAT16_ROUNDING * (ROUNDINGS_A_LAYER * len(spec.layers)) ** 0.5


def is_served(case):
    """Decoding of equal sequences, or equal whole prompts: what both sides can be timed at."""
    return len(case.parts) == 1 and (case.is_decode or case.is_prompt)


def check_cases(cases):
    for case in cases:
        if not is_served(case):
            raise BenchError(f"case {str(case)!r}: expected decodes, [N*]1@CONTEXT, or whole prompts, [N*]QUERY")


def needs_of(case, spec, n_steps):
    """What a Core is opened for: the case, and the prompts whose logits are compared."""
    n = min(PROMPT, case.max_context if case.is_prompt else spec.max_positions)
    prompt = Case("check", (Part(case.n_seqs, n, n),))
    return [seats.Needs(case, n_steps, spec.max_positions, MOST_BATCH_TOKENS),
            seats.Needs(prompt, 1, spec.max_positions, MOST_BATCH_TOKENS)]


def open_core(name, spec, lane, checkpoint, cases, n_steps, report, seed):
    """(Core with room for each case and no more: the peer has a cache of its own; the cases that it can meet)."""
    served = [case for case in cases if case.max_context + n_steps <= spec.max_positions]
    for case in cases:
        if case not in served:
            report.skip(f"{name}: {case}", f"it decodes on to {case.max_context + n_steps} positions, the model has "
                                           f"{spec.max_positions}")
    needs = [need for case in served for need in needs_of(case, spec, n_steps)]
    if not needs:
        return None, []
    core, met = seats.open_core(name, spec, needs, lane, checkpoint, report, {}, seed)
    met = {need.case for need in met}
    return core, [case for case in served if case in met]


def prompts(spec, rng, n_seqs, length):
    return [seats.random_tokens(spec, rng, length) for _ in range(n_seqs)]


class Ours:
    """The Core's side of one case: steps of sequences that decode, from the case's context on in every sample, as the
    peers' do; or prompts to their first token."""

    def __init__(self, core, case, rng, n_tokens):
        self.core, self.case, self.rng, self.n_tokens = core, case, rng, n_tokens

    def samples(self, n):
        return [self._decode() if self.case.is_decode else self._prefill() for _ in range(n)]

    def _decode(self):
        with seats.seated(self.core, [(self.case.n_seqs, 1, self.case.max_context - 1)], self.rng):
            self.core.loop.step()                               # takes the sequences in, which theirs need not
            began = time.perf_counter()
            for _ in range(self.n_tokens):
                self.core.loop.step()
            return (time.perf_counter() - began) / self.n_tokens

    def _prefill(self):
        ids = prompts(self.core.spec, self.rng, self.case.n_seqs, self.case.max_context)
        began = time.perf_counter()
        sequences = [seats.submit(self.core, row) for row in ids]
        while not all(sequence.task.output.token_ids for sequence in sequences):
            self.core.loop.step()
        seconds = time.perf_counter() - began
        for sequence in sequences:
            self.core.loop.withdraw(sequence)
        return seconds


def our_logits(core, ids, first):
    """[n_seqs, n - first, vocab] float32 after the tokens of ids [n_seqs, n] from `first` on."""
    probes = [Probe(len(row), first, core.spec, None) for row in ids]
    for row, probe in zip(ids, probes, strict=True):
        core.loop.submit(row, probe)
    while not all(probe.is_finished for probe in probes):
        core.loop.step()
    return np.stack([probe.logits for probe in probes])


def error_of(peer, core, case, rng):
    """Of the peer's logits, the largest difference from ours, as a share of our largest logit; NaN where one is. For
    prompts those after the last token of as long ones; for decodes also those after each further token."""
    n = case.max_context if case.is_prompt else min(PROMPT, core.spec.max_positions)
    first = n - 1 if case.is_prompt else n - n // 4
    ids = prompts(core.spec, rng, case.n_seqs, n)
    ours, theirs = our_logits(core, ids, first), peer.logits(ids, first)
    return float(np.max(np.max(np.abs(theirs - ours), axis=(0, 2)) / np.max(np.abs(ours), axis=(0, 2))))


def row_of(case, preset_name, spec, peer_name, stats, notes=()):
    name = "decode, a token" if case.is_decode else "prefill, to the first token"
    shape = {"model": preset_name, "layers": len(spec.layers), "batch": case.n_seqs, "context": case.max_context,
             "peer": peer_name}
    return Row("against", name, shape, stats, notes)


def measure_case(core, model, case, peers, args, report):
    """Rows of one case against every peer; returns whether all outputs agreed.

    model  the Model that the Core was opened for
    peers  {name: open(core, case, max_len, model) -> a peer}; see measure/peer/peer_models.py
    """
    is_good, max_len = True, max(PROMPT, case.max_context + args.tokens + 1)    # theirs may read it all: no more
    for peer_name, open_peer in peers.items():
        peer = None
        try:
            peer = open_peer(core, case, max_len, model)
            is_good &= measure_peer(core, model.name, case, peer_name, peer, args, report)
        except Exception as error:                              # a peer's failure is the peer's: the others go on
            report.skip(f"{model.name} {case}: {peer_name}", error if isinstance(error, BenchError) else why(error))
        finally:
            if peer is not None:
                peer.close()
    return is_good


def measure_peer(core, name, case, peer_name, peer, args, report):
    """The rows of one case and one peer; returns whether the outputs agree. What disagrees is not timed."""
    rng = np.random.default_rng(args.seed)
    compile_s = peer.ready(args.tokens)
    if compile_s:
        report.add(Row("against", "compile", {"model": name, "case": str(case), "peer": peer_name},
                       {"theirs": Stat("s", compile_s, "lower")}))
    error, bound = error_of(peer, core, case, rng), bound_of(core.lane, core.spec)
    stats = {"error": Stat("x", error, "lower")} if np.isfinite(error) else {}
    if not error <= bound:                                      # NaN is not
        report.add(row_of(case, name, core.spec, peer_name, stats,
                          f"not timed: logits differ by {error:.2g} of the largest, expected {bound:.2g}"))
        return False
    if core.lane.name == "emulated":
        report.add(row_of(case, name, core.spec, peer_name, stats, "emulated: compared, not timed"))
        return True
    ours, clocks = Ours(core, case, rng, args.tokens), side_clocks(core.lane)
    sides = {"ours": ours, "theirs": peer}
    before = None if core.lane.name == "cuda" else rest
    take_turns(sides, 1)                                        # graphs are captured, caches warm
    with report.bar(args.repeats, f"{name} {case} against {peer_name}") as bar:
        samples = take_turns(sides, args.repeats, bar, before, clocks)
    report.add(row_of(case, name, core.spec, peer_name, {**compared(samples["ours"], samples["theirs"]), **stats},
                      (*peer.notes, *clocks.notes())))
    return True


def steps_of(args):
    """Decode steps that go on from a case's context: those of one sample, for each begins there."""
    return args.tokens


def measure_models(args, presets, lane, report, peers):
    """Every case of every model; returns whether all outputs agreed."""
    is_good = True
    for model in models_of(args, presets):
        name = f"{model.name}, {model.n_layers} layers" if model.n_layers else model.name
        with model.checkpoint(args.seed) as checkpoint:
            core, cases = open_core(name, model.spec, lane, checkpoint, args.case, steps_of(args), report, args.seed)
        for case in cases:
            is_good &= measure_case(core, model, case, peers, args, report)
        del core                                                # before the next model's memory is planned
    return is_good
