"""tools/gpu_report.py: parts that fail, hang or will not end lose nothing of the others, and the report is in time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_report
import pytest
from measure.report import BenchError, Report, Row, Stat, check_document, load_document, rows_of
from measure.runs import gpu_parts, parts, watchdog
from measure.runs.gpu_parts import chosen, full_parts, quick_parts, too_large
from measure.runs.parts import Part, Runner, as_markdown, limit_of, why_incomplete
from measure.runs.suite import read_junit, read_log, read_suite

ROOT = Path(__file__).resolve().parents[2]


# --- the watchdog

HANG_S = 600            # a limit, and a sleep, that no test waits for: see Hours
HANGS = f"import time; print('it hangs', flush=True); time.sleep({HANG_S})"


class Hours:
    """The watchdog's clock: two hours on as soon as the log says that its command hangs, and the watchdog has seen it.
    What hangs is found out at once, and what works may take as long as a busy machine needs."""

    def __init__(self, log):
        self.log, self.n_seen = log, 0

    def monotonic(self):
        return time.monotonic() + 7200 * (self.n_seen > 1)

    def sleep(self, seconds):
        time.sleep(seconds)
        self.n_seen += any(re.search(r"it hangs|::test_hang ?$", line) for line in watchdog.tail(self.log))


@pytest.fixture
def hours(monkeypatch):
    """Every command of the watchdog has Hours."""
    def run(command, limit_s, log, *args, run=watchdog.run, **options):
        monkeypatch.setattr(watchdog, "time", Hours(log))
        return run(command, limit_s, log, *args, **options)
    monkeypatch.setattr(watchdog, "run", run)


def run(code, tmp_path, limit_s=HANG_S, **options):
    return watchdog.run([sys.executable, "-c", code], limit_s, tmp_path / "log", **{"grace_s": 0.5, **options})


def is_alive(pid):
    """A process that was killed may wait as a zombie for a parent that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code, status, why", [
    ("print('hello')", watchdog.OK, ""),
    ("import sys; sys.exit(3)", watchdog.FAILED, "exit status 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", watchdog.FAILED, "ended by SIGSEGV"),
])
def test_how_a_command_ends_is_told(tmp_path, code, status, why):
    outcome = run(code, tmp_path)
    assert (outcome.status, outcome.why) == (status, why)


def test_a_command_that_is_not_there_fails(tmp_path):
    assert watchdog.run(["/no/such/program"], 5, tmp_path / "log").status == watchdog.FAILED


def test_a_command_past_its_limit_is_asked_to_end_and_may_write(tmp_path, hours):
    outcome = run(f"try:\n    {HANGS}\nexcept KeyboardInterrupt:\n    print('written')", tmp_path, grace_s=300)
    assert outcome.status == watchdog.TIMED_OUT and outcome.code == 0
    assert watchdog.tail(tmp_path / "log") == ["it hangs", "written"]


STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds, status", [(HANG_S, watchdog.INTERRUPTED), (0, watchdog.OK)])
def test_what_a_command_started_ends_with_it(tmp_path, seconds, status):
    """Also where it ignores every signal that can be ignored, and where its parent has ended by itself."""
    outcome = run(STUBBORN.format(seconds=seconds), tmp_path, grace_s=0.2,
                  is_stopped=lambda: seconds and watchdog.tail(tmp_path / "log"))
    assert outcome.status == status and outcome.seconds < HANG_S
    [child] = map(int, watchdog.tail(tmp_path / "log"))
    until = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(child)


def test_a_command_ends_when_the_report_is_stopped(tmp_path):
    assert run(HANGS, tmp_path, is_stopped=lambda: True).status == watchdog.INTERRUPTED


# --- limits

def part(name, least_s=1.0, most_s=100.0, **fields):
    return Part(name, ("-c", ""), least_s, most_s, **fields)


def test_a_part_leaves_the_others_their_least():
    assert limit_of(part("a"), 50, [part("b", 10), part("c", 20)]) == 20
    assert limit_of(part("a", most_s=5), 50, [part("b", 10)]) == 5
    assert limit_of(part("a", 30), 50, [part("b", 40)]) == 50        # too little for both: the first goes first
    assert limit_of(part("a", 30), 50, [part("b", 40), part("c", 5)]) == 45
    assert limit_of(part("a", 30), 29, []) is None


# --- a whole run of parts

