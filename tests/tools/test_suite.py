"""tools/measure/runs/suite.py: what a run of the test suite came to, whole, stopped, or side by side."""

import os

import pytest
from measure.runs.parts import Part, as_markdown, why_incomplete
from measure.runs.suite import read_junit, read_log, read_suite

from tests.tools.part_runs import HANG_S, runner

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


def test_a_suite_with_a_test_that_told_nothing_is_not_whole(tmp_path, quick_end):
    part = suite_part(tmp_path, "def test_lost(): pass")
    with (tmp_path / "conftest.py").open("a") as file:
        file.write("\ndef pytest_runtest_protocol(item): return item.name == 'test_lost' or None")
    runs = runner(tmp_path)
    assert not runs.run([part])
    [row] = runs.report.rows
    assert row.stats["not passed"].median == 3 and row.notes[-1] == "1 of 5 collected tests told nothing"
    assert why_incomplete(runs.report) == "tests failed (exit status 1: 1 of 5 collected tests told nothing)"


def test_a_test_that_hangs_is_named_and_the_others_count(tmp_path, quick_end, hours):
    runs = runner(tmp_path)
    assert not runs.run([suite_part(tmp_path, f"def test_hang(): time.sleep({HANG_S})", stall_s=HANG_S)])
    [row] = runs.report.rows
    assert {name: row.stats[name].median for name in ("passed", "failed", "errors", "skipped", "not passed")} == {
        "passed": 1, "failed": 1, "errors": 1, "skipped": 1, "not passed": 3}
    assert row.notes[-1].startswith("the run did not end; it was in ") and row.notes[-1].endswith("::test_hang")
    assert why_incomplete(runs.report) == f"tests stalled (printed nothing for {HANG_S} s)"


# As pytest-xdist has it told: a crash (c), and those behind a test's failure (a), its setup's (b) and teardown's (e),
# whose process tests/conftest.py ends.
CRASH = """<testcase classname="tests.test_y" name="{name}" time="0.000"><error message="failed on setup with \
&quot;worker '{gw}' crashed while running 'tests/test_y.py::{name}'&quot;">\
worker '{gw}' crashed while running 'tests/test_y.py::{name}'</error></testcase>"""
JUNIT = f"""<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" tests="9">
<testcase classname="tests.test_y" name="test_a"><failure message="assert 1 == 2">E   assert 1 == 2</failure></testcase>
{CRASH.format(name="test_a", gw="gw0")}{CRASH.format(name="test_c", gw="gw1")}
<testcase classname="tests.test_y" name="test_e"><failure message="assert 3 == 4">E   assert 3 == 4</failure></testcase>
<testcase classname="tests.test_y" name="test_e"><error message="failed on teardown">E   teardown</error></testcase>
{CRASH.format(name="test_e", gw="gw2")}
<testcase classname="tests.test_y" name="test_b"><error message="failed on setup">E   no fixture</error></testcase>
{CRASH.format(name="test_b", gw="gw13")}
<testcase classname="tests.test_y" name="test_d" /></testsuite></testsuites>"""
LOG = """===== test session starts =====
{header}
[gw0] [ 20%] FAILED tests/test_y.py::test_a \n[gw0] node down: Not properly terminated
[gw0] [ 20%] FAILED tests/test_y.py::test_a \n[gw1] node down: Not properly terminated
[gw1] [ 40%] FAILED tests/test_y.py::test_c \n[gw2] [ 60%] FAILED tests/test_y.py::test_e
[gw2] [ 60%] ERROR tests/test_y.py::test_e \n[gw2] [ 60%] FAILED tests/test_y.py::test_e
[gw3] [ 80%] PASSED tests/test_y.py::test_d
"""


def test_a_crash_behind_a_failure_is_no_second_one(tmp_path):
    junit, log = tmp_path / "junit", tmp_path / "log"
    junit.write_text(JUNIT)
    log.write_text(LOG.format(header="2 workers [5 items]"))
    suite = read_suite(junit, log)
    assert suite.counts == {"passed": 1, "failed": 2, "errors": 3, "skipped": 0} and not suite.ended
    last = [(test.rpartition("_")[2], lines[-1]) for test, lines in suite.failures]
    assert last == [("a", "E   assert 1 == 2"), ("c", "worker 'gw1' crashed while running 'tests/test_y.py::test_c'"),
                    ("e", "E   assert 3 == 4"), ("e", "E   teardown"), ("b", "E   no fixture")]
    stopped = read_suite(junit, log, has_ended=False)
    assert stopped.counts == {"passed": 1, "failed": 3, "errors": 1, "skipped": 0} and stopped.ended


@pytest.mark.parametrize("header, ended", [
    ("8 workers [5 items]", ""), ("1 worker [6 items]", "1 of 6 collected tests told nothing"),
    ("collecting ... collected 5 items", ""), ("collected 9 items / 4 deselected / 5 selected", ""),
    ("collecting ... collected 9 items / 1 error / 1 deselected / 8 selected", "3 of 8 collected tests told nothing"),
    ("created: 8/8 workers", "the log does not say how many tests were collected")])
def test_tests_that_told_nothing_are_counted(tmp_path, header, ended):
    """What could not be collected is told of, and is no test."""
    junit, log = tmp_path / "junit", tmp_path / "log"
    uncollected = '<testcase classname="" name="tests.test_q"><error message="collection failure">E</error></testcase>'
    junit.write_text(JUNIT.replace("</testsuite>", f"{uncollected}</testsuite>"))
    log.write_text(LOG.format(header=header))
    assert read_suite(junit, log).ended == ended


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
