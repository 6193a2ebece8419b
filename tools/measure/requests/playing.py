"""A trace of requests played through a Loop in real time, and what is known of each request afterwards."""

import time
from dataclasses import dataclass, field

from measure.report import BenchError

LONGEST_SLEEP_S = 0.5           # so that Ctrl-C and SIGTERM are heard while nothing is due


@dataclass
class Served:
    """One request and when its tokens came; times are seconds after the trace began.

    sent_s   when it was due, or, where as many as allowed were in flight, when the first of them ended; what it then
             waits for the step at hand counts
    token_s  when each of its tokens was there
    """

    request: object
    sent_s: float
    token_s: list = field(default_factory=list)

    @property
    def ttft_s(self):
        """Time to first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self):
        """Time per output token after the first; None for one token."""
        n = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / n if n else None

    @property
    def end_s(self):
        return self.token_s[-1]

    def meets(self, slo_ttft, slo_tpot):
        """Whether it kept both promises, in seconds; a request of one token has only the first to keep."""
        return self.ttft_s <= slo_ttft and (self.tpot_s is None or self.tpot_s <= slo_tpot)


@dataclass(frozen=True)
class Ran:
    """One step: when it began and ended, and how many sequences were running in it."""

    begin_s: float
    end_s: float
    n_running: int


@dataclass
class Played:
    """What became of a trace: its requests in the order in which they were sent, its steps, preemptions in them."""

    served: list
    steps: list
    n_preemptions: int


def play(requests, loop, task_of, most_in_flight=None, on_end=lambda: None, clock=time.perf_counter, sleep=time.sleep):
    """Submits each request when it is due, steps while there is work, notes when tokens come. Returns Played.

    loop            submit(tokens, task), withdraw(sequence), step(), scheduler.running, scheduler.n_preemptions
    task_of         task_of(number, request) -> what has output.token_ids and is_finished, as engine.tasks.Generation
    most_in_flight  requests sent and not ended, at most; None is no limit
    on_end          called as each request ends
    One thread does all: what falls due during a step is submitted after it.
    """
    waiting, flying, played = list(reversed(requests)), [], Played([], [], 0)
    n_preempted = loop.scheduler.n_preemptions
    began, room_s = clock(), 0.0
    try:
        while waiting or flying:
            now = clock() - began
            while waiting and waiting[-1].due_s <= now and (most_in_flight is None or len(flying) < most_in_flight):
                request = waiting.pop()
                task = task_of(len(played.served), request)
                served = Served(request, max(request.due_s, room_s))
                flying.append((loop.submit(list(request.tokens), task), task, served))
                played.served.append(served)
            if not flying:
                sleep(min(waiting[-1].due_s - now, LONGEST_SLEEP_S))
                continue
            begin = clock() - began
            loop.step()
            end = clock() - began
            was_full = most_in_flight is not None and len(flying) == most_in_flight
            n_ended = _note(flying, end, on_end)
            room_s = end if was_full and n_ended else room_s
            played.steps.append(Ran(begin, end, len(loop.scheduler.running) + n_ended))
    finally:
        for sequence, _, _ in flying:
            loop.withdraw(sequence)
    played.n_preemptions = loop.scheduler.n_preemptions - n_preempted
    return played


def _note(flying, now, on_end):
    """Gives every request in flight the time of its new tokens and takes out those that ended; returns how many."""
    n_before, still = len(flying), []
    for entry in flying:
        _, task, served = entry
        served.token_s += [now] * (len(task.output.token_ids) - len(served.token_s))
        if not task.is_finished:
            still.append(entry)
            continue
        if len(served.token_s) != served.request.n_output:
            raise BenchError(f"a request asked for {served.request.n_output} tokens and got {len(served.token_s)}")
        on_end()
    flying[:] = still
    return n_before - len(still)
