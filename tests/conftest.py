"""Checkpoints that several test files open; written once a run, never changed."""

import argparse
import os
import re
import sys

import pytest

from engine import LLM
from engine.cuda_lane import gpu_is_present
from engine.kernels import host
from tests import stand_in
from tests import tiny_models as tiny

MOST_BUILDS = 120               # of kernels for the host, in the whole suite


def pytest_addoption(parser):
    parser.addoption("--lane", default="emulated", type=lane_name, help="of kernel tests: emulated, cuda, cuda:N")
    parser.addoption("--check", action="store_true", help="run kernels under the emulator's memory and race checker")


def lane_name(text):
    if re.fullmatch(r"emulated|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"no lane {text!r}, expected emulated, cuda or cuda:N")
    return text


def pytest_configure(config):
    if hasattr(config, "workerinput") and config.getoption("--lane") != "emulated" and gpu_is_present():
        config.pluginmanager.register(LostGpu())


class LostGpu:
    """Ends a process of pytest-xdist where a kernel's fault has ended its use of the GPU: another takes its place, and
    the tests that it has left."""

    def __init__(self):
        self._has_failed = False

    @pytest.hookimpl(trylast=True)                      # behind the hook that tells of the failure
    def pytest_runtest_logreport(self, report):
        self._has_failed |= report.failed
        if report.when == "teardown":
            if self._has_failed and not gpu_answers():
                os._exit(1)
            self._has_failed = False


def gpu_answers():
    """Whether this process has not opened the GPU, or can still use it."""
    cupy = sys.modules.get("cupy")
    try:
        return cupy is None or cupy.cuda.runtime.deviceSynchronize() is None
    except cupy.cuda.runtime.CUDARuntimeError:          # the same for every call from then on
        return False


def pytest_sessionfinish(session):
    if len(host.asked) > MOST_BUILDS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"host builds of kernels: {len(host.asked)} used (at most {MOST_BUILDS} may be), "
                                f"{host.n_builds} compiled in this run")


@pytest.fixture
def gpu():
    """A stand-in for CuPy and one GPU, as long as the test runs."""
    with stand_in.installed() as gpu:
        yield gpu


@pytest.fixture(scope="session")
def open_llm(request):
    """open_llm(path, **arguments of LLM) on the lane that kernel tests run on."""
    device = request.config.getoption("--lane")
    return lambda path, **arguments: LLM(path, device=device, **{"max_seq_len": 512, "progress": False, **arguments})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{name: directory} of tiny random checkpoints: every family, windows from below a page to above any prompt."""
    root = tmp_path_factory.mktemp("tiny")
    models = {f"{family}{name}": (family, {"sliding_window": window}) for family in ("gemma3", "gemma4")
              for name, window in {"": 5, "-window-2": 2, "-window-200": 200}.items()}
    models["gemma4-sliding-only"] = "gemma4", {"layers": "sss"}
    models |= {family: (family, {}) for family in ("gemma4-moe", "gemma4-e", "llama4")}
    return {name: tiny.write(root / name, family, seed, generation={"eos_token_id": tiny.EOS}, **fields)
            for seed, (name, (family, fields)) in enumerate(models.items())}


@pytest.fixture(scope="session")
def llm(checkpoints):
    """An engine for tests that do not care what others asked it before."""
    return tiny.open_llm(checkpoints["gemma4"])
