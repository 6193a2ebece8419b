"""The host compiler: content-keyed, atomic, and clear about what is missing."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError, KernelError
from engine.kernels import host
from engine.kernels.source import Kernel

TEXT = 'extern "C" int answer() { return NUMBER; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no memory of the compiler."""
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "cache"))
    host.compiler.cache_clear()
    yield tmp_path / "cache"
    host.compiler.cache_clear()


def fake_compiler(folder, monkeypatch, script):
    folder.mkdir()
    (folder / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_the_same_text_is_compiled_once_and_any_change_again(cache):
    before = host.n_builds
    first = host.build("answer.cpp", TEXT, ("-DNUMBER=42",))
    assert host.build("answer.cpp", TEXT, ("-DNUMBER=42",)) == first and host.n_builds == before + 1
    others = {host.build("answer.cpp", TEXT, ("-DNUMBER=43",)), host.build("answer.cpp", TEXT + "\n", ("-DNUMBER=42",))}
    assert first not in others and len(others) == 2 and host.n_builds == before + 3
    assert ctypes.CDLL(str(first)).answer() == 42


def test_processes_that_race_leave_one_whole_library(cache):
    code = ("import ctypes; from engine.kernels import host; "
            f"print(ctypes.CDLL(str(host.build('answer.cpp', {TEXT!r}, ('-DNUMBER=42',)))).answer())")
    racers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [racer.communicate()[0] for racer in racers] == ["42\n"] * 4
    assert len(list((cache / "host").iterdir())) == 1


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "file" / "cache"))
    library = host.build("answer.cpp", TEXT, ("-DNUMBER=7",))
    assert tmp_path not in library.parents and ctypes.CDLL(str(library)).answer() == 7


def test_a_compile_error_shows_the_file_its_constants_the_line_and_the_log(cache, tmp_path):
    file = tmp_path / "wrong.cu"
    file.write_text('#include "device.cuh"\n\n'
                    'extern "C" __global__ void wrong(OUT int* y) {\n    *y = TILE + missing;\n}\n')
    with pytest.raises(KernelError) as error:
        Kernel(str(file), "wrong")(TILE=64).launch((1,), (32,), (None,))
    message = str(error.value)
    assert message.startswith("wrong.cu does not compile with g++ ") and "-DTILE=64" in message
    assert f"{file}:4: *y = TILE + missing;" in message and "'missing' was not declared" in message


def test_no_compiler(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"g\+\+, which was not found; install g\+\+ .*apt install g\+\+"):
        host.load_runtime()


def test_a_compiler_that_cannot_compile(cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path / "bin", monkeypatch, '[ "$1" = --version ] && echo "g++ 4" && exit\n'
                  'echo "emulator.cpp:1:10: fatal error: atomic: No such file or directory" >&2; exit 1')
    with pytest.raises(ConfigError) as error:
        host.load_runtime()
    assert "does not compile the emulator; install g++" in str(error.value)
    assert "fatal error: atomic: No such file" in str(error.value)


def test_a_build_that_was_cut_off_leaves_nothing(cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path / "bin", monkeypatch, '[ "$1" = --version ] && echo "g++ 4" && exit\n'
                  'for last in "$@"; do :; done; echo half > out.so; exit 1')
    with pytest.raises(KernelError):
        host.build("answer.cpp", TEXT, ("-DNUMBER=42",))
    assert not list(Path(cache / "host").iterdir())
