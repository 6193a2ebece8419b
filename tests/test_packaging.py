"""A built wheel, an editable install and a bare checkout: each finds the CUDA sources and runs a kernel from them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLED = ("engine", "loaders", "cuda", "setup.cfg", "pyproject.toml", "README.md")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
LAUNCH = """
import sys, site
site.addsitedir(sys.argv[1])            # before what is installed where the tests run
sys.path.append(sys.argv[2])
import numpy as np
import engine
from engine.kernels.rmsnorm import rms_norm
from engine.kernels.source import BF16, folder
x, out = np.ones((2, 64), BF16), np.zeros((2, 64), BF16)
rms_norm(x, np.zeros(64, BF16), 1e-6, 1.0, out)
assert (out == 1).all(), out
print(engine.__file__)
print(folder())
"""


def run(code, *args, cwd):
    """The lines that `code` prints in a Python of its own, with nothing on its path."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, *map(str, args)], cwd=cwd, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a wheel is built from, where a build may leave its own."""
    root = tmp_path_factory.mktemp("checkout").resolve()
    for name in INSTALLED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def build(checkout, tmp_path_factory):
    """build(hook): the folder where the wheel of a build backend's hook is unpacked. Needs no network."""
    def build(hook):
        to = tmp_path_factory.mktemp(hook).resolve()
        subprocess.run([sys.executable, "-c", BUILD, hook, str(to)], cwd=checkout, check=True, capture_output=True)
        wheel, = to.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(to)
        return to
    return build


def launch_from(folder, cwd):
    """(where the engine was imported from, where it found the CUDA sources) once a kernel has run."""
    return run(LAUNCH, folder, sysconfig.get_path("purelib"), cwd=cwd)


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_an_installed_engine_runs_a_kernel(hook, build, checkout, tmp_path):
    site = build(hook)
    home = site if hook == "build_wheel" else checkout
    sources = home / "engine" / "cuda" if hook == "build_wheel" else home / "cuda"
    assert launch_from(site, tmp_path) == [home / "engine" / "__init__.py", sources]
    if hook == "build_wheel":
        assert files_of(sources) == files_of(ROOT / "cuda")
        assert (site / "engine" / "kernels" / "source.py").is_file()


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts)


def test_a_bare_checkout_runs_a_kernel(checkout, tmp_path):
    """No importlib.metadata at import: nothing says that it is installed."""
    for built in [*checkout.glob("*.egg-info"), *checkout.glob("build")]:
        shutil.rmtree(built)
    assert launch_from(checkout, tmp_path) == [checkout / "engine" / "__init__.py", checkout / "cuda"]


def test_without_a_host_compiler_a_kernel_test_fails_and_does_not_skip(tmp_path):
    """`make test` on a machine with no g++ must not pass."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                           "tests/kernels/test_rmsnorm.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": str(tmp_path), "RAWGEM_CACHE": str(tmp_path)})
    assert done.returncode == 1 and "install g++" in done.stdout and " skipped" not in done.stdout
