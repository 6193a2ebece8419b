"""Blocks, threads, barriers and collectives behave as on a GPU, in both builds; what would hang is an error."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from engine.errors import KernelError
from engine.kernels import host
from tests.emu.kernels import kernel, line

BF16 = np.dtype(ml_dtypes.bfloat16)
LANES = np.arange(32)


def run(entry, grid, block, *args, smem=0, file="correct.cu"):
    kernel(file, entry).launch(grid, block, args, smem=smem)


def fails(entry, block, *args, smem=0, grid=(1,), file="faulty.cu"):
    with pytest.raises(KernelError) as error:
        run(entry, grid, block, *args, smem=smem, file=file)
    return str(error.value)


def test_every_thread_knows_its_place(both):
    grid, block = (3, 2, 2), (4, 3, 2)
    out = np.full((12, 24, 6), -1, np.int32)
    run("who", grid, block, out)
    for b in range(12):
        for t in range(24):
            assert tuple(out[b, t]) == (b % 3, b // 3 % 2, b // 6, t % 4, t // 4 % 3, t // 12)


@pytest.mark.parametrize("n_threads", [32, 64, 256])
@pytest.mark.parametrize("n_blocks", [1, 2, 9])
def test_barriers_order_shared_memory(both, n_blocks, n_threads):
    x = np.random.default_rng(0).standard_normal((n_blocks, n_threads)).astype(np.float32)
    y = np.empty_like(x)
    run("reverse", (n_blocks,), (n_threads,), x, y, 3, smem=4 * n_threads)
    want = x
    for _ in range(3):
        want = want[:, ::-1] + np.float32(1)
    np.testing.assert_array_equal(y, want)


def test_launches_from_many_threads(both):
    x = np.random.default_rng(0).standard_normal((5, 9, 64)).astype(np.float32)
    y = np.empty_like(x)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda i: run("reverse", (9,), (64,), x[i % 5], y[i % 5], 2, smem=256), range(50)))
    np.testing.assert_array_equal(y, x + np.float32(1) + np.float32(1))


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 15, 31])
def test_shuffles(both, operand, width):
    out = np.empty((4, 32), np.int32)
    run("shuffles", (1,), (32,), out, operand, width)
    start, inside = LANES // width * width, LANES % width
    np.testing.assert_array_equal(out[0], 100 + start + operand % width)
    np.testing.assert_array_equal(out[1], 100 + np.where(inside >= operand, LANES - operand, LANES))
    np.testing.assert_array_equal(out[2], 100 + np.where(inside + operand < width, LANES + operand, LANES))
    np.testing.assert_array_equal(out[3], 100 + np.where((LANES ^ operand) < start + width, LANES ^ operand, LANES))


def test_a_shuffle_moves_8_bytes(both):
    out = np.empty(32, np.uint64)
    run("wide_shuffle", (1,), (32,), out)
    np.testing.assert_array_equal(out, (LANES ^ 1).astype(np.uint64) << 40 | 7)


def test_parts_of_a_warp_go_their_own_way(both):
    out = np.empty(32, np.int32)
    run("halves", (1,), (32,), out)
    np.testing.assert_array_equal(out, [120] * 16 + [2 * sum(range(16, 32))] * 16)


@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678])
def test_votes(both, bits):
    out = np.empty((3, 32), np.uint32)
    run("votes", (1,), (32,), (bits >> LANES & 1).astype(np.int32), out)
    np.testing.assert_array_equal(out, np.repeat([[bits], [bits != 0], [bits == 0xFFFFFFFF]], 32, axis=1))


def test_atomics_of_many_blocks(both):
    n_blocks, n_threads = 7, 64
    n = n_blocks * n_threads
    i, u, w = np.zeros(3, np.int32), np.array([5, 0, 2**32 - 1], np.uint32), np.array([0, 0, 2**64 - 1], np.uint64)
    f, locks, sums = np.zeros(2, np.float32), np.zeros(2, np.int32), np.zeros(n_blocks, np.int32)
    run("atomics", (n_blocks,), (n_threads,), i, u, w, f, locks, sums)
    assert i.tolist() == [-n, n - 1, 1 - n]
    assert u.tolist() == [5 + n, 3000000000 + n - 1, 3000000000 - n + 1]
    assert w.tolist() == [n << 32, n - 1 << 33, 2**64 - n]
    assert f.tolist() == [n / 2, n - 1] and locks.tolist() == [1, 7] and (sums == n_threads).all()


def test_a_tensor_core_product_is_that_of_float64(both):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(BF16), rng.standard_normal((16, 8)).astype(BF16)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    want = a.astype(np.float64) @ b.astype(np.float64) + d
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + np.abs(d)
    run("product", (1,), (32,), a, b, d)
    assert (np.abs(d - want) <= 17 * 2.0**-24 * size).all()              # 16 products, exact in float32, and their sums


@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize("is_trans", [False, True])
def test_matrices_are_loaded_by_definition(both, is_trans, is_pair):
    x = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = np.empty((32, 4), np.uint32)
    run("matrices", (1,), (32,), x.view(BF16), out, is_trans, is_pair)
    for i in range(2 if is_pair else 4):
        matrix = x[8 * i:8 * i + 8].T if is_trans else x[8 * i:8 * i + 8]
        pairs = matrix[LANES // 4, LANES % 4 * 2] | matrix[LANES // 4, LANES % 4 * 2 + 1].astype(np.uint32) << 16
        np.testing.assert_array_equal(out[:, i], pairs)


@pytest.mark.parametrize("n_tiles", [1, 2, 3, 8])
@pytest.mark.parametrize("missing", [0, 5])
def test_copies_land_when_waited_for(both, n_tiles, missing):
    x = np.random.default_rng(0).standard_normal((n_tiles, 64, 4)).astype(np.float32)
    y, want = np.empty_like(x), x.copy()
    want.reshape(-1, 4)[len(want) * 64 - missing:] = 0
    run("pipeline", (1,), (64,), x, y, n_tiles, n_tiles * 64 - missing, smem=3 * 64 * 16)
    np.testing.assert_array_equal(y, want[:, ::-1])


def test_structs_with_padding_and_vectors(both):
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    y, other = np.empty_like(x), (31 - LANES).astype(np.float32)
    run("structs", (1,), (32,), x, y)
    np.testing.assert_array_equal(y, x[::-1] + np.stack([other, 0 * other, 0 * other, other**2], axis=1))


def test_the_last_block_adds_up(both):
    x, parts, total = np.ones((9, 32), np.float32), np.zeros(9, np.float32), np.empty(1, np.float32)
    arrived = np.zeros(1, np.int32)
    for _ in range(2):
        run("last_block", (9,), (32,), x, parts, arrived, total)
        assert total[0] == 288 and arrived[0] == 0


def test_unwritten_shared_memory_is_a_pattern_in_every_block():
    y = np.zeros(64, np.float32)
    for _ in range(2):
        run("unwritten_shared", (1,), (64,), y, file="faulty.cu")
        assert np.isnan(y[16]) and (np.delete(y, 16) == 1).all()


def test_a_missing_wait_shows():
    x, y = np.ones((32, 4), np.float32), np.zeros((32, 4), np.float32)
    run("missing_wait", (1,), (32,), x, y, file="faulty.cu")
    assert np.isnan(y).all()


def test_diverged_barriers_are_named(both):
    some, others = line("faulty.cu", "some"), line("faulty.cu", "the others")
    assert f"thread 40 is in __syncthreads ({others}) while others wait in another one ({some})" in fails(
        "barrier_in_branch", (64,))
    message = fails("barrier_after_return", (64,))
    assert f"__syncthreads ({line('faulty.cu', 'without 33')}), thread 33 has returned" in message
    assert "thread 0 waits" in message
    block, warp = line("faulty.cu", "block"), line("faulty.cu", "warp")
    message = fails("barrier_against_warp", (32,))
    assert f"__syncthreads ({block})" in message and f"__syncwarp ({warp})" in message and "none can go on" in message


def test_a_collective_that_cannot_complete_is_named(both):
    out = np.zeros(32, np.int32)
    at = {mark: line("faulty.cu", mark) for mark in ("with 7", "mask of others", "lane 9", "masks")}
    assert (f"thread 0 waits in __shfl_xor_sync ({at['with 7']}), thread 7 has returned"
            in fails("dead_lane", (32,), out))
    assert (f"thread 0 (lane 0) calls __shfl_sync ({at['mask of others']}) with mask 0xf0, which leaves it out"
            in fails("not_in_mask", (32,), out))
    assert (f"thread 0 reads lane 9 in __shfl_sync ({at['lane 9']}), which takes no part (mask 0xff)"
            in fails("source_not_in_mask", (32,), out))
    assert (f"thread 4 is in __shfl_sync with mask 0xffff ({at['masks']}) while other lanes wait in __shfl_sync with "
            "mask 0xff" in fails("masks_differ", (32,), out))
    assert "thread 4 is in __any_sync" in fails("different_collectives", (32,), out)


def test_an_error_names_its_block(both):
    out = np.zeros(32, np.int32)
    message = fails("dead_lane", (32,), out, grid=(1, 1))
    assert message.startswith("dead_lane, grid (1, 1, 1), block (32, 1, 1), in block (0, 0, 0): ")


@pytest.mark.parametrize("entry", ["spin", "spin_plain"])
def test_a_spin_ends(both, entry, monkeypatch):
    monkeypatch.setattr(host, "block_limit_s", 0.2)
    args = (np.zeros(1, np.int32),) if entry == "spin" else (np.zeros(1, np.int32), np.zeros(1, np.int32))
    message = fails(entry, (32,), *args)
    assert "ran for more than 0.2 s; thread 0 spins at" in message and "faulty.cu:" in message


def test_blocks_too_large_are_refused(both):
    y = np.zeros(1, np.float32)
    limits = "a block has at most 1024 threads and 232448 bytes, 49152 of them static"
    assert limits in fails("walk", (1056,), y, y, 1, 1, file="correct.cu")
    assert limits in fails("walk", (32,), y, y, 1, 1, smem=232448, file="correct.cu")        # its file has static, too
    assert "52000 bytes of static and 0 of dynamic" in fails("large_static", (32,), y, file="large_static.cu")


@pytest.mark.parametrize("grid, block", [((1, 65536), (32,)), ((1, 1, 65536), (32,)), ((1,), (1, 1, 128)),
                                         ((1,), (0,)), ((1,), (32, 0))])
def test_grids_and_blocks_that_cuda_has_not_are_refused(both, grid, block):
    y = np.zeros(1, np.float32)
    message = fails("walk", block, y, y, 1, 1, grid=grid, file="correct.cu")
    assert "a grid has at most 65535 blocks in y and z" in message


def test_a_bad_address_is_an_error_not_the_end_of_the_process():
    message = fails("past_the_end", (32,), None, np.zeros(32, np.float32), 32)
    assert "out of bounds or misaligned: thread 0 cannot access address 0x4, at" in message


def test_an_error_leaves_the_emulator_usable(both):
    for _ in range(3):
        fails("dead_lane", (32,), np.zeros(32, np.int32))
        test_the_last_block_adds_up(both)


def test_hosts_without_our_stack_switch_run_the_same(tmp_path):
    """The ucontext fallback, in a process of its own."""
    code = ("from functools import partial\n"
            "from engine.kernels import host\n"
            "host.runtime = (lambda library: lambda: library)(host.load_runtime(('-DEMU_UCONTEXT',)))\n"
            "from tests.emu import test_emulator as t\n"
            "t.test_barriers_order_shared_memory('plain', 2, 64)\n"
            "t.test_parts_of_a_warp_go_their_own_way('plain')\n"
            "t.test_diverged_barriers_are_named('plain')\n"
            "print('as expected')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.stdout == "as expected\n", result.stderr
