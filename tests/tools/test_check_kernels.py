"""tools/check_kernels.py and engine/kernels/resources.py: what ptxas says is read, and what must not be fails."""

import json

import check_kernels
import pytest
from check_kernels import Row, check, main, table, variants
from measure.kernel import compiled

from engine.kernels.resources import LIMITS, Resources, read_log
from engine.kernels.source import Kernel, Source, folder
from engine.models.presets import PRESETS

# NVRTC 12.9: a kernel that spills, one that calls a function, one with a local array, for two architectures.
LOG_SM_80 = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'calls' for 'sm_80'
ptxas info    : Function properties for calls
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 400 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 3.436 ms
ptxas info    : Function properties for _Z6helperfi
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'indexed' for 'sm_80'
ptxas info    : Function properties for indexed
ptxas         .     64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers, used 0 barriers, 64 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 6.862 ms
ptxas info    : Compiling entry function 'spills' for 'sm_80'
ptxas info    : Function properties for spills
ptxas         .     280 bytes stack frame, 556 bytes spill stores, 580 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 280 bytes cumulative stack size, 372 bytes cmem[0]
ptxas info    : Compile time = 23.235 ms
"""
LOG_SM_90A = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rms_norm' for 'sm_90a'
ptxas info    : Function properties for rms_norm
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compile time = 27.439 ms
"""
# The nvcc command prints the same figures in lines of another shape.
LOG_NVCC = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 364 bytes cmem[0]
"""
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, OUT float* y, int n) {
    float v[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x * 64 + i];
    for (int k = 0; k < n; ++k)
        #pragma unroll
        for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 1) % 64] + v[(i + 7) % 64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) y[threadIdx.x * 64 + i] = v[i];
}
"""
INDEXED = """
extern "C" __global__ void __launch_bounds__(64) indexed(OUT float* y, int n) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[(i * n) & 15] = n + i;
    y[threadIdx.x] = v[threadIdx.x & 15];
}
"""
PLAIN = """
extern "C" __global__ void __launch_bounds__(THREADS) plain(OUT float* y) { y[threadIdx.x] = 1; }
extern "C" __global__ void __launch_bounds__(THREADS) other(OUT float* y) {
    __shared__ float two[THREADS];
    two[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = two[THREADS - 1 - threadIdx.x];
}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(text, entry, n_threads, smem, **constants): the (Build, threads, bytes) of a kernel of a test's own."""
    def planted(text, entry, n_threads=64, smem=0, **constants):
        file = tmp_path / f"{entry}.cu"
        file.write_text('#include "device.cuh"\n' + text)
        return Kernel(str(file), entry)(**constants), n_threads, smem
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "cache"))
    return planted


# --- what ptxas says

@pytest.mark.parametrize("log, entries", [
    (LOG_SM_80, {"calls": Resources(10, smem_bytes=400), "indexed": Resources(23, 64),
                 "spills": Resources(32, 280, 556, 580)}),
    (LOG_SM_90A, {"rms_norm": Resources(29, smem_bytes=32)}), (LOG_NVCC, {"plain": Resources(8)}), ("", {})])
def test_a_recorded_log_is_read(log, entries):
    assert read_log(log) == entries


def test_what_a_called_function_spills_counts_for_the_kernels_beside_it():
    log = LOG_SM_80.replace("_Z6helperfi\nptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 ",
                            "_Z6helperfi\nptxas         .     8 bytes stack frame, 4 bytes spill stores, 2 ")
    assert read_log(log)["calls"] == Resources(10, 8, 4, 2, 400)
    assert read_log(log)["spills"] == Resources(32, 288, 560, 582)


# --- how many blocks fit

@pytest.mark.parametrize("registers, n_threads, n_blocks", [        # shared memory aside, sm_80 and sm_90 are the same
    (32, 256, 8), (33, 256, 6), (40, 256, 6), (64, 256, 4), (128, 256, 2), (255, 256, 1), (255, 128, 2), (168, 384, 1),
    (16, 32, 32), (16, 1024, 2), (32, 1024, 2), (64, 1024, 1), (72, 1024, 0), (16, 1056, 0), (16, 33, 32)])
