"""Checkpoints that several test files open; written once a run, never changed."""

import pytest

from engine import LLM
from engine.kernels import host
from tests import stand_in
from tests import tiny_models as tiny

MOST_BUILDS = 120               # of kernels for the host, in the whole suite


def pytest_addoption(parser):
    parser.addoption("--lane", default="emulated", choices=("emulated", "cuda"), help="where kernel tests run")
    parser.addoption("--check", action="store_true", help="run kernels under the emulator's memory and race checker")


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
