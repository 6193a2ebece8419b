"""tools/measure/random_weights.py: presets have all they need, states stay finite, experts share the tokens."""

import ml_dtypes
import numpy as np
import pytest
from measure.cases import parse_case
from measure.random_weights import RandomCheckpoint, slice_of
from measure.report import BenchError, Report
from measure.step.seats import Needs, open_core, seated, step_of
from measure.step.timeline import recording

from engine.backend import open_lane
from engine.models import describe
from engine.models.presets import PRESETS, preset
from engine.tasks import Probe
from engine.tensors import account, n_weights
from loaders.config import Config
from tests import tiny

CPU = open_lane("cpu", "auto")


def spec_of(family, **fields):
    return describe(Config(tiny.flat(family, **fields)))


def core_of(spec, text, **options):
    needs = [Needs(parse_case(text), 4, spec.max_positions, 64)]
    return open_core("tiny", spec, needs, CPU, RandomCheckpoint(spec, 3), Report(), options, 3)


def read(checkpoint, name, begin=0, end=None, dtype=np.float32):
    shape = checkpoint.tensors[name].shape
    out = np.empty((int(np.prod(shape)) if end is None else end) - begin, dtype)
    assert checkpoint.read_range(name, begin, begin + len(out), out) == 2 * len(out)
    return out


def test_weights_depend_on_seed_and_tensor_and_not_on_how_they_are_read():
    spec = spec_of("gemma3", vocab_size=20000)                      # an embedding of several blocks
    first, again, other = (RandomCheckpoint(spec, seed) for seed in (3, 3, 4))
    name = "model.embed_tokens.weight"
    whole = read(first, name)
    assert len(whole) > 2 << 18
    np.testing.assert_array_equal(whole, read(again, name))
    np.testing.assert_array_equal(whole, read(first, name, dtype=ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(whole[1000:600000], read(again, name, 1000, 600000))
    assert (whole != read(other, name)).mean() > 0.9
    q, k = (read(first, f"model.layers.0.self_attn.{part}_proj.weight") for part in "qk")
    assert (q[:len(k)] != k).mean() > 0.9


def test_rows_of_a_matrix_differ():
    checkpoint = RandomCheckpoint(spec_of("gemma3", vocab_size=20000), 0)
    rows = read(checkpoint, "model.embed_tokens.weight").reshape(20000, 32)
    assert len(np.unique(rows[:, :4].round(3), axis=0)) > 19000


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states_and_logits_stay_of_a_size_at_any_depth(family):
    kinds = {} if family == "llama4" else {"layer_types": ["sliding_attention", "full_attention"] * 16}
    spec = spec_of(family, num_hidden_layers=32, tie_word_embeddings=False, **kinds)
    core, _ = core_of(spec, "prefill=24")
    probe = Probe(24, 0, spec, "layers")
    core.loop.submit(list(range(3, 27)), probe)
    core.loop.step()
    assert np.isfinite(probe.logits).all() and 0.3 < probe.logits.std() < 3
    assert (probe.hidden.std(axis=(1, 2)) < 3 * np.sqrt(1 + 2 * np.arange(33))).all()


@pytest.mark.parametrize("preset_name", PRESETS)
@pytest.mark.parametrize("ple", ["device", "host"])
def test_a_checkpoint_has_all_that_a_preset_needs(preset_name, ple):
    spec = preset(preset_name).text_only()
    tensors = RandomCheckpoint(spec).tensors
    accounts = account(spec, tensors, ple)
    assert not accounts.problems and not accounts.unused
    assert sum(tensors[name].n_bytes for name in accounts.names.values()) == 2 * n_weights(spec, ple)
    assert (accounts.table is not None) == (ple == "host" and spec.per_layer_input > 0)


def test_experts_are_chosen_about_evenly_and_weigh_differently():
    spec = spec_of("gemma4-moe", hidden_size=256, num_experts=16, top_k_experts=4)
    core, _ = core_of(spec, "verify=64@64")
    with seated(core, [(1, 64, 64)], np.random.default_rng(0)) as sequences, recording(core) as calls:
        core.step.run(step_of(core, sequences, True)())
    of_layers = [args[2] for name, args, _ in calls if name == "moe_gated_linear"]
    assert len(of_layers) == 6 and min(np.diff(routes.begins).min() for routes in of_layers) > 0
    weights = np.concatenate([routes.weights for routes in of_layers])
    assert 1.5 < np.median(weights[:, 0] / weights[:, -1]) < 30
    logits = [args[0] for name, args, _ in calls if name == "moe_route"]
    assert 0.5 < logits[-1].std() < 2


def test_a_table_in_the_hosts_memory_gives_what_one_on_the_lane_gives():
    spec, found = spec_of("gemma4-e"), []
    for ple in ("device", "host"):
        core, _ = core_of(spec, "prefill=24", ple=ple)
        assert (core.weights.per_layer_rows is None) == (core.weights.per_layer_embed is not None) == (ple == "device")
        probe = Probe(24, 0, spec, None)
        core.loop.submit(list(range(3, 27)), probe)
        core.loop.step()
        found.append(probe.logits)
    np.testing.assert_array_equal(*found)


def test_a_slice_has_the_first_layers():
    spec = spec_of("gemma4")
    assert slice_of(spec, 2).layers == spec.layers[:2] and slice_of(spec, 2).vocab == spec.vocab
    for n in (0, 7):
        with pytest.raises(BenchError, match=f"{n} layers of a model that has 6, expected 1 to 6"):
            slice_of(spec, n)
