"""Decoding with drafts beside decoding without, in turns on the same sequences, as rows of a report."""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from engine.draft_health import DraftHealth
from engine.draft_length import DraftStats
from measure.drafts import AUTO, break_even_stats, draft_stats, losing_note, most_of, times_by_count
from measure.report import BenchError, Row, Stat
from measure.step.engine_case import EMULATED_STEPS, EngineCase
from measure.step.seats import random_tokens, submit

AUTO_GUESS = 4          # tokens that "auto" drafts about, to say how long its turns are


@dataclass(frozen=True)
class Way:
    """One way to decode. wanted: tokens to draft in a step, or "auto"; 0 is without drafts.
    chance: that a drafted token is made to hold; None takes what the draft model drafts."""

    wanted: object
    chance: float | None = None

    @property
    def most(self):
        return most_of([self.wanted])

    def n_steps(self, n_tokens):
        """Steps of a turn: those in which drafts that always hold give n_tokens."""
        n_drafts = min(self.most, AUTO_GUESS) if self.wanted == AUTO else self.most
        return max(2, -(-n_tokens // (1 + n_drafts)))


@dataclass(frozen=True)
class Turn:
    """What one turn came to: seconds of each of its steps, and tokens of all sequences."""

    seconds: tuple
    n_tokens: int

    @property
    def step_s(self):
        return sum(self.seconds) / len(self.seconds)

    @property
    def rate(self):
        return self.n_tokens / sum(self.seconds)


class Memory:
    """What a Way has learned of its drafts in its turns so far: of all sequences, and of each."""

    def __init__(self, n_seqs):
        self.health, self.of_sequences = DraftHealth(), [DraftStats() for _ in range(n_seqs)]
        self.health.has_warned = True                       # random weights hardly ever agree, and the row says it

    def take_over(self, control, sequences):
        control.health = self.health
        for sequence, stats in zip(sequences, self.of_sequences, strict=True):
            sequence.drafts, sequence.draft_stats = [], stats


def ways_of(args):
    """[Way] that the arguments ask for, the first without drafts."""
    return [Way(0), *(Way(wanted, chance) for wanted in args.n_draft_tokens for chance in args.acceptance or [None])]


def tokens_at_most(need, lane, args):
    """Tokens that a sequence of a case goes on for at most, from the end of its prompt on, until all turns are over."""
    n_tokens, n_rounds = _size(lane.name, args)
    n_in_turns = n_rounds * sum((1 + way.n_steps(n_tokens)) * (1 + way.most) for way in ways_of(args))
    n_prompt = sum(part.n_seqs * part.context for part in need.case.parts)
    return n_in_turns + 2 + -(-2 * n_prompt // need.max_batch_tokens) + most_of(args.n_draft_tokens)


def _size(lane_name, args):
    """(tokens of a turn, rounds of turns)."""
    return (EMULATED_STEPS, 1) if lane_name == "emulated" else (args.steps, args.repeats)


class DraftedCase(EngineCase):
    """One decode case on an open Core with a draft model."""

    def measure_drafts(self):
        """A row for each Way. Raises BenchError where the text with drafts is another."""
        ways, (n_tokens, n_rounds) = ways_of(self.args), _size(self.lane.name, self.args)
        prompts = [random_tokens(self.core.spec, self.rng, part.context) for part in self.case.parts
                   for _ in range(part.n_seqs)]
        n_more = n_rounds * sum((1 + way.n_steps(n_tokens)) * (1 + way.most) for way in ways)
        known = self.plain_texts(prompts, n_more)
        turns, memories = {way: [] for way in ways}, {way: Memory(len(prompts)) for way in ways}
        with self.decoding(prompts) as sequences:
            for number in range(n_rounds):                  # back and forth: contexts grow from turn to turn
                for way in ways if number % 2 == 0 else ways[::-1]:
                    turns[way].append(self.turn(way, memories[way], sequences, known, n_tokens))
            if self.args.gemm == "own":                     # with cuBLAS the bits of a row depend on the others
                check_texts([sequence.tokens for sequence in sequences], known)
        self.add_rows(turns, memories)

    @contextmanager
    def decoding(self, prompts):
        """The sequences of the prompts, each with its first token. They leave when the context ends."""
        loop = self.core.loop
        sequences = [submit(self.core, tokens) for tokens in prompts]
        try:
            while not all(sequence.task.output.token_ids for sequence in sequences):
                loop.step()
            yield sequences
        finally:
            self.core.control.wanted = 0
            for sequence in sequences:
                loop.withdraw(sequence)

    def plain_texts(self, prompts, n_more):
        """The tokens of each sequence without drafts: prompt, first tokens and n_more."""
        with self.decoding(prompts) as sequences:
            for _ in range(n_more):
                self.core.loop.step()
            return [list(sequence.tokens) for sequence in sequences]

    def turn(self, way, memory, sequences, known, n_tokens):
        """Steps one Way. The first is not counted: it has no drafts to judge yet."""
        memory.take_over(self.core.control, sequences)
        self.core.control.wanted = way.wanted
        self.step(way, sequences, known)
        before = sum(len(sequence.tokens) for sequence in sequences)
        seconds = tuple(self.step(way, sequences, known) for _ in range(way.n_steps(n_tokens)))
        return Turn(seconds, sum(len(sequence.tokens) for sequence in sequences) - before)

    def step(self, way, sequences, known):
        """Seconds of one step of the loop. Its drafts are replaced where they are made to hold with a chance."""
        began = time.perf_counter()
        self.core.loop.step()
        seconds = time.perf_counter() - began
        for sequence, text in zip(sequences, known, strict=True) if way.chance is not None else ():
            at = len(sequence.tokens)
            drafts = text[at:at + len(sequence.drafts)]
            misses = np.flatnonzero(self.rng.random(len(drafts)) >= way.chance)
            for miss in misses[:1]:                         # what is behind it is not judged
                drafts[miss] = (drafts[miss] + 1) % self.core.spec.vocab
            sequence.drafts = drafts
        return seconds

    def add_rows(self, turns, memories):
        plain = turns[Way(0)]
        for way, of_way in turns.items():
            shape = {**self.shape, "n_draft_tokens": way.wanted, "acceptance": way.chance}
            stats, notes = counts(of_way, memories[way].health)
            if self.clock.is_real:
                stats |= {"step": Stat("s", [turn.step_s for turn in of_way], "lower"),
                          "rate": Stat("tokens/s", [turn.rate for turn in of_way], "higher")}
            if way.most and self.clock.is_real:
                ratio = median(turn.rate for turn in of_way) / median(turn.rate for turn in plain)
                stats["speed-up"] = Stat("x", ratio, "higher")
            for by, slowdown in self.slowdowns(way, of_way, plain).items():
                stats |= break_even_stats(way.wanted, slowdown, f", {by}")
                notes += losing_note(way.wanted, slowdown, f"{by}: ")
            self.report.add(Row("engine", "drafts" if way.most else "no drafts", shape, stats, notes))

    def slowdowns(self, way, turns, plain):
        """{what says so: how many times as long as a plain step one with drafts takes}."""
        found = {}
        if way.wanted in (0, AUTO):
            return found
        if self.ceilings is not None:
            itemsize = self.lane.dtype.itemsize
            found["floors"] = times_by_count(self.core.spec, self.core.draft.spec, self.case.rows, way.wanted,
                                             self.ceilings, 3 * (itemsize,)).slowdown
        if self.clock.is_real:
            found["measured"] = median(turn.step_s for turn in turns) / median(turn.step_s for turn in plain)
        return found


def counts(turns, health):
    """({name: Stat}, notes) of what needs no clock."""
    n_steps, n_tokens = sum(len(turn.seconds) for turn in turns), sum(turn.n_tokens for turn in turns)
    stats = {"steps": Stat("1", n_steps), "tokens": Stat("1", n_tokens),
             "tokens a step": Stat("1", n_tokens / n_steps, "higher")}
    more, notes = draft_stats(health.stats())
    return stats | more, notes


def check_texts(texts, known):
    """Raises BenchError where a text differs from the one without drafts."""
    for number, (text, expected) in enumerate(zip(texts, known, strict=True)):
        for at, (token, other) in enumerate(zip(text, expected, strict=False)):
            if token != other:
                raise BenchError(f"drafts change the text: token {at} of sequence {number} is {token}, without drafts "
                                 f"{other}; no figure of them is kept")