def test_blocks_that_registers_and_threads_allow(registers, n_threads, n_blocks):
    """Worked out by hand: a warp takes registers in units of 256, out of one of four files of 16384."""
    for limits in LIMITS.values():
        assert limits.blocks_per_sm(Resources(registers), n_threads, 0) == n_blocks


@pytest.mark.parametrize("arch, static, dynamic, n_blocks", [
    ("sm_80", 0, 48 << 10, 3), ("sm_90a", 0, 48 << 10, 4), ("sm_80", 0, 163 << 10, 1), ("sm_80", 1, 163 << 10, 0),
    ("sm_90a", 0, 113 << 10, 2), ("sm_90a", 1, 113 << 10, 1), ("sm_100a", 0, 227 << 10, 1),
    ("sm_100a", 4, 227 << 10, 0)])
def test_blocks_that_shared_memory_allows(arch, static, dynamic, n_blocks):
    """A block takes 1 KB more than it asks for, in units of 128 bytes."""
    assert LIMITS[arch].blocks_per_sm(Resources(16, smem_bytes=static), 128, dynamic) == n_blocks


# --- what fails

def problems_of(row_or_rows):
    return [row.problems() for row in row_or_rows]


def test_a_kernel_that_spills_fails(planted):
    rows = check([planted(SPILLS, "spills", 1024)], list(LIMITS), 1)
    assert len(rows) == 3 and all(len(found) == 1 and "spills" in found[0] for found in problems_of(rows))


def test_an_array_that_stays_in_memory_fails(planted):
    assert problems_of(check([planted(INDEXED, "indexed")], ["sm_90a"], 1)) == [["a local array of 64 bytes"]]


def test_a_tile_over_the_limit_fails_where_it_is_over(planted):
    rows = check([planted(PLAIN, "other", 64, (200 << 10) - 256, THREADS=64)], list(LIMITS), 1)
    assert problems_of(rows) == [[f"{200 << 10} bytes of shared memory, a block has {163 << 10}"], [], []]
    assert [row.blocks for row in rows] == [0, 1, 1]


def test_a_block_with_more_registers_than_there_are_fails():
    row = Row("a.cu", "a()", "sm_90a", 1024, 0, Resources(128))
    assert row.problems() == ["1024 threads of 128 registers do not fit an SM"] and row.warps == 0


@pytest.mark.parametrize("bounds, asked", [("THREADS", 1), ("THREADS, 3", 3), ("32 * (1 + LESS), MANY", 2)])
def test_launch_bounds_say_how_many_blocks_an_sm_should_hold(planted, bounds, asked):
    text = PLAIN.replace("__launch_bounds__(THREADS) other", f"__launch_bounds__({bounds}) other  // of (1, 7)\n")
    build, *_ = planted(text, "other", THREADS=64, LESS=1, MANY=2)
    assert compiled.asked_blocks(build) == asked and compiled.asked_blocks(Kernel(build.source.file, "plain")()) == 1


@pytest.mark.parametrize("arch, n_threads, dynamic, asked, least", [
    ("sm_90a", 128, 100 << 10, 2, 2), ("sm_80", 128, 100 << 10, 2, 1), ("sm_90a", 256, 100 << 10, 1, 1),
    ("sm_90a", 256, 0, 1, 2), ("sm_80", 160, 0, 1, 4), ("sm_90a", 256, 25 << 10, 3, 3), ("sm_90a", 1024, 0, 1, 1)])
def test_how_many_blocks_an_sm_holds_at_least(arch, n_threads, dynamic, asked, least):
    """As many as were asked for where tiles fit, and without tiles 16 warps."""
    row = Row("a.cu", "a()", arch, n_threads, dynamic, Resources(32), asked_blocks=asked)
    assert row.least_blocks == least


def test_what_our_kernels_ask_for():
    asked = {(build.entry, compiled.asked_blocks(build)) for build, *_ in variants(["gemma-4-31b"])}
    assert asked >= {("gemm", 2), ("attention", 2), ("attention", 1), ("draw", 3), ("rms_norm", 1)}


