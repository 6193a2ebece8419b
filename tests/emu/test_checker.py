"""The checker sees each planted fault, names threads and lines, changes nothing, and counts bytes exactly."""

import re

import numpy as np
import pytest

from engine.errors import KernelError
from engine.kernels import host
from tests.emu.kernels import kernel, line

pytestmark = pytest.mark.usefixtures("checked")


def f32(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def run(entry, grid, block, *args, smem=0):
    with host.checking() as launches:
        kernel("correct.cu", entry).launch(grid, block, args, smem=smem)
    return launches[0].traffic


def fails(entry, block, *args, smem=0):
    with pytest.raises(KernelError) as error:
        kernel("faulty.cu", entry).launch((1,), block, args, smem=smem)
    return str(error.value).split(": ", 1)[1]


def at(mark):
    return line("faulty.cu", mark)


def ints(n):
    return np.zeros(n, np.int32)


# Races

def test_a_missing_barrier_names_both_threads_and_both_lines():
    message = fails("missing_barrier", (64,), ints(64))
    lines = re.fullmatch(r"race: thread 0 writes byte \d+ of static shared memory at (\S+), "
                         r"thread 63 read it at (\S+), with no barrier between them", message).groups()
    assert lines == (at("wrote"), at("read"))


def test_lanes_of_a_warp_race_too():
    message = fails("missing_syncwarp", (32,), ints(32), smem=128)
    assert message.startswith("race: thread ") and at("lane 5 wrote") in message and at("lane 9 read") in message
    assert "thread 5 " in message and "thread 9 " in message and "ordered by __syncwarp alone" in message


def test_a_shuffle_orders_no_memory():
    message = fails("shuffle_orders_nothing", (32,), ints(32))
    assert at("before the shuffle") in message and at("after the shuffle") in message


def test_a_sync_of_half_a_warp_orders_that_half():
    message = fails("half_syncwarp", (32,), ints(32))
    assert at("both halves wrote") in message and at("other half read") in message


def test_the_barrier_missing_at_the_end_of_a_loop():
    message = fails("overwritten_too_early", (64,), ints(128), ints(128))
    assert at("next round wrote") in message and at("round read") in message


def test_two_writers():
    assert fails("two_writers", (64,), ints(1)).count(at("all wrote")) == 2


def test_global_memory_within_a_block():
    message = fails("global_race", (64,), ints(128))
    assert at("global wrote") in message and at("global read") in message and "of x (512 bytes)" in message


def test_a_copy_races_from_the_moment_it_is_issued():
    message = fails("copied_too_early", (64,), f32(64, 4), f32(64, 4))
    assert at("tile read") in message and at("tile copied") in message


# Reads of nothing

def test_a_copy_that_nobody_waited_for():
    message = fails("missing_wait", (32,), f32(32, 4), f32(32, 4))
    assert message.startswith("never written: thread 31 reads 16 bytes") and at("not landed") in message
    assert "copy_async not waited for" in message


def test_output_that_is_read_before_it_is_written():
    y = f32(32)
    message = fails("unwritten_out", (32,), y)
    assert message == (f"never written: thread 0 reads 4 bytes at {at('y[0]')} that hold nothing yet: "
                       "byte 0 of y (128 bytes)")
    np.testing.assert_array_equal(y, f32(32))                            # a launch that fails changes nothing


def test_shared_memory_that_is_read_before_it_is_written():
    message = fails("unwritten_shared", (64,), f32(64))
    assert message.startswith("never written: thread 16 reads 4 bytes at " + at("there[17]"))


# Out of bounds

def test_a_read_past_the_end():
    message = fails("past_the_end", (32,), f32(32), f32(32), 32)
    assert message == (f"out of bounds: thread 31 reads 4 bytes at {at('x + 1')}: "
                       "0 bytes past the end of x (128 bytes)")


def test_a_write_before_the_start_changes_nothing():
    memory = f32(64)
    message = fails("write_before", (16,), memory[16:32])
    assert message == f"out of bounds: thread 0 writes 4 bytes at {at('y - 1')}: 4 bytes before y (64 bytes)"
    np.testing.assert_array_equal(memory, f32(64))


def test_a_wide_read_over_the_end():
    message = fails("wide_tail", (8,), f32(30), f32(32))
    assert message.startswith(f"out of bounds: thread 7 reads 16 bytes at {at('x of 16')}: byte 112 of x (120 bytes)")


def test_null_pointers_and_empty_arrays():
    message = fails("past_the_end", (32,), None, f32(32), 32)
    assert message == f"out of bounds: thread 0 reads 4 bytes at {at('x + 1')}: 4 bytes from a null pointer"
    assert "past the end of x (0 bytes)" in fails("past_the_end", (32,), f32(0), f32(32), 32)


def test_shared_memory_out_of_bounds():
    assert f"thread 16 writes 1 bytes at byte 64 of 64 bytes of dynamic shared memory at {at('dynamic')}" in fails(
        "past_dynamic", (32,), smem=64)
    assert at("matrix") in (message := fails("matrix_past_end", (32,), smem=512)) and "thread 31 names a row" in message


def test_the_local_memory_of_another_thread():
    message = fails("others_local", (32,), ints(32))
    assert f"reads 4 bytes of the local memory of thread 0 at {at('local of 0')}" in message


def test_misaligned_accesses():
    message = fails("misaligned", (4,), f32(32), f32(32))
    assert message.startswith(f"misaligned: thread 0 accesses 16 bytes at {at('x + 1 of 16')}; byte 4 of x")
    assert f"accesses 8 bytes at {at('x + 1 of 8')}" in fails("misaligned_pair", (4,), f32(32), f32(32))
    assert f"copies 16 bytes with copy_async at {at('copy of 16 at 4')}" in fails("misaligned_copy", (4,), f32(32))
    message = fails("copy_to_global", (4,), f32(32), f32(32))
    assert f"copy_async at {at('copy to global')} to what is not shared memory" in message


def test_a_view_is_as_aligned_as_on_the_gpu():
    memory = f32(64)
    run("walk4", (1,), (4,), memory[4:20], f32(16), 4)
    with pytest.raises(KernelError, match="misaligned"):
        run("walk4", (1,), (4,), memory[2:18], f32(16), 4)


# Arguments

def test_arguments_that_share_memory_still_do():
    memory = f32(96)
    want = memory.copy()
    want[16:32] = memory[:16]
    run("walk", (1,), (32,), memory[:32], memory[16:48], 16, 1)
    np.testing.assert_array_equal(memory, want)


def test_outputs_that_also_are_inputs_hold_something():
    memory = f32(32)
    run("walk", (1,), (32,), memory, memory, 32, 1)
    np.testing.assert_array_equal(memory, f32(32))


# Traffic

def test_distinct_bytes_are_exact():
    x, y = f32(1000), f32(1000)
    traffic = run("walk", (4,), (256,), x, y, 999, 1)
    assert (traffic.read_bytes, traffic.written_bytes, traffic.distinct_bytes) == (3996, 3996, 7992)
    assert traffic.moved_bytes == 2 * 4000                               # whole sectors
    np.testing.assert_array_equal(y[:999], x[:999])


def test_a_strided_read_moves_a_sector_for_each_element():
    traffic = run("walk", (4,), (256,), f32(1024 * 8), f32(1024), 1024, 8)
    assert (traffic.read_bytes, traffic.written_bytes) == (4096, 4096)
    assert traffic.moved_bytes == 1024 * 32 + 4096
    lines = {(line.space, line.moved_bytes) for line in traffic.lines()}
    assert lines <= {("global", 1024 * 32), ("global", 4096), ("global", 1024 * 32 + 4096)}


def test_wide_accesses_are_one_request_of_the_warp():
    traffic = run("walk4", (2,), (64,), f32(128, 4), f32(128, 4), 128)
    assert traffic.moved_bytes == traffic.distinct_bytes == 4096
    assert sum(line.n_requests for line in traffic.lines()) == 8


def test_copies_count_as_reads():
    traffic = run("pipeline", (1,), (64,), f32(4, 64, 4), f32(4, 64, 4), 4, 4 * 64 - 8, smem=3 * 1024)
    assert traffic.read_bytes == 4096 - 128 and traffic.written_bytes == 4096
    assert traffic.moved_bytes == traffic.distinct_bytes


def test_small_operands_read_again_are_reported_apart():
    traffic = run("walk", (8,), (128,), f32(1), f32(1024), 1024, 0)
    assert traffic.read_bytes == 4 and traffic.moved_bytes == 32 * 32 + 4096
    assert traffic.small_reread_bytes == 31 * 32


@pytest.mark.parametrize("pitch, conflicts", [(32, 32 * 31), (33, 0), (34, 32), (36, 32 * 3)])
def test_bank_conflicts_of_a_column(pitch, conflicts):
    traffic = run("columns", (1,), (32,), f32(32, 32), f32(32, 32), pitch, smem=4 * 32 * pitch)
    assert traffic.bank_conflicts == conflicts
    by_line = {row.where: row.bank_conflicts for row in traffic.lines() if row.space == "shared"}
    assert by_line.get(line("correct.cu", "COLUMN")) == conflicts


@pytest.mark.parametrize("pitch, conflicts", [(16, 0), (32, 2 * 4 * 1), (128, 2 * 4 * 7), (144, 0)])
def test_bank_conflicts_of_16_byte_accesses(pitch, conflicts):
    assert run("chunks", (1,), (32,), f32(32, 4), pitch, smem=32 * pitch).bank_conflicts == conflicts


def test_blocks_run_side_by_side_and_add_up():
    x, y = f32(64, 256), f32(64, 256)
    traffic = run("reverse", (64,), (256,), x, y, 3, smem=1024)
    assert traffic.distinct_bytes == traffic.moved_bytes == 2 * x.nbytes and traffic.bank_conflicts == 0
