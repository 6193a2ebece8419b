"""bench.py ceilings: what is measured on each lane, and which of it is the limit."""

import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import bench
import ml_dtypes
import numpy as np
import pytest
from measure import ceilings
from measure.ceilings import ceilings_of
from measure.report import BenchError, Report, Row, Stat

from engine import cuda_lane
from engine.backend import HostLane
from engine.cuda_lane import CudaLane
from engine.kernels import ops
from engine.roofline import Ceilings

BF16 = np.dtype(ml_dtypes.bfloat16)


def arguments(**changed):
    return Namespace(**{"lane": "cpu", "repeats": 2, "seed": 0, "bandwidth": None, "flops": None, "ceilings": None,
                        **changed})


def test_a_document_of_a_cpus_ceilings(tmp_path):
    path = tmp_path / "document.json"
    assert bench.main(["ceilings", "--lane", "cpu", "--bytes", "65536", "--size", "32", "-r", "2",
                       "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    rates = {row["name"]: row["stats"]["rate"] for row in document["rows"]}
    assert {name: rate["unit"] for name, rate in rates.items()} == {
        "copy": "bytes/s", "read, sum": "bytes/s", "read, GEMV": "bytes/s", "matrix product, SGEMM": "flop/s"}
    assert document["facts"]["ceilings"] == {
        "bytes_per_s": max(rates["read, sum"]["best"], rates["read, GEMV"]["best"]),
        "flops_per_s": rates["matrix product, SGEMM"]["best"], "source": "measured"}


@pytest.mark.parametrize("lane, bytes_per_s, flops_per_s", [("cpu", 9, 8), ("cuda", 6, 5)])
def test_other_work_on_a_cpu_lowers_no_limit(lane, bytes_per_s, flops_per_s):
    """The best sample of all sizes and streams is the limit; a GPU is nobody else's, there it is the best median."""
    report = Report()
    for name, unit, rates in (
            ("copy", "bytes/s", [20]), ("read, sum", "bytes/s", [6, 7, 6]), ("read, GEMV", "bytes/s", [9, 2, 3]),
            ("matrix product, SGEMM", "flop/s", [4, 8, 3]), ("matrix product, SGEMM", "flop/s", [5, 6, 5])):
        report.add(Row("ceilings", name, {}, {"rate": Stat(unit, rates, "higher")}))
    assert ceilings._found(report, SimpleNamespace(name=lane)) == Ceilings(bytes_per_s, flops_per_s, "measured")


@pytest.mark.parametrize("n_cores", [1, 2, 7])
def test_a_sum_on_all_cores_reads_all_of_it(n_cores):
    with ThreadPoolExecutor(2) as pool:
        sums = ceilings.side_by_side(pool, np.arange(1000, dtype=np.float32), n_cores)
    assert len(sums) == n_cores and sum(sums) == 999 * 500


def test_products_of_a_cpu_take_turns(monkeypatch):
    """Other work comes and goes: each size is to meet the same of it."""
    monkeypatch.setattr(ceilings, "CPU_SIZES", (4, 8))
    order = []

    class Clock:
        def timed(self, launches):
            size = len(launches[0].args[0])
            return SimpleNamespace(samples=lambda n: order.append(size) or [size] * n)

        def samples(self, launches, repeats):
            return [1] * repeats
    monkeypatch.setattr(ceilings, "clock_of", lambda lane: Clock())
    report = Report()
    ceilings.Cpu(HostLane("cpu", None, np.float32), arguments(bytes=4096, repeats=3), report).measure_limits()
    products = [row for row in report.rows if row.name == "matrix product, SGEMM"]
    assert order == [4, 8] * 3 and [row.shape["size"] for row in products] == ["4 x 4 x 4", "8 x 8 x 8"]
    assert [row.stats["rate"].samples for row in products] == [(2 * 4**2,) * 3, (2 * 8**2,) * 3]


def test_the_emulated_lane_has_none(capsys):
    assert bench.main(["ceilings", "--lane", "emulated"]) == 2
    assert "the emulated lane has no clock; bench.py kernels --lane emulated counts" in capsys.readouterr().err
    assert ceilings_of(arguments(), HostLane("emulated", ops, BF16), Report()) is None


def test_given_ceilings_are_not_measured():
    report, given = Report(), arguments(bandwidth=1e9, flops=1e10)
    assert ceilings_of(given, HostLane("emulated", ops, BF16), report) == Ceilings(1e9, 1e10, "given")
    assert report.facts["ceilings"] == {"bytes_per_s": 1e9, "flops_per_s": 1e10, "source": "given"} and not report.rows


def test_a_gpus_ceilings(gpu, monkeypatch):
    """On the stand-in, which has no cuBLAS and no copy by the driver: those are skipped, the rest is measured."""
    monkeypatch.setattr(cuda_lane, "LOADING_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings, "NODES", 11)
    lane, report = CudaLane(0, ops, BF16), Report()
    ceilings.Gpu(lane, arguments(bytes=1 << 18, size=64), report).measure()
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["read, few blocks", "read, many blocks", "copy, our kernel", "write, memset",
                          "matrix product, our kernel", "pinned to GPU", "GPU to pinned",
                          "gap between nodes of a graph", "gap between eager launches", "host time of a launch"]
    assert {skipped["what"] for skipped in report.skipped} == {"copy, the driver's", "matrix product by cuBLAS"}
    assert rows["read, few blocks"].stats["rate"].median == pytest.approx((1 << 18) / 0.001)
    assert rows["gap between nodes of a graph"].stats["time"].median == pytest.approx(0.001)
    found = ceilings._found(report, lane)
    assert found == Ceilings((1 << 18) / 0.001, rows["matrix product, our kernel"].stats["rate"].median, "measured")


def test_a_machine_without_a_product_has_no_ceilings(gpu, monkeypatch):
    monkeypatch.setattr(cuda_lane, "LOADING_BYTES", 1 << 16)
    lane, args = CudaLane(0, ops, BF16), arguments(bytes=1 << 16, size=64)
    monkeypatch.setattr(ceilings.KernelCase, "prepare", lambda *_: 1 / 0)
    with pytest.raises(BenchError, match="no matrix product ran on cuda: matrix products: ZeroDivisionError"):
        ceilings_of(args, lane, Report())
