"""Taking turns: sides are timed A B A B in one loop, so that a machine that slows down slows both."""

import time
from statistics import median

from measure.report import Stat

SETTLE_S = 0.1      # idle BLAS and OpenMP threads spin for some ms after a side's work, and slow the other's


def take_turns(sides, rounds, bar=None, before=None, after=None):
    """{side: [seconds, one a round]} of {side: what has samples(n)}: each is asked for one sample a round, in order.
    before(side's timed) is called before each turn, after(name) behind it."""
    samples = {name: [] for name in sides}
    for _ in range(rounds):
        for name, timed in sides.items():
            if before is not None:
                before(timed)
            samples[name] += timed.samples(1)
            if after is not None:
                after(name)
        if bar is not None:
            bar.update(1)
    return samples


def rest(timed):
    """Before a turn on the host: the other side's threads go to sleep."""
    time.sleep(SETTLE_S)


def rest_and_wake(timed):
    """The same where a sample is short: one that is not kept wakes this side's own threads."""
    rest(timed)
    timed.samples(1)


def times_better(ours, theirs, better="lower"):
    """How many times better `ours` is; > 1 is ahead."""
    return theirs / ours if better == "lower" else ours / theirs


def compared(ours, theirs, unit="s", better="lower"):
    """{name: Stat} of two sides' samples, taken in turns: each side's, the ratio of their medians, the ratio of their
    bests, which other work on the machine disturbs least, and the ratios round by round."""
    a, b = Stat(unit, ours, better), Stat(unit, theirs, better)
    rounds = [times_better(x, y, better) for x, y in zip(a.samples, b.samples, strict=True)]
    return {"ours": a, "theirs": b, "ratio": Stat("x", times_better(median(a.samples), median(b.samples), better),
                                                  "higher"),
            "of_bests": Stat("x", times_better(a.best, b.best, better), "higher"),
            "by_round": Stat("x", rounds, "higher")}
