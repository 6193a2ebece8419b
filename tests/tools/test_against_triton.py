"""The fused experts of bench.py against in Triton, where it is installed, by its interpreter: they are ours."""

import sys
from argparse import Namespace

import numpy as np
import pytest
from measure.kernel.kernel_cases import KernelCase
from measure.peer import torch_arrays
from measure.peer.peers import PEERS

from engine.backend import open_lane

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
CPU = open_lane("cpu", "auto")
MODULE = "measure.peer.triton_experts"


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as Python, on tensors of the host; who imports them later gets the compiled ones."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield
    sys.modules.pop(MODULE, None)


def case(op, **sizes):
    return KernelCase(op, "", "none", {"n_tokens": 30, "n_experts": 6, "experts_per_token": 2, "n_in": 72, "n_out": 80,
                                       "in_out": False, **sizes})


GATED = {"by_pair": False, "activation": "gelu_tanh"}
CASES = [
    case("moe_gated_linear", **GATED), case("moe_gated_linear", **GATED, n_tokens=1),
    case("moe_gated_linear", **GATED, n_tokens=150, n_experts=3, experts_per_token=1, n_in=40),
    case("moe_gated_linear", by_pair=True, activation="silu", in_out=True, experts_per_token=1),
    case("moe_linear"), case("moe_linear", in_out=True), case("moe_linear", n_tokens=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_by_expert_are_ours(case, interpreted):
    """Experts without a row, with a part of a tile, with several tiles; columns and sums that end within one."""
    peer, = (peer for peer in PEERS if (peer.name, peer.op) == ("triton", case.op))
    prepared = case.prepare(CPU, np.random.default_rng(0), 2)
    with torch_arrays.torch_running(CPU):
        launches = peer.prepare(prepared)
        error, bound = peer.compare(prepared, launches[0])
        assert len(launches) == 2 and error <= bound == 1e-5
        wrong, bound = peer.compare(prepared, lambda: launches[0]().roll(1, 1))
        assert wrong > bound


def test_of_the_tiles_the_fastest_that_fits_computes_every_set(interpreted, monkeypatch):
    from measure.peer import triton_experts
    routes, tiles = Namespace(begins=[0, 40, 90]), triton_experts.TILES
    choices = [(n_rows, tile) for n_rows in (32, 64) for tile in tiles]
    times = dict(zip(choices, [None, 5.0, 4.0, 2.0, None, 3.0], strict=True))       # None: too large for the GPU

    def do_bench(launch, *durations):
        arrays, *choice = launch
        assert arrays is prepared.sets[0]
        if times[tuple(choice)] is None:
            raise triton_experts.OutOfResources(300_000, 230_000, "shared memory")
        return times[tuple(choice)]
    monkeypatch.setattr(triton_experts.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(triton_experts, "bound", lambda prepared, *launch: launch)
    prepared = Namespace(lane=Namespace(name="cuda"), sets=[{"host_routes": routes}, {"host_routes": routes}])
    assert triton_experts.experts(prepared) == [(arrays, 64, tiles[0]) for arrays in prepared.sets]


def test_tiles_are_of_one_expert_each(interpreted):
    from measure.peer import triton_experts
    experts, places = triton_experts.tiles_of([0, 17, 17, 20, 52], 16)
    assert experts.tolist() == [0, 0, 2, 3, 3] and places.tolist() == [0, 16, 17, 20, 36]
    assert triton_experts.row_sizes([0, 1, 1, 2]) == (16, 32)
    assert triton_experts.row_sizes([0, 40, 90]) == (32, 64)
    assert triton_experts.row_sizes([0, 4000]) == (64, 128)
