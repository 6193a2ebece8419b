"""engine/trace.py: every op of a step is announced, and the trace changes nothing."""

from contextlib import contextmanager
from inspect import isfunction

from engine import reference
from engine.backend import HostLane
from engine.config import EngineConfig
from engine.core import Core
from engine.kernels import ops
from engine.models import describe
from engine.tasks import Probe
from engine.trace import OPS, traced
from loaders.config import Config
from loaders.safetensors import Checkpoint


def test_every_op_of_the_tables_is_traced():
    setup = {"check", "explain", "scratch_size", "vision_scratch_size"}
    assert set(ops.__all__) - setup == set(OPS)
    assert set(OPS) <= {name for name in dir(reference) if isfunction(getattr(reference, name))}


def logits_of(path, lane):
    spec = describe(Config.load(path))
    config = EngineConfig(max_seq_len=16, max_seqs=2, max_batch_tokens=8)
    with Checkpoint.open(path) as checkpoint:
        core = Core.open(spec, config, lane, checkpoint)
    probe = Probe(9, 0, spec, False)
    core.loop.submit([3, 1, 4, 1, 5, 9, 2, 6, 5], probe)
    while not probe.is_finished:
        core.loop.step()
    return probe.logits


def test_a_traced_step_names_its_ops_in_order_and_computes_the_same(checkpoints):
    seen, open_ops = [], []

    @contextmanager
    def around(name, args, kwargs):
        seen.append(name)
        open_ops.append(name)
        yield
        assert open_ops.pop() == name

    path = checkpoints["gemma4"]
    plain = HostLane("cpu", reference, "float32")
    watched = HostLane("cpu", traced(reference, around), "float32")
    assert (logits_of(path, plain) == logits_of(path, watched)).all()
    assert seen[:4] == ["embed", "rope_angles", "rope_angles", "rms_norm"]
    layer = ["linear", "qk_norm_rope_cache", "attention", "linear", "add_norm", "gated_linear", "linear", "add_norm"]
    assert seen[4:12] == layer and not open_ops