def document(name, **facts):
    """The JSON of a part that measured one row."""
    report = Report(name, {"lane": "cpu"})
    report.add(Row("ceilings", name, {}, {"rate": Stat("bytes/s", 1e9, "higher")}))
    report.skip("something", "a reason")
    report.facts.update(facts)
    return json.dumps(report.as_dict())


def script(tmp_path, name, code, **facts):
    """A Part that writes its document, then runs `code`."""
    (tmp_path / f"{name}.json").write_text(document(name, **facts))
    (tmp_path / f"{name}.py").write_text(
        f"import shutil, sys, time\nshutil.copy({str(tmp_path / name)!r} + '.json', sys.argv[1])\n"
        f"print('begun', *sys.argv[2:], flush=True)\n{code}\n")
    return (str(tmp_path / f"{name}.py"), "{out}")


@pytest.fixture
def quick_end(monkeypatch):
    """Parts that do not end are killed soon, and pytest starts without plugins."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(parts, "END_S", 1.0)
    run = watchdog.run
    monkeypatch.setattr(watchdog, "run", lambda *args, **options: run(*args, **{"grace_s": 0.5, **options}))


def runner(tmp_path, seconds=86400.0, **fields):
    folder = tmp_path / "run"
    folder.mkdir()
    return Runner(Report("gpu_report", {"lane": "cpu"}), folder, time.monotonic() + seconds, (sys.executable,), ROOT,
                  **fields)


def test_faulty_parts_lose_nothing_of_the_others(tmp_path, quick_end, hours):
    runs, seen = runner(tmp_path), []
    runs.after_each = lambda: seen.append(len(runs.report.rows))
    good = runs.run([
        Part("first", script(tmp_path, "first", ""), 1, 100),
        Part("failing", script(tmp_path, "failing", "sys.exit('it broke')"), 1, 100),
        Part("silent", ("-c", "raise RuntimeError('nothing measured')"), 1, 100),
        Part("sleeping", script(tmp_path, "sleeping", HANGS), 1, HANG_S),
        Part("stubborn", ("-c", f"print('it hangs', flush=True){STUBBORN.format(seconds=HANG_S)}"), 1, HANG_S),
        Part("large", ("-c", ""), 1, 100, why_not="it does not fit"),
        Part("last", script(tmp_path, "last", ""), 1, 100)])
    assert not good
    report = runs.report
    assert [row.name for row in report.rows] == ["first", "failing", "sleeping", "last"]
    assert {one["name"]: one["status"] for one in report.facts["parts"]} == {
        "first": "ok", "failing": "failed", "silent": "failed", "sleeping": "timed out", "stubborn": "timed out",
        "last": "ok"}
    by_name = {one["name"]: one for one in report.facts["parts"]}
    assert by_name["failing"]["log"][-1] == "it broke" and "log" not in by_name["last"]
    assert by_name["silent"]["why"] == "exit status 1: RuntimeError: nothing measured"
    assert {"what": "large", "why": "it does not fit"} in report.skipped
    assert {"what": "last: something", "why": "a reason"} in report.skipped
    assert seen == [1, 2, 2, 3, 3, 4]                                # after each there is a report to write
    assert why_incomplete(report) == ("silent failed (exit status 1: RuntimeError: nothing measured); "
                                      f"stubborn timed out (not done after {HANG_S} s)")


def test_the_markdown_of_a_faulty_run_shows_tables_and_logs(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.run([Part("good", script(tmp_path, "good", ""), 1, 100),
              Part("bad", script(tmp_path, "bad", "sys.exit('it | broke')"), 1, 100)])
    text = as_markdown(runs.report.as_dict())
    assert "| good | ok |" in text and "| bad | failed |" in text
    assert "### bad: the end of its log" in text and "it | broke" in text and "### good: the end" not in text
    assert "### ceilings" in text and str(tmp_path / "run") not in text


def test_time_that_is_short_shortens_and_skips_parts(tmp_path, quick_end):
    runs = runner(tmp_path, seconds=300)
    runs.run([Part("shortened", script(tmp_path, "shortened", ""), 1, 600, full_s=500, short=("--repeats", "1")),
              Part("whole", script(tmp_path, "whole", ""), 1, 600, full_s=2, short=("--repeats", "1")),
              Part("skipped", script(tmp_path, "skipped", ""), 400, 600)])
    logs = {name: (runs.folder / f"{name}.log").read_text().split() for name in ("shortened", "whole")}
    assert logs == {"shortened": ["begun", "--repeats", "1"], "whole": ["begun"]}
    why = {one["what"]: one["why"] for one in runs.report.skipped}
    assert "all of it takes 500 s; run with --repeats 1" in why["some of shortened"]
    assert "it needs 400 s" in why["skipped"] and "some of whole" not in why


def test_the_first_ceilings_go_to_the_parts_behind(tmp_path, quick_end):
    ceilings = {"bytes_per_s": 1e9, "flops_per_s": 2e9, "source": "measured"}
    runs = runner(tmp_path)
    show = ("-c", "import sys; print(sys.argv[1:])", "{ceilings}", "{scratch}")
    runs.run([Part("before", show, 1, 100),
              Part("ceilings", script(tmp_path, "ceilings", "", ceilings=ceilings), 1, 100),
              Part("other", script(tmp_path, "other", "", ceilings={**ceilings, "source": "again"}), 1, 100),
              Part("after", show, 1, 100)])
    assert runs.report.facts["ceilings"] == ceilings
    scratch = str(runs.folder / "scratch")
    assert (runs.folder / "before.log").read_text().strip() == str([scratch])
    assert (runs.folder / "after.log").read_text().strip() == str(["--ceilings", str(runs.folder / "ceilings.out"),
                                                                   scratch])


def test_facts_of_parts_are_joined(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.run([Part("a", script(tmp_path, "a", "", models={"x": 1}, list=[1], one=1), 1, 100),
              Part("b", script(tmp_path, "b", "", models={"y": 2}, list=[2], one=2), 1, 100)])
    facts = runs.report.facts
    assert (facts["models"], facts["list"], facts["one"], facts["one of b"]) == ({"x": 1, "y": 2}, [1, 2], 1, 2)


def test_a_broken_document_is_said(tmp_path, quick_end):
    runs = runner(tmp_path)
    assert not runs.run([Part("broken", ("-c", "import sys; open(sys.argv[1], 'w').write('{')", "{out}"), 1, 100)])
    [skipped] = runs.report.skipped
    assert skipped["what"] == "broken" and "no JSON" in skipped["why"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.is_stopped = lambda: bool(runs.report.rows)
    runs.run([Part(name, script(tmp_path, name, ""), 1, 100) for name in ("first", "second")])
    assert [row.name for row in runs.report.rows] == ["first"]
    assert {"what": "second", "why": "interrupted before it"} in runs.report.skipped


# --- the test suite's part

SUITE = """
import time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_error(broken): pass
{rest}
"""


def suite_part(tmp_path, rest="", **fields):
    file = tmp_path / "test_some.py"
    file.write_text(SUITE.format(rest=rest))
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--lane')")
    return Part("tests", ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={tmp_path}",
                          "-c", os.devnull, "--junit-xml", "{out}", "--lane", "cuda", str(file)), 1, 36000, suite=True,
                **fields)


def test_a_suite_that_ends_is_counted_and_its_failures_named(tmp_path, quick_end):
    runs = runner(tmp_path)
    assert not runs.run([suite_part(tmp_path)])
    [row] = runs.report.rows
    counts = {name: row.stats[name].median for name in ("passed", "failed", "errors", "skipped", "not passed")}
    assert counts == {"passed": 1, "failed": 1, "errors": 1, "skipped": 1, "not passed": 2}
    assert row.shape == {"lane": "cuda"} and row.is_met is False
    assert any("test_bad" in note for note in row.notes) and "1 skipped: not today" in row.notes
    failed = {one["test"].rpartition("::")[2]: " ".join(one["text"]) for one in runs.report.facts["failed_tests"]}
    assert "one is not two" in failed["test_bad"] and "no fixture" in failed["test_error"]
    assert why_incomplete(runs.report) is None                       # faults are found, and the run was whole
    assert "one is not two" in as_markdown(runs.report.as_dict())


def test_a_test_that_hangs_is_named_and_the_others_count(tmp_path, quick_end, hours):
    runs = runner(tmp_path)
    assert not runs.run([suite_part(tmp_path, f"def test_hang(): time.sleep({HANG_S})", stall_s=HANG_S)])
    [row] = runs.report.rows
    assert {name: row.stats[name].median for name in ("passed", "failed", "errors", "skipped", "not passed")} == {
        "passed": 1, "failed": 1, "errors": 1, "skipped": 1, "not passed": 3}
    assert row.notes[-1].startswith("the run did not end; it was in ") and row.notes[-1].endswith("::test_hang")
    assert why_incomplete(runs.report) == f"tests stalled (printed nothing for {HANG_S} s)"


def test_logs_are_read_where_there_is_no_junit_file(tmp_path):
    log = tmp_path / "log"
    log.write_text("===== test session starts =====\ntests/test_a.py::test_one[a b] PASSED                 [ 10%]\n"
                   "tests/test_a.py::test_two said something\nFAILED          [ 20%]\n"
                   "tests/test_a.py::test_three XFAIL (why)\n"
                   "tests/test_a.py::test_four \n"
                   "!!!!!! KeyboardInterrupt !!!!!!\nFAILED tests/test_a.py::test_two - said again\n")
    suite = read_suite(tmp_path / "nothing", log)
    assert suite == read_log(log)
    assert suite.counts == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    assert suite.ended == "the run did not end; it was in tests/test_a.py::test_four"
    with pytest.raises(OSError):
        read_junit(tmp_path / "nothing")
    assert read_log(tmp_path / "nothing").ended == "the run did not end"


def test_logs_of_tests_side_by_side(tmp_path):
    """As pytest-xdist writes them: a test's outcome comes with its name, behind others' beginnings."""
    log = tmp_path / "log"
    log.write_text("===== test session starts =====\n8 workers [5 items]\ntests/test_a.py::test_one[a b] \n"
                   "tests/test_b.py::test_two \n[gw1] [ 20%] FAILED tests/test_b.py::test_two \n"
                   "tests/test_b.py::test_three \n[gw0] [ 40%] PASSED tests/test_a.py::test_one[a b] \n"
                   "tests/test_a.py::test_four \n[gw1] [ 60%] SKIPPED tests/test_b.py::test_three \n"
                   "tests/test_b.py::test_five \n!!!!!! KeyboardInterrupt !!!!!!\n")
    suite = read_log(log)
    assert suite.counts == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    assert suite.failures == (("tests/test_b.py::test_two", ()),)
    assert suite.ended == "the run did not end; it was in tests/test_a.py::test_four, tests/test_b.py::test_five"


@pytest.mark.parametrize("has_xdist", [True, False])
def test_test_files_run_side_by_side_where_they_can(monkeypatch, tmp_path, quick_end, has_xdist):
    """With few BLAS threads each."""
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: name if has_xdist else None)
    found = {one.name: one for one in full_parts("cuda", 1 << 40) if one.suite}
    assert list(found) == ["tests-kernels", "tests-engine", "tests-others"]
    assert [name for name, one in found.items() if "-n" in one.argv or one.env] == (
        ["tests-kernels", "tests-others"] if has_xdist else [])
    env = found["tests-others"].env
    show = Part("show", ("-c", "import os; print(os.environ.get('OPENBLAS_NUM_THREADS'), os.environ['PATH'])"), 1, 60,
                env=env)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    runs = runner(tmp_path)
    runs.run([show])
    assert (runs.folder / "show.log").read_text().split()[0] == ("2" if has_xdist else "None")


# --- what a report consists of

def test_parts_of_a_gpu_and_what_does_not_fit():
    small, large = ({one.name: one for one in full_parts("cuda", gib << 30)} for gib in (40, 141))
    assert list(small) == list(large)
    assert small["engine-31b"].why_not == "it wants 65 GiB, the GPU has 40" and not large["engine-31b"].why_not
    assert small["engine-26b-a4b"].why_not == "it wants 55 GiB, the GPU has 40" and not large["engine-26b-a4b"].why_not
    layers = [one["engine-scout-slice"].argv[one["engine-scout-slice"].argv.index("--layers") + 1]
              for one in (small, large)]
    assert layers == ["4", "8"] and not small["engine-scout-slice"].why_not
    assert not small["engine-e4b"].why_not and "host" in small["engine-e4b-host"].argv
    whole = {one.name: one.why_not for one in full_parts("cuda", 78 << 30) if not one.name.startswith("against")}
    assert not any(whole.values())
    assert sum(one.least_s for one in large.values()) < gpu_report.LIMIT_S - gpu_report.WRITE_S - parts.END_S
    assert too_large("gemma-4-31b", 24 << 30, 12) == "" and too_large("gemma-4-31b", 16 << 30, 12)


@pytest.mark.parametrize("of", [full_parts("cuda", 1 << 40), quick_parts("cpu"), quick_parts("emulated")])
def test_every_command_is_one_that_bench_takes(of, tmp_path):
    import bench
    names = {"{out}": str(tmp_path / "out"), "{scratch}": str(tmp_path), "{ceilings}": "--seed=1"}
    for one in of:
        if not one.suite:
            for short in ((), one.short):
                words = [names.get(word, word) for word in one.argv[1:] + short]
                _, args = bench.parse(words)
                assert args.json == tmp_path / "out"


def test_parts_are_chosen_by_name_or_by_what_it_begins_with():
    names = lambda *choice: [one.name for one in chosen(full_parts("cuda", 1 << 40), *choice)]      # noqa: E731
    assert names(["kernels", "serve"], []) == [
        "kernels-31b-products", "kernels-31b-attention", "kernels-31b-others", "kernels-experts-26b-a4b",
        "kernels-experts-scout", "kernels-1b", "serve"]
    assert "engine-1b" not in names([], ["engine"]) and "ceilings" in names([], ["engine"])
    with pytest.raises(BenchError, match="no part 'kernel', expected some of ceilings, tests-kernels"):
        names(["kernel"], [])


@pytest.mark.parametrize("name, text", [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("cpu", "cpu")])
def test_names_of_gpus_as_folders(name, text):
    assert gpu_report.slug(name) == text


@pytest.mark.parametrize("commit, text", [("f3c498444efd", "f3c4984"), ("f3c498444efd+changes", "f3c4984-changes"),
                                          (None, "no-commit"), ("a b/c", "a-b-c")])
def test_commits_as_file_names(commit, text):
    assert gpu_report.short_commit(commit) == text


@pytest.mark.parametrize("arguments, message", [
    (["--lane", "cpu"], "--lane cpu goes with --quick"),
    (["--lane", "tpu"], "no lane 'tpu'"),
    (["--lane", "cpu", "--quick", "--limit", "0"], "--limit 0.0 is no time"),
    (["--lane", "cpu", "--quick", "--only", "nothing"], "no part 'nothing'"),
])
def test_bad_arguments_are_named(arguments, message, capsys):
    assert gpu_report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_engine_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_report, "PROBE", "raise SystemExit('there is no GPU at ' + {lane!r})")
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert "the engine cannot open cuda (exit status 1): there is no GPU at cuda; " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the command

def test_the_command_end_to_end_on_the_cpu_lane(tmp_path, capsys):
    status = gpu_report.main(["--lane", "cpu", "--quick", "--only", "ceilings,serve", "--out", str(tmp_path / "out"),
                              "--commit", "abcdef0123"])
    text = capsys.readouterr().out
    assert status == 0, text
    [path] = (tmp_path / "out").glob("*.json")
    assert path.name.endswith("-abcdef0.json") and str(path) in text
    found = load_document(path)
    assert {row.section for row in rows_of(found)} == {"ceilings", "serve"}
    assert found["commit"] == "abcdef0123" and found["incomplete"] is None
    assert [one["status"] for one in found["facts"]["parts"]] == ["ok", "ok"]
    assert found["facts"]["packages"]["numpy"] and found["facts"]["ceilings"]["source"] == "measured"
    markdown = path.with_suffix(".md").read_text()
    assert "### serve" in markdown and "| ceilings | ok |" in markdown
    assert sorted(one.suffix for one in (tmp_path / "out").iterdir()) == [".json", ".md"]


def test_a_stopped_command_still_writes(tmp_path):
    """SIGTERM while a part sleeps: the report of what came before is there, and nothing keeps running."""
    code = ("import sys, gpu_report\nfrom measure.runs.parts import Part\n"
            f"first = Part('first', {script(tmp_path, 'first', '')!r}, 1, 100)\n"
            "sleeping = Part('sleeping', ('-c', 'import time; print(1, flush=True); time.sleep(600)'), 1, 600)\n"
            "gpu_report.quick_parts = lambda lane: [first, sleeping]\n"
            f"sys.exit(gpu_report.main(['--lane', 'cpu', '--quick', '--out', {str(tmp_path / 'out')!r}]))")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tools", stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("sleeping: at most"):
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 1
    [path] = (tmp_path / "out").glob("*.json")
    found = load_document(path)
    check_document(found)
    assert found["incomplete"] == "interrupted"
    assert [(one["name"], one["status"]) for one in found["facts"]["parts"]] == [("first", "ok"),
                                                                                 ("sleeping", "interrupted")]
    assert [row.name for row in rows_of(found)] == ["first"]
