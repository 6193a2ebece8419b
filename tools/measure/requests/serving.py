"""What a played trace amounts to: latencies, rates and goodput, over the steady state where there was one."""

from dataclasses import dataclass

from measure.report import BenchError, Stat, percentile

LEAST_STEADY = 8                # requests: fewer say little of a p90
LEAST_ENDED = 0.8               # of the requests that arrive: where fewer end, they wait longer and longer
PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Window:
    """Seconds of a trace that are counted. `note`: what is wrong with them, "" where they are a steady state."""

    begin_s: float
    end_s: float
    note: str = ""

    @property
    def seconds(self):
        return self.end_s - self.begin_s

    def holds(self, at_s):
        """begin and end belong to it: a trace's first request and last token do."""
        return self.begin_s <= at_s <= self.end_s


def steady_window(played):
    """From the end of the first request to the last arrival: in between load neither builds up nor runs out. The whole
    trace where fewer than LEAST_STEADY requests arrive, or end, within. Where load builds up all the same, a note."""
    whole = Window(min(served.sent_s for served in played.served), max(served.end_s for served in played.served))
    steady = Window(min(served.end_s for served in played.served), max(served.sent_s for served in played.served))
    n_arrive = sum(steady.holds(served.sent_s) for served in played.served)
    n_end = sum(steady.holds(served.end_s) for served in played.served)
    if steady.seconds > 0 and min(n_arrive, n_end) >= LEAST_STEADY:
        if n_end >= LEAST_ENDED * n_arrive:
            return steady
        return Window(steady.begin_s, steady.end_s, f"not steady: {n_end} requests end while {n_arrive} arrive, so "
                      "more and more wait, and latencies grow with the length of the trace")
    return Window(whole.begin_s, whole.end_s, f"no steady state: {n_arrive} requests arrive and {n_end} end between "
                  f"the first end and the last arrival, {LEAST_STEADY} of each make one; the whole trace is counted")


def stats_of(played, slo_ttft, slo_tpot):
    """({name: (value, unit, better)}, Window). Latencies are of the requests that arrive in the window and, token by
    token, of what comes out in it; rates are of what comes out in it."""
    window = steady_window(played)
    if window.seconds <= 0:
        raise BenchError("the trace took no time by the clock: nothing can be said of it")
    arrived = [served for served in played.served if window.holds(served.sent_s)]
    ended = [served for served in played.served if window.holds(served.end_s)]
    gaps = [after - before for served in played.served
            for before, after in zip(served.token_s, served.token_s[1:], strict=False) if window.holds(after)]
    n_output = sum(window.holds(at) for served in played.served for at in served.token_s)
    n_prompt = sum(len(served.request.tokens) for served in played.served if window.holds(served.token_s[0]))
    steps = [step for step in played.steps if window.holds(step.begin_s) and window.holds(step.end_s)]
    busy_s = sum(step.end_s - step.begin_s for step in steps)
    values = {}
    for name, samples in (("ttft", [served.ttft_s for served in arrived]),
                          ("tpot", [served.tpot_s for served in arrived if served.tpot_s is not None]),
                          ("itl", gaps)):
        if samples:
            values.update({f"{name} p{percent}": (percentile(samples, percent), "s", "lower") for percent in PERCENTS})
    kept = sum(served.meets(slo_ttft, slo_tpot) for served in ended)
    values |= {"output": (n_output / window.seconds, "tokens/s", "higher"),
               "total": ((n_output + n_prompt) / window.seconds, "tokens/s", "higher"),
               "requests": (len(ended) / window.seconds, "requests/s", "higher"),
               "goodput": (kept / window.seconds, "requests/s", "higher"),
               "busy": (100 * busy_s / window.seconds, "%", "")}
    if busy_s:
        mean = sum(step.n_running * (step.end_s - step.begin_s) for step in steps) / busy_s
        values["running"] = (mean, "1", "")
    return values | {"preemptions": (played.n_preemptions, "1", "lower")}, window


def stats_over(repeats):
    """{name: Stat} of the values of several repeats, a sample each; what one of them lacks is left out."""
    names = [name for name in repeats[0] if all(name in values for values in repeats)]
    return {name: Stat(repeats[0][name][1], [values[name][0] for values in repeats], repeats[0][name][2])
            for name in names}
