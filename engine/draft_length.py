"""How many tokens to draft for a sequence: a fixed number, or as many as its measured acceptance pays for."""

from dataclasses import dataclass
from functools import lru_cache

from engine.draft_health import DraftHealth
from engine.floor import draft_step, floor
from engine.roofline import Ceilings

MOST_DRAFTS = 16            # more than any use: at an acceptance of 0.9 the 17th drafted token is kept one time in six
AUTO_DRAFTS = 8             # at most, for "auto": the longest that the drafts' makers advise (31B)
FIRST_RATE = 0.7            # acceptance of a drafted token before any was checked: Gemma 4's drafts reach 0.6 to 0.8
FIRST_WEIGHT = 4            # drafted tokens that this rate counts for, in a sequence and in the engine
MEMORY = 0.9                # share of what a sequence knew that is left after its next check: it knows about ten
RETRY_TOKENS = 32           # a sequence that gave up drafts one token again after so many without
WORTH = 1.05                # a smaller gain may be none: the host, norms, sampling of more rows are not reckoned
CONTEXT = 1024              # tokens in the cache, of the steps that are reckoned
# What a step is reckoned with: {lane: (ceilings, seconds between two launches)}. An H200's, and what a CPU's two cores
# gave once, beside other work. Only ratios count. The emulator drafts as often as the GPU that it stands for.
MACHINES = {"cuda": (Ceilings(4.3e12, 790e12, "H200"), 1e-6), "cpu": (Ceilings(23.4e9, 111e9, "2 cores"), 10e-6)}
LAUNCHES = 9                # of a layer, and about as many outside of them


@dataclass
class DraftStats:
    """What one sequence knows of its drafts. Later checks count more.

    n_kept, n_judged  drafted tokens accepted, and those judged at all: the ones behind a rejected token are not
    trust             share left of what was believed before the first check
    n_plain           tokens since its last check
    """

    n_kept: float = 0.0
    n_judged: float = 0.0
    trust: float = 1.0
    n_plain: int = 0

    def note(self, n_drafted, n_accepted):
        """Takes the check of n_drafted tokens, of which the first n_accepted held; or, with none, a plain token."""
        if not n_drafted:
            self.n_plain += 1
            return
        self.n_kept = self.n_kept * MEMORY + n_accepted
        self.n_judged = self.n_judged * MEMORY + min(n_drafted, n_accepted + 1)
        self.trust *= MEMORY
        self.n_plain = 0

    def rate(self, first_rate):
        """The chance that a drafted token holds where those before it do."""
        weight = FIRST_WEIGHT * self.trust
        return (self.n_kept + weight * first_rate) / (self.n_judged + weight)


class StepTimes:
    """What steps cost by count, on the machine that a lane stands for: no clock, so that every run decides alike.

    spec, draft  ModelSpec, AssistantSpec
    lane         name of the lane
    itemsize     bytes of a weight
    """

    def __init__(self, spec, draft, lane, itemsize):
        self.spec, self.draft, self.itemsize = spec, draft, itemsize
        self.ceilings, self.gap_s = MACHINES.get(lane, MACHINES["cuda"])
        self.step_s = lru_cache(maxsize=1024)(self._step_s)         # floors take a millisecond
        self.best = lru_cache(maxsize=4096)(self._best)

    def _step_s(self, n_seqs, n_drafts):
        """A step that checks so many drafted tokens of every sequence, and drafts as many anew."""
        return self.target_s(n_seqs, n_drafts) + n_drafts * self.draft_s(n_seqs)

    def target_s(self, n_seqs, n_drafts):
        """Checking so many drafted tokens of every sequence."""
        n_rows, size = n_drafts + 1, self.itemsize
        least = floor(self.spec, [(n_seqs, n_rows, CONTEXT + n_rows, n_rows)], size, size)
        return least.time_s(self.ceilings) + LAUNCHES * (len(self.spec.layers) + 1) * self.gap_s

    def draft_s(self, n_seqs):
        """Drafting one token for every sequence."""
        least = draft_step(self.draft, n_seqs, CONTEXT, self.itemsize, self.itemsize)
        return least.time_s(self.ceilings) + LAUNCHES * (len(self.draft.layers) + 1) * self.gap_s

    def gain(self, rate, n_seqs, n_drafts):
        """How many times as many tokens a second as without drafts, where each holds with the chance `rate`."""
        n_tokens = sum(rate ** i for i in range(n_drafts + 1))
        return n_tokens * self.step_s(n_seqs, 0) / self.step_s(n_seqs, n_drafts)

    def _best(self, rate, n_seqs, most):
        """The number of drafted tokens, 0..most, that gains most, of equal ones the least; 0 where that is too little
        to be sure of."""
        gains = [self.gain(rate, n_seqs, n) for n in range(most + 1)]
        return gains.index(max(gains)) if max(gains) >= WORTH else 0


class DraftControl:
    """Says before a step how many tokens to draft in it for each sequence, and takes down what became of them.

    wanted   the LLM argument n_draft_tokens: an int, or "auto": for each sequence what gains most at its own measured
             acceptance and the number of sequences in the step, as if all were like it; none where drafting loses.
             A sequence that gave up tries one token again now and then. A pure function of counters.
    times    StepTimes; needed for "auto" alone
    health   DraftHealth: counters of all sequences
    """

    def __init__(self, wanted, times=None):
        self.wanted, self.times, self.health = wanted, times, DraftHealth()
        self.most = AUTO_DRAFTS if wanted == "auto" else wanted

    def n_drafts(self, stats, n_seqs):
        """Tokens to draft for a sequence with these DraftStats in a step of n_seqs sequences: 0..most."""
        if self.wanted != "auto":
            return self.wanted
        n_seqs = 1 << (n_seqs - 1).bit_length()             # few numbers, so that best() remembers all of them
        rate = stats.rate(self.health.rate(FIRST_RATE, FIRST_WEIGHT))
        n = self.times.best(round(rate, 2), n_seqs, self.most)
        if not n and stats.n_plain >= RETRY_TOKENS and self.times.best(1.0, n_seqs, 1):
            return 1
        return n

    def note(self, sequence, n_drafted, n_accepted):
        """Takes what a step made of the drafts of a sequence that it decided a token of: n_drafted were checked, the
        first n_accepted of them held. Warns, once, of drafts that hardly ever hold."""
        sequence.draft_stats.note(n_drafted, n_accepted)
        self.health.note(n_drafted, n_accepted)
