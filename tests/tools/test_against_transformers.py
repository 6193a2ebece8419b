"""transformers as a whole-model peer of bench.py against, where it is installed: our numbers, on our weights."""

from argparse import Namespace

import numpy as np
import pytest
from measure.cases import parse_case
from measure.models import Model
from measure.peer import against_model, turns
from measure.peer.peer_models import MODELS
from measure.random_weights import RandomCheckpoint
from measure.report import Report

from engine.backend import open_lane
from engine.models import describe
from loaders.config import Config
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peer_transformers = pytest.importorskip("measure.peer.peer_transformers")
CPU = open_lane("cpu", "auto")
TOKENS = 3


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Tiny products on one thread: on a busy machine several wait for each other."""
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def opened(family, text):
    """(Core of a tiny model, its Model, the case)"""
    config, case = tiny.flat(family), parse_case(text)
    spec = describe(Config(config))
    core, _ = against_model.open_core("tiny", spec, CPU, RandomCheckpoint(spec), [case], 4 * TOKENS, Report(), 0)
    return core, Model("tiny", spec, None, config), case


def measured(core, model, case):
    report = Report()
    args = Namespace(repeats=2, seed=0, tokens=TOKENS)
    is_good = against_model.measure_case(core, model, case, MODELS["transformers"], args, report)
    assert not report.skipped
    return is_good, report.rows[-1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("text", ["decode=2*1@40", "prefill=2*24"])
def test_every_family_agrees_and_is_timed(family, text):
    """Prompts beyond several windows and chunks, and decode steps: within 2e-4 of max |logit|."""
    is_good, row = measured(*opened(family, text))
    assert is_good and row.stats["error"].median <= 2e-4 == against_model.FLOAT32_BOUND
    assert all(len(row.stats[side].samples) == 2 for side in ("ours", "theirs"))


def test_one_that_computes_something_else_is_reported_and_not_timed(monkeypatch):
    make = peer_transformers.model_of

    def wrong(config, *rest):
        return make({**config, "rope_local_base_freq": 5e3}, *rest)
    monkeypatch.setattr(peer_transformers, "model_of", wrong)
    is_good, row = measured(*opened("gemma3", "decode=1*1@40"))
    assert not is_good and "ours" not in row.stats and row.notes[0].startswith("not timed: logits differ by")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_reads_our_weights_where_they_are(family):
    """All but the norms, to which the cpu lane adds their offset."""
    core, model, _ = opened(family, "prefill=24")
    theirs = peer_transformers.model_of(model.config, core.spec, core.weights)
    ours = [core.weights, *core.weights.layers]
    held = [(array.ctypes.data, array.ctypes.data + array.nbytes) for owner in ours for array in vars(owner).values()
            if isinstance(array, np.ndarray)]
    copied = [name for name, tensor in theirs.named_parameters()
              if not any(begin <= tensor.data_ptr() < end for begin, end in held)]
    assert all("norm" in name for name in copied) and bool(copied) == bool(core.spec.norm_offset)


def scripted(peer, monkeypatch):
    """A generate() that computes nothing: 10 s to a prompt's logits, 1 s to those of each further token. The list of
    (n_seqs, prompt tokens, further tokens)."""
    asked, now = [], [0.0]

    def generate(ids, n_tokens, on_logits):
        asked.append((*ids.shape, n_tokens))
        for i in range(n_tokens):
            now[0] += 1 if i else 10
            on_logits(ids, None)
    monkeypatch.setattr(peer, "_generate", generate)
    monkeypatch.setattr(peer_transformers, "time", Namespace(perf_counter=lambda: now[0]))
    return asked


@pytest.mark.parametrize("text, seconds, asks", [("decode=2*1@40", 1.0, (2, 39, TOKENS + 1)),
                                                 ("prefill=2*24", 10.0, (2, 24, 1))])
def test_a_sample_is_a_prompt_or_a_token_after_one_from_the_same_context_on(text, seconds, asks, monkeypatch):
    core, model, case = opened("gemma3", text)
    peer = MODELS["transformers"]["transformers"](core, case, 64, model)
    asked = scripted(peer, monkeypatch)
    peer.ready(TOKENS)
    assert peer.samples(2) == [seconds] * 2
    assert asked == [asks] * 4                                  # two of them to get ready


@pytest.mark.parametrize("text, kind", [("decode=2*1@40", "StaticCache"), ("prefill=2*24", "DynamicCache")])
def test_the_case_chooses_the_cache_whatever_the_config_says(text, kind):
    core, model, case = opened("gemma3", text)
    named = Model("tiny", core.spec, None, {**model.config, "cache_implementation": "static"})
    peer, kinds = MODELS["transformers"]["transformers"](core, case, 64, named), set()

    def note(module, args, kwargs):
        kinds.add(type(kwargs["past_key_values"]).__name__)
    peer.model.register_forward_pre_hook(note, with_kwargs=True)
    peer.ready(TOKENS)
    assert kinds == {kind} and len(peer.notes) == 1             # no second note: nothing was refused


def test_weights_that_are_not_ours_are_named():
    core, model, _ = opened("gemma4", "prefill=24")
    config = {**model.config, "hidden_size_per_layer_input": 8}
    with pytest.raises(against_model.BenchError, match=r"has other weights: model\..*per_layer"):
        peer_transformers.model_of(config, core.spec, core.weights)


def test_without_a_static_cache_it_says_so():
    core, model, case = opened("gemma3", "decode=1*1@40")
    peer = MODELS["transformers"]["transformers"](core, case, 64, model)

    class Broken:
        def reset(self):
            raise TypeError("no static cache for these")
    peer.cache = Broken()
    peer.ready(TOKENS)
    assert len(peer.samples(1)) == 1 and "no static cache for these" in peer.notes[-1]
