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
