"""tools/measure/runs/gpu_parts.py: what a report consists of, on which GPU."""

import argparse
import re
import sys
from types import SimpleNamespace

import gpu_report
import pytest
from measure.report import BenchError
from measure.runs import gpu_parts, parts
from measure.runs.gpu_parts import chosen, full_parts, quick_parts, too_large
from measure.runs.parts import Part

from tests import conftest
from tests.conftest import lane_name
from tests.tools.part_runs import ROOT, runner


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
    assert too_large("gemma-4-31b", 24 << 30, 12) == "" and too_large("gemma-4-31b", 16 << 30, 12)


@pytest.mark.parametrize("gib", [40, 78, 141])
def test_the_least_of_all_parts_fits_the_time(monkeypatch, gib):
    """Where every peer is installed. The spare ones stand last, and the report says of them: --only."""
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: name)
    of = full_parts("cuda", gib << 30)
    assert [one.name for one in of if one.name.startswith("against") and one.why_not] == []
    assert [one.name for one in of if one.spare] == [one.name for one in of[-2:]] == [
        "against-compiled", "against-transformers"]
    for_opening = 10
    left = gpu_report.LIMIT_S - gpu_report.WRITE_S - parts.END_S - for_opening
    assert sum(one.least_s for one in of if not one.spare and not one.why_not) <= left


def test_where_a_steps_time_goes_is_not_what_a_short_run_leaves_out():
    of = {one.name: one for one in full_parts("cuda", 1 << 40)}
    for name in ("engine-1b", "engine-31b-slice"):
        assert of[name].short and "--no-ops" not in of[name].argv + of[name].short
    names = [name for name in of if name.startswith("engine")]
    assert names[:2] == ["engine-1b", "engine-31b-slice"] and names[-1] == "engine-e4b-host"


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


# --- the test suite's parts

def test_files_that_use_the_gpu_are_in_the_parts_that_go_first():
    """Those whose tests ask conftest.py for the lane."""
    asks = re.compile(r"^def .*\bopen_llm\b.*\):|getoption\(\"--lane\"\)", re.MULTILINE)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("**/test_*.py")
             if asks.search(re.sub(r"def open_llm\(", "", path.read_text()))}
    assert {file for file in files if not file.startswith("tests/kernels/")} == set(gpu_parts.ENGINE_TESTS)
    suites = {one.name: one.argv for one in full_parts("cuda:1", 1 << 40) if one.suite}
    assert list(suites) == ["tests-kernels", "tests-engine", "tests-others"]
    for name, argv in suites.items():
        assert lane_name(argv[argv.index("--lane") + 1]) == "cuda:1"
        for file in gpu_parts.ENGINE_TESTS:
            assert (file in argv, f"--ignore={file}" in argv) == (name == "tests-engine", name == "tests-others")


@pytest.mark.parametrize("has_xdist", [True, False])
def test_tests_run_side_by_side_where_they_can(monkeypatch, tmp_path, quick_end, has_xdist):
    """With few BLAS threads each. Those of the GPU one by one, or each that crashes would begin again."""
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: name if has_xdist else None)
    found = {one.name: one for one in full_parts("cuda", 1 << 40) if one.suite}
    dealt = {name: one.argv[one.argv.index("--dist") + 1] for name, one in found.items() if "--dist" in one.argv}
    assert dealt == ({"tests-kernels": "load", "tests-engine": "load", "tests-others": "loadfile"} if has_xdist else {})
    # One by one a crash costs one test; a file with a crash would begin again for ever.
    restarts = {name: one.argv[one.argv.index("--max-worker-restart") + 1] for name, one in found.items()
                if "--max-worker-restart" in one.argv}
    assert restarts == (dict.fromkeys(("tests-kernels", "tests-engine"), "1000000") if has_xdist else {})
    env = found["tests-others"].env
    show = Part("show", ("-c", "import os; print(os.environ.get('OPENBLAS_NUM_THREADS'), os.environ['PATH'])"), 1, 60,
                env=env)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    runs = runner(tmp_path)
    runs.run([show])
    assert (runs.folder / "show.log").read_text().split()[0] == ("2" if has_xdist else "None")


class Runtime:
    """cupy.cuda.runtime of a process whose GPU answers, or does not."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, answers):
        self._answers, self.n_asked = answers, 0

    def deviceSynchronize(self):
        self.n_asked += 1
        if not self._answers:
            raise self.CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")


@pytest.mark.parametrize("failed, answers, ends", [
    ("call", False, True), ("setup", False, True), ("call", True, False), (None, False, False)])
def test_a_process_ends_behind_the_test_that_lost_its_gpu(monkeypatch, failed, answers, ends):
    """Behind all that is told of it, and no sooner: a failure alone is none."""
    runtime, ended = Runtime(answers), []
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(conftest.os, "_exit", ended.append)
    lost = conftest.LostGpu()
    for when in ("setup", "call", "teardown"):
        assert not ended
        lost.pytest_runtest_logreport(SimpleNamespace(when=when, failed=when == failed))
    assert bool(ended) is ends


def test_the_gpu_is_asked_behind_tests_that_fail_and_no_others(monkeypatch):
    runtime = Runtime(True)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    lost = conftest.LostGpu()
    for failed in (None, "call", None):
        for when in ("setup", "call", "teardown"):
            lost.pytest_runtest_logreport(SimpleNamespace(when=when, failed=when == failed))
    assert runtime.n_asked == 1


def test_a_process_that_never_opened_the_gpu_did_not_lose_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert conftest.gpu_answers()


@pytest.mark.parametrize("text", ["tpu", "cuda:", "cuda:x", "cpu"])
def test_a_lane_that_kernel_tests_do_not_have_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"no lane '{text}', expected emulated, cuda or cuda:N"):
        lane_name(text)