def test_a_kernel_that_does_not_compile_fails_with_its_log(planted):
    row, = check([planted(PLAIN.replace("y[threadIdx.x] = 1", "undeclared = 1"), "plain", THREADS=64)], ["sm_80"], 1)
    assert row.problems() == ["does not compile"] and "undeclared" in row.error
    assert "does not compile" in list(table([row]))[-1]


def test_kernels_of_a_file_with_the_same_constants_are_compiled_as_one(planted, monkeypatch):
    both = [planted(PLAIN, "plain", THREADS=64)]
    both.append((Kernel(both[0][0].source.file, "other")(THREADS=64), 64, 0))
    built = []
    build = check_kernels.device.build
    monkeypatch.setattr(check_kernels.device, "build", lambda *args: built.append(args) or build(*args))
    plain, other = check(both, ["sm_80"], 2)
    assert len(built) == 1 and plain.problems() == other.problems() == []
    assert (plain.smem_bytes, other.smem_bytes) == (0, 256) and plain.warps == 64


def test_the_table_has_a_line_for_each_architecture_under_the_kernel(planted):
    rows = check([planted(PLAIN, "other", 64, 1024, THREADS=64)], ["sm_80", "sm_90a"], 1)
    head, name, *lines = table(rows)
    assert "blocks/SM" in head and name.endswith("other.cu: other(THREADS=64)")
    assert [line.split()[0] for line in lines] == ["sm_80", "sm_90a"]
    assert lines[0].split()[2:] == ["0", "0/0", "256", "1024", "1%", "64", "32", "64"]


# --- the program

def test_every_kernel_of_every_file_is_among_what_the_presets_launch():
    found = variants(PRESETS)
    files = sorted(file.name for file in folder().glob("*.cu"))
    assert {(build.source.file, build.entry) for build, *_ in found} == {
        (file, entry) for file in files for entry in Source.load(file).entries}
    assert all(n_threads % 32 == 0 and smem >= 0 for _, n_threads, smem in found)
    assert len({(build.source.file, repr(build), *rest) for build, *rest in found}) == len(found)


@pytest.mark.parametrize("json_too", [False, True])
def test_the_program_succeeds_on_good_kernels_and_fails_on_bad_ones(planted, monkeypatch, capsys, json_too):
    good, bad = planted(PLAIN, "plain", THREADS=64), planted(INDEXED, "indexed")
    argv = ["--arch", "sm_90a", *["--json"] * json_too]
    monkeypatch.setattr(check_kernels, "variants", lambda *_: [good])
    assert main(argv) == 0 and not capsys.readouterr().err
    monkeypatch.setattr(check_kernels, "variants", lambda *_: [good, bad])
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "indexed() on sm_90a: a local array of 64 bytes" in said.err and "plain" not in said.err
    if json_too:
        assert [row["taken"]["stack_bytes"] for row in json.loads(said.out)] == [0, 64]
    else:
        assert "2 kernels with their constants on sm_90a" in said.out


def test_names_come_in_comma_lists_or_one_by_one(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(check_kernels.device, "nvrtc", lambda: None)
    monkeypatch.setattr(check_kernels, "variants", lambda presets, kernels: asked.append((presets, kernels)) or ["one"])
    monkeypatch.setattr(check_kernels, "check", lambda found, arches, n: asked.append(arches) or [])
    for argv in (["--arch", "sm_80,sm_90a", "--preset", "gemma-3-1b", "--kernel", "gemm,rope"],
                 ["--arch", "sm_80", "sm_90a", "--preset", "gemma-3-1b", "--kernel", "gemm", "rope"]):
        assert main(argv) == 0
    assert asked == 2 * [(["gemma-3-1b"], ["gemm", "rope"]), ["sm_80", "sm_90a"]]
    assert main([]) == 0
    assert asked[4:] == [(list(PRESETS), None), list(LIMITS)]
    with pytest.raises(SystemExit):
        main(["--arch", "sm_80,sm_81"])
    assert "'sm_81' is none of sm_80" in capsys.readouterr().err


def test_a_module_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--kernel", "attentoin"])
    assert "--kernel attentoin: none of that name" in capsys.readouterr().err
