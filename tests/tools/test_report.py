"""tools/measure/report.py and machine.py: samples, rows, goals, the JSON document and back, what is refused."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from measure import machine
from measure.report import BenchError, Goal, Report, Row, Stat, load_document, plain, rows_of


def row(**changes):
    fields = {"section": "kernels", "name": "linear", "shape": {"n_tokens": 8, "lane": "cpu", "graphs": None},
              "stats": {"time": Stat("s", (3.0, 1.0, 2.0), "lower"), "bytes": Stat("bytes", 64)},
              "notes": ("cold",), "goal": Goal("time", at_most=2.5)}
    return Row(**{**fields, **changes})


def written(tmp_path, change=lambda document: None):
    """The file of a small report, changed."""
    report = Report("bench.py kernels", {"lane": "cpu"}, {"place": "desk"})
    report.add(row())
    report.skip("triton", "no MoE op yet")
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    change(document)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    return path


# --- samples, rows, goals

@pytest.mark.parametrize("samples", [[4.0], [1, 2], [5, 1, 3, 2, 4, 9, 0.5], range(11)])
def test_percentiles_are_numpys(samples):
    stat = Stat("s", samples, "lower")
    assert [stat.p10, stat.median, stat.p90] == pytest.approx(np.percentile(samples, [10, 50, 90]))


def test_best_is_on_the_better_side():
    assert Stat("s", (3, 1, 2), "lower").best == 1
    assert Stat("bytes/s", (3, 1, 2), "higher").best == 3
    assert Stat("1", (3, 1, 2)).best == 2


def test_numpy_values_become_pythons():
    made = row(shape={"n": np.int64(3), "share": np.float32(0.5), "is": np.bool_(True)},
               stats={"time": Stat("s", np.array([1, 2], np.float32))}, goal=None)
    assert json.loads(json.dumps(made.as_dict()))["shape"] == {"n": 3, "share": 0.5, "is": True}
    assert made.stats["time"].samples == (1.0, 2.0)


@pytest.mark.parametrize("make, message", [
    (lambda: Stat("ms", (1,)), "unit is 'ms', expected one of s, bytes"),
    (lambda: Stat("s", (1,), "less"), "better is 'less'"),
    (lambda: Stat("s", ()), "expected at least one, all finite"),
    (lambda: Stat("s", (1, float("nan"))), "expected at least one, all finite"),
    (lambda: Goal("time"), "expected one of them"),
    (lambda: Goal("time", at_least=1, at_most=2), "expected one of them"),
    (lambda: row(section="gpu"), "row 'linear': section is 'gpu', expected one of ceilings"),
    (lambda: row(shape={"rate": float("inf")}), "shape has rate=inf, expected text, a finite number"),
    (lambda: row(shape={"rows": [1, 2]}), "shape has rows="),
    (lambda: row(stats={"time": 1.0}), "stat 'time' is float, expected Stat"),
    (lambda: row(goal=Goal("ratio", at_least=1)), "its goal is on 'ratio', its stats are time, bytes"),
    (lambda: Report().add({}), "dict came, expected Row"),
])
def test_what_cannot_be_said_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("goal, is_met", [(Goal("time", at_most=2), True), (Goal("time", at_most=1.9), False),
                                          (Goal("time", at_least=2), True), (Goal("time", at_least=2.1), False),
                                          (None, None)])
def test_a_goal_bounds_the_median(goal, is_met):
    assert row(goal=goal).is_met is is_met


def test_a_report_misses_what_any_row_misses():
    report = Report()
    report.add(row(goal=None))
    report.add(row())
    assert report.is_met
    report.add(row(goal=Goal("time", at_most=1)))
    assert not report.is_met


def test_rows_are_found_by_shape_whatever_its_order():
    assert row(shape={"a": 1, "b": "x"}).key == row(shape={"b": "x", "a": 1}, stats={}, goal=None).key
    assert row(shape={"a": 1}).key != row(shape={"a": "1"}).key


# --- the document

def test_a_document_gives_its_rows_back(tmp_path):
    document = load_document(written(tmp_path))
    assert rows_of(document) == [row()]
    assert document["rows"][0]["stats"]["time"] == {"unit": "s", "better": "lower", "samples": [3, 1, 2], "median": 2,
                                                    "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "best": 1}
    assert document["rows"][0]["goal"] == {"stat": "time", "at_least": None, "at_most": 2.5, "is_met": True}
    assert document["skipped"] == [{"what": "triton", "why": "no MoE op yet"}]
    assert (document["metadata"], document["settings"]) == ({"place": "desk"}, {"lane": "cpu"})
    assert document["incomplete"] is None
    assert {"cpu", "cores", "memory_bytes", "system", "load_average"} <= set(document["machine"])


def test_facts_are_made_fit_for_json():
    facts = {"rate": float("inf"), "shape": (1, np.int32(2)), "path": Path("a/b"), 3: np.float64(0.5), "none": None}
    assert plain(facts) == {"rate": "inf", "shape": [1, 2], "path": "a/b", "3": 0.5, "none": None}


@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(schema=2), "schema is 2, expected 1"),
    (lambda d: d.pop("rows"), "'rows' is missing"),
    (lambda d: d.update(rows={}), "'rows' is dict, expected list"),
    (lambda d: d.update(commit=3), "'commit' is int, expected str or null"),
    (lambda d: d["skipped"].append("triton"), r"skipped\[1\]: is str, expected an object"),
    (lambda d: d["rows"][0].pop("shape"), r"rows\[0\]: 'shape' is missing"),
    (lambda d: d["rows"][0].update(section="gpu"), r"rows\[0\]: row 'linear': section is 'gpu'"),
    (lambda d: d["rows"][0]["stats"]["time"].update(samples=[]), r"rows\[0\]: Stat: samples are \(\)"),
    (lambda d: d["rows"][0]["stats"]["time"].update(samples=["fast"]), r"rows\[0\]: could not convert"),
    (lambda d: d["rows"][0]["stats"]["time"].pop("unit"), r"rows\[0\]: stats\['time'\]: 'unit' is missing"),
    (lambda d: d["rows"][0]["goal"].update(at_most="2"), r"rows\[0\]: goal: 'at_most' is str, expected int or float"),
    (lambda d: d["rows"][0]["goal"].update(stat="x"), r"rows\[0\]: .*its goal is on 'x'"),
])
def test_a_wrong_document_is_refused_by_place(tmp_path, change, message):
    with pytest.raises(BenchError, match=r"run\.json: .*" + message):
        load_document(written(tmp_path, change))


def test_what_is_no_document_is_refused(tmp_path):
    with pytest.raises(BenchError, match=r"nowhere\.json: No such file"):
        load_document(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(BenchError, match=r"text\.json: no JSON"):
        load_document(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(BenchError, match=r"list\.json: is list, expected an object"):
        load_document(tmp_path / "list.json")


def test_argparse_shows_the_line_of_a_bench_error(capsys):
    def refuse(text):
        raise BenchError(f"{text!r} cannot be")
    parser = ArgumentParser()
    parser.add_argument("--x", type=refuse)
    with pytest.raises(SystemExit):
        parser.parse_args(["--x", "this"])
    assert "argument --x: 'this' cannot be" in capsys.readouterr().err


def test_bars_and_words_stay_off_stdout(capsys):
    report = Report()
    assert list(report.bar(range(3), "loading")) == [0, 1, 2]
    with report.bar(5, "loading") as bar:
        bar.update(5)
    report.tell("a line")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a line\n")              # no terminal: no bar


# --- the machine

def test_commit_is_none_outside_git(tmp_path):
    assert machine.commit(tmp_path) is None


def test_gpu_facts_are_read_before_and_after(gpu, monkeypatch):
    n_asked = count()

    def smi(command):
        assert command[0] == "nvidia-smi"
        fields = command[1].removeprefix("--query-gpu=").split(",")
        values = {"clocks.sm": "1755" if next(n_asked) else "1980", "driver_version": "580.1", "name": "NVIDIA H200",
                  "memory.total": "143771", "power.draw": "[N/A]"}
        return ", ".join(values.get(field, "[Not Supported]") for field in fields)
    monkeypatch.setattr(machine, "answer_of", smi)
    monkeypatch.setattr(machine, "commit", lambda: None)
    facts = Report(gpu=0).as_dict()["machine"]["gpu"]
    assert (facts["name"], facts["driver"], facts["device"]) == ("NVIDIA H200", "580.1", 0)
    assert (facts["before"], facts["after"]) == ({"sm_mhz": 1980}, {"sm_mhz": 1755})
    assert facts["memory_bytes"] == 143771 << 20


def test_no_answer_of_nvidia_smi_leaves_the_facts_empty(monkeypatch):
    monkeypatch.setattr(machine, "answer_of", lambda command: "")
    assert machine.gpu_state(0) == machine.gpu_query(0, {"clocks.sm": "sm_mhz"}) == {}


@pytest.mark.parametrize("code, text", [("print('yes')", "yes\n"), ("print('no'); raise SystemExit(9)", "")])
def test_what_a_program_prints_counts_where_it_ends_well(code, text):
    assert machine.answer_of([sys.executable, "-c", code]) == text
    assert machine.answer_of(["/no/such/program"]) == ""


def test_a_program_that_does_not_end_is_not_waited_for(monkeypatch):
    """Not even when it has been killed: a driver that hangs may keep it."""
    class Stuck(subprocess.Popen):
        def wait(self, timeout=None):
            assert timeout is not None, "waited for without a limit"
            return super().wait(timeout)
    monkeypatch.setattr(machine.subprocess, "Popen", Stuck)
    assert machine.answer_of([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.1) == ""
