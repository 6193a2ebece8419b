"""What became of all drafted tokens: how many held, by their place in the draft, and whether that is too few."""

import warnings

ENOUGH = 512                # first drafted tokens after which too few accepted ones are no accident
TOO_FEW = 0.02              # of them; a wiring fault keeps up to 0.002, the worst prompts known 0.08


class DraftHealth:
    """Counters of an engine's drafts.

    n_steps              decisions: steps of a sequence that gave tokens, with drafts or without
    n_checks             of them those that checked at least one drafted token
    drafted, reached, kept  by place: drafted tokens that were checked; those whose predecessors all held; those kept
    """

    def __init__(self):
        self.n_steps = self.n_checks = 0
        self.drafted, self.reached, self.kept = [], [], []
        self.has_warned = False

    def note(self, n_drafted, n_accepted):
        """Takes one check of n_drafted tokens, of which the first n_accepted held; 0 of 0 is a plain step."""
        self.n_steps += 1
        if not n_drafted:
            return
        self.n_checks += 1
        for counts in (self.drafted, self.reached, self.kept):
            counts += [0] * (n_drafted - len(counts))
        for i in range(n_drafted):
            self.drafted[i] += 1
            self.reached[i] += i <= n_accepted
            self.kept[i] += i < n_accepted
        if not self.has_warned and self.drafted[0] >= ENOUGH and self.kept[0] < TOO_FEW * self.drafted[0]:
            self.has_warned = True
            warnings.warn(f"of {self.drafted[0]} first drafted tokens {self.kept[0]} were accepted: the text is right, "
                          "but drafting makes it slower; is the draft model made for this target?", RuntimeWarning,
                          stacklevel=2)

    def rate(self, first_rate, weight):
        """The chance that a drafted token holds where those before it do; first_rate counts for `weight` tokens."""
        return (sum(self.kept) + weight * first_rate) / (sum(self.reached) + weight)

    def stats(self):
        """The counters as a dict. The rates are by place in the draft: acceptance of all drafted tokens,
        conditional_acceptance of those whose predecessors held. tokens_per_check counts the token behind the drafts;
        tokens_per_step the steps without drafts too."""
        n_kept = sum(self.kept)
        return {"steps": self.n_steps, "checks": self.n_checks, "drafted": sum(self.drafted), "accepted": n_kept,
                "tokens_per_check": _share(self.n_checks + n_kept, self.n_checks),
                "tokens_per_step": _share(self.n_steps + n_kept, self.n_steps),
                "acceptance": [_share(*counts) for counts in zip(self.kept, self.drafted, strict=True)],
                "conditional_acceptance": [_share(*counts) for counts in zip(self.kept, self.reached, strict=True)]}

    def lines(self):
        """The same as text, for explain()."""
        if not self.n_checks:
            yield f"  no drafted token was checked in {self.n_steps} steps of a sequence"
            return
        stats = self.stats()
        yield (f"  {stats['accepted']} of {stats['drafted']} drafted tokens accepted in {self.n_checks} checks: "
               f"{stats['tokens_per_check']:.2f} tokens a check, {stats['tokens_per_step']:.2f} a step")
        yield f"  acceptance by place: {_percent(stats['acceptance'])}; of those whose predecessors held: " \
              f"{_percent(stats['conditional_acceptance'])}"


def _share(n, of):
    return n / of if of else 0.0


def _percent(rates):
    return " ".join(f"{100 * rate:.0f}" for rate in rates) + " %"
