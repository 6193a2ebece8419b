"""bench.py serve: the trace of requests, playing it, and what it amounts to, with a fake clock; then the real loop."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import bench
import numpy as np
import pytest
from measure import serve
from measure.report import BenchError, load_document, rows_of
from measure.requests.arrivals import Request, draw_requests
from measure.requests.playing import Played, Ran, Served, play
from measure.requests.serving import LEAST_STEADY, stats_of, stats_over, steady_window
from measure.serve import rate_list, seconds, share, warm_up

from tests.golden import Golden

DEMO = Path(__file__).resolve().parents[2] / "demo/checkpoint"


# --- the trace

def test_arrivals_are_poisson_at_the_rate():
    due = np.array([request.due_s for request in draw_requests(4000, 8.0, 4, 2, 50, seed=0)])
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.08)             # 5 standard errors of 4000 exponential gaps
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)         # of an exponential they are equal
    assert (gaps > 1 / 8).mean() == pytest.approx(math.exp(-1), abs=0.04)


def test_every_rate_plays_the_same_requests():
    slow, fast, at_once = (draw_requests(20, rate, 30, 10, 100, 3, 0.5) for rate in (2.0, 8.0, math.inf))
    assert [one.tokens for one in slow] == [one.tokens for one in fast] == [one.tokens for one in at_once]
    assert [one.due_s for one in slow] == pytest.approx([4 * one.due_s for one in fast])
    assert {one.due_s for one in at_once} == {0.0}


def test_traces_depend_on_the_seed_alone():
    first, again, other = (draw_requests(5, 4.0, 30, 10, 100, seed, 0.5) for seed in ([1, 0], [1, 0], [1, 1]))
    assert first == again
    assert first != other


def test_lengths_spread_evenly_about_their_mean():
    requests = draw_requests(2000, 1.0, 40, 20, 100, 0, spread=0.5)
    inputs, outputs = ([len(one.tokens) for one in requests], [one.n_output for one in requests])
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (20, 60, 10, 30)
    assert np.mean(inputs) == pytest.approx(40, abs=1.4)             # 5 standard errors: 41 lengths, 2000 draws
    assert {len(one.tokens) for one in draw_requests(9, 1.0, 40, 20, 100, 0)} == {40}
    assert {token for one in requests for token in one.tokens} == set(range(100))


def test_a_shared_prefix_begins_every_prompt_and_counts():
    requests = draw_requests(8, 1.0, 12, 2, 1000, 0, n_shared=9)
    assert len({one.tokens[:9] for one in requests}) == 1
    assert len({one.tokens[9:] for one in requests}) == 8
    assert {len(one.tokens) for one in requests} == {12}
    with pytest.raises(BenchError, match="shared prefix of 12 tokens: the shortest prompt has 12"):
        draw_requests(8, 1.0, 12, 2, 1000, 0, n_shared=12)


# --- playing it

class FakeLoop:
    """A step takes 1 s by the fake clock, or as much as it has sequences / 4, and gives every sequence a token. At most
    max_seqs run; the others wait."""

    def __init__(self, max_seqs=4):
        self.now, self.max_seqs = 0.0, max_seqs
        self.scheduler = SimpleNamespace(running=[], n_preemptions=5)
        self.waiting, self.log, self.withdrawn = [], [], []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds

    def submit(self, tokens, task):
        sequence = SimpleNamespace(tokens=tokens, task=task)
        self.waiting.append(sequence)
        self.log.append((self.now, len(tokens)))
        return sequence

    def withdraw(self, sequence):
        self.withdrawn.append(sequence)

    def step(self):
        running = self.scheduler.running
        while self.waiting and len(running) < self.max_seqs:
            running.append(self.waiting.pop(0))
        self.now += max(1.0, len(running) / 4)
        for sequence in list(running):
            sequence.task.output.token_ids.append(7)
            if len(sequence.task.output.token_ids) == sequence.task.n_output:
                sequence.task.is_finished = True
                running.remove(sequence)


def fake_task(number, request):
    return SimpleNamespace(output=SimpleNamespace(token_ids=[]), is_finished=False, n_output=request.n_output)


def played_by(loop, requests, **options):
    return play(requests, loop, fake_task, clock=loop.clock, sleep=loop.sleep, **options)


def request(due_s, n_output, n_input=3):
    return Request(due_s, tuple(range(n_input)), n_output)


def test_requests_are_sent_when_due_and_their_wait_for_a_step_counts():
    loop = FakeLoop()
    played = played_by(loop, [request(0, 3), request(1.5, 2), request(9.25, 1)])
    first, second, third = played.served
    assert first.token_s == [1, 2, 3]
    assert second.token_s == [3, 4]                  # due in the middle of a step, submitted after it
    assert (second.sent_s, second.ttft_s, second.tpot_s) == (1.5, 1.5, 1.0)
    assert third.token_s == [10.25] and third.tpot_s is None         # slept until it was due, in steps of half a second
    assert [at for at, _ in loop.log] == [0, 2, 9.25]
    assert [(step.begin_s, step.end_s, step.n_running) for step in played.steps] == [
        (0, 1, 1), (1, 2, 1), (2, 3, 2), (3, 4, 1), (9.25, 10.25, 1)]


def test_no_more_are_in_flight_than_allowed_and_time_counts_from_when_there_is_room():
    loop = FakeLoop()
    played = played_by(loop, [request(0, 2), request(0, 4), request(0, 1), request(2.5, 1)], most_in_flight=2)
    assert [served.sent_s for served in played.served] == [0, 0, 2, 3]
    assert [served.token_s for served in played.served] == [[1, 2], [1, 2, 3, 4], [3], [4]]
    assert max(step.n_running for step in played.steps) == 2


def test_ends_are_told_and_preemptions_are_those_of_this_trace():
    loop, ends = FakeLoop(), []
    step = loop.step
    def preempting_step():
        loop.scheduler.n_preemptions += 1
        step()
    loop.step = preempting_step
    played = played_by(loop, [request(0, 2), request(0, 3)], on_end=lambda: ends.append(loop.now))
    assert ends == [2, 3]
    assert played.n_preemptions == 3


def test_what_is_in_flight_is_withdrawn_when_a_step_fails():
    loop = FakeLoop()
    def failing_step():
        raise KeyboardInterrupt
    loop.step = failing_step
    with pytest.raises(KeyboardInterrupt):
        played_by(loop, [request(0, 2), request(0, 3)])
    assert len(loop.withdrawn) == 2


def test_a_request_that_ends_early_is_an_error():
    def short_task(number, request):
        return fake_task(number, Request(0, (), 1))
    loop = FakeLoop()
    with pytest.raises(BenchError, match="asked for 2 tokens and got 1"):
        play([request(0, 2)], loop, short_task, clock=loop.clock, sleep=loop.sleep)


# --- what it amounts to

def steady_trace(n=20):
    """Requests sent each second, first token 0.5 s later, then two more 0.25 s apart; 10 prompt tokens each."""
    served = [Served(request(float(i), 3, 10), float(i), [i + 0.5, i + 0.75, i + 1.0]) for i in range(n)]
    return Played(served, [Ran(i + 0.0, i + 0.5, 2) for i in range(n)] + [Ran(i + 0.5, i + 0.75, 4) for i in range(n)],
                  n_preemptions=2)


def values(stats):
    return {name: value for name, (value, unit, better) in stats.items()}


def test_the_steady_state_is_from_the_first_end_to_the_last_arrival():
    window = steady_window(steady_trace())
    assert (window.begin_s, window.end_s, window.note) == (1.0, 19.0, "")


def test_figures_of_a_steady_state():
    stats, _ = stats_of(steady_trace(), slo_ttft=0.5, slo_tpot=0.25)
    found = values(stats)
    assert found["ttft p50"] == found["ttft p99"] == pytest.approx(0.5)
    assert found["tpot p50"] == found["itl p90"] == pytest.approx(0.25)
    assert found["output"] == pytest.approx((18 * 3 + 1) / 18)       # 18 s, and the token at 1.0 belongs to it
    assert found["total"] == pytest.approx((18 * 3 + 1 + 18 * 10) / 18)
    assert found["requests"] == found["goodput"] == pytest.approx(19 / 18)       # ends at 1.0, 2.0 .. 19.0
    assert found["busy"] == pytest.approx(75.0)
    assert found["running"] == pytest.approx((0.5 * 2 + 0.25 * 4) / 0.75)
    assert found["preemptions"] == 2
    assert stats["goodput"][1:] == ("requests/s", "higher")


@pytest.mark.parametrize("slo_ttft, slo_tpot, share", [(0.5, 0.25, 1), (0.49, 0.25, 0), (0.5, 0.24, 0)])
def test_goodput_counts_requests_that_keep_both(slo_ttft, slo_tpot, share):
    found = values(stats_of(steady_trace(), slo_ttft, slo_tpot)[0])
    assert found["goodput"] == pytest.approx(share * found["requests"])


def test_goodput_leaves_out_the_one_that_was_late():
    played = steady_trace()
    late = played.served[7]
    late.token_s[:] = [late.sent_s + 0.9, late.sent_s + 0.95, late.sent_s + 1.0]
    found = values(stats_of(played, 0.5, 0.25)[0])
    assert found["goodput"] == pytest.approx(18 / 18) and found["requests"] == pytest.approx(19 / 18)
    assert found["ttft p99"] > 0.5 == found["ttft p50"]


def test_latencies_are_of_the_window_alone():
    """What the first request waited for is before it, what the last one did is after it."""
    played = steady_trace()
    played.served[0].token_s[:] = [0.95, 0.96, 1.0]
    played.served[-1].token_s[:] = [19.9, 29.0, 99.0]
    stats, window = stats_of(played, 0.5, 0.25)
    found = values(stats)
    assert (window.begin_s, window.end_s) == (1.0, 19.0)
    assert found["itl p99"] < 0.3 and found["ttft p50"] == 0.5 and found["ttft p99"] > 0.8
    played.served[0].sent_s, played.served[0].token_s[0] = -9.0, 0.5
    assert values(stats_of(played, 0.5, 0.25)[0])["ttft p99"] < 1               # it arrived before
    assert stats["busy"][1:] == ("%", "")


def test_a_steady_state_has_arrivals_and_ends():
    played = steady_trace(30)
    for served in played.served[1:]:
        served.token_s = [40 + at for at in served.token_s]                     # they arrive in it, none ends in it
    assert "29 requests arrive and 1 end" in steady_window(played).note


def test_a_trace_without_time_says_nothing():
    with pytest.raises(BenchError, match="the trace took no time"):
        stats_of(Played([Served(request(0.0, 1), 0.0, [0.0])], [], 0), 1.0, 1.0)


def test_without_a_steady_state_the_whole_trace_counts_and_that_is_said():
    served = [Served(request(0.0, 2), 0.0, [1.0, 1.0 + i]) for i in range(1, 5)]
    stats, window = stats_of(Played(served, [Ran(0.0, 5.0, 4)], 0), 2.0, 2.0)
    assert (window.begin_s, window.end_s) == (0.0, 5.0)
    assert "no steady state: 0 requests arrive and 0 end" in window.note
    assert values(stats)["output"] == pytest.approx(8 / 5)
    assert values(stats)["requests"] == pytest.approx(4 / 5)
    assert values(stats)["goodput"] == pytest.approx(2 / 5)          # the others take 3 and 4 s a token


def test_few_requests_are_no_steady_state():
    assert steady_window(steady_trace(LEAST_STEADY + 1)).note == ""
    assert "no steady state" in steady_window(steady_trace(LEAST_STEADY)).note


@pytest.mark.parametrize("n_end, is_steady", [(24, True), (23, False)])
def test_load_that_builds_up_is_no_steady_state_and_that_is_said(n_end, is_steady):
    """30 requests arrive from the first end, at 1.0, to the last arrival, at 30.0."""
    played = steady_trace(31)
    for served in played.served[n_end:]:
        served.token_s = [99.0 + at for at in served.token_s]
    window = steady_window(played)
    assert (window.begin_s, window.end_s) == (1.0, 30.0)
    assert window.note == ("" if is_steady else "not steady: 23 requests end while 30 arrive, so more and more wait, "
                           "and latencies grow with the length of the trace")


def test_requests_of_one_token_have_no_time_per_token():
    played = Played([Served(request(0.0, 1), 0.0, [1.0])], [Ran(0.0, 1.0, 1)], 0)
    found = values(stats_of(played, 2.0, 1e-9)[0])
    assert found["goodput"] == 1.0
    assert not any(name.startswith(("tpot", "itl")) for name in found)


def test_repeats_are_samples():
    stats = stats_over([{"a": (1.0, "s", "lower"), "b": (2.0, "1", "")}, {"a": (3.0, "s", "lower")}])
    assert stats["a"].samples == (1.0, 3.0) and stats["a"].better == "lower"
    assert "b" not in stats


# --- arguments, and the real loop

def test_rates():
    assert rate_list("4,8.5,inf") == [4.0, 8.5, math.inf]
    for text in ("0", "4,", "-1", "nan", "fast"):
        with pytest.raises(BenchError, match="expected requests per second above 0, or inf"):
            rate_list(text)
    with pytest.raises(BenchError, match="'0' is no time in seconds"):
        seconds("0")
    with pytest.raises(BenchError, match="'1' is no share"):
        share("1")


def test_serve_on_the_cpu_lane(tmp_path, capsys):
    out = tmp_path / "serve.json"
    status = bench.main(["serve", "--lane", "cpu", "--model", str(DEMO), "--requests", "12", "--rate", "100,inf",
                         "--input", "10", "--output", "4", "--length-spread", "0.5", "--shared-prefix", "3",
                         "--max-concurrency", "5", "--repeats", "2", "--json", str(out)])
    assert status == 0
    rows = rows_of(load_document(out))
    assert [(row.section, row.shape["rate"]) for row in rows] == [("serve", 100.0), ("serve", "inf")]
    for row in rows:
        assert {"ttft p50", "tpot p90", "itl p99", "output", "total", "requests", "goodput", "running", "busy",
                "preemptions", "window"} <= set(row.stats)
        assert all(len(stat.samples) == 2 for stat in row.stats.values())
        assert 0 < row.stats["ttft p50"].median <= row.stats["ttft p99"].median
        assert row.stats["output"].median < row.stats["total"].median
        assert row.stats["running"].median <= 5
        assert any("there is no prefix cache yet" in note for note in row.notes)
    assert "goodput requests/s" in capsys.readouterr().out


def test_serve_warms_up_every_graph_before_the_clock_starts(gpu, tmp_path, monkeypatch):
    cores = []
    def keep(core, args):
        warm_up(core, args)
        cores.append((core, str(core.graphs), gpu.counts["replays"]))
    monkeypatch.setattr(serve, "warm_up", keep)
    status = bench.main(["serve", "--lane", "cuda", "--model", str(Golden("gemma4-dense").checkpoint), "--requests",
                         "3", "--rate", "inf", "--input", "6", "--output", "3", "--max-seqs", "3",
                         "--max-batch-tokens", "64", "--json", str(tmp_path / "serve.json")])
    assert status == 0
    [(core, after_warming, n_replays)] = cores
    assert not core.graphs.failures and after_warming == "CUDA graphs: 3, 2, 1 of 1, 2, 3 sequences captured"
    assert gpu.counts["replays"] > n_replays


@pytest.mark.parametrize("arguments, message", [
    (["--lane", "emulated", "--model", str(DEMO)], "serve measures time"),
    (["--lane", "cpu", "--model", str(DEMO), "--layers", "2"], "which choose a shape for random weights"),
    (["--lane", "cpu", "--model", str(DEMO), "--input", "2000"], "max_seq_len is 2128"),
    (["--lane", "cpu", "--model", str(DEMO), "--shared-prefix", "600", "--input", "600"], "shared prefix of 600"),
])
def test_what_cannot_be_served_is_said_in_a_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "serve.json"
    assert bench.main(["serve", *arguments, "--json", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert message in json.loads(out.read_text())["incomplete"]
