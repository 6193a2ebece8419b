"""tools/measure/step/seats.py: sequences whose context counts as computed, and a Core with room for them."""

from unittest import mock

import numpy as np
import pytest
from measure.cases import parse_case
from measure.report import Report
from measure.step.seats import Needs, config_of, open_core, seated, step_of

from engine.models import describe
from engine.tasks import Probe
from loaders.config import Config
from tests.golden import GOLDENS
from tests.tools.tiny_core import CPU, core_of, spec_of


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_seated_sequence_holds_the_pages_of_one_that_was_computed(family):
    core, _ = core_of(spec_of(family), "decode=2*1@60", "prefill=60")
    with seated(core, [(1, 1, 60)], np.random.default_rng(0)) as (sequence,):
        held = [(pages.first, len(pages.pages)) for pages in sequence.page_lists]
    probe = Probe(59, 58, core.spec, False)
    computed = core.loop.submit(list(range(3, 62)), probe)
    core.scheduler.commit(core.scheduler.next_batch())
    assert computed.n_cached == 59
    assert held == [(pages.first, len(pages.pages)) for pages in computed.page_lists]


def test_seats_are_free_again():
    core, _ = core_of(spec_of("gemma4"), "mix=2*1@40,9@30")
    free = [pages.n_free for pages in core.kv_cache.allocators]
    with seated(core, parse_case("mix=2*1@40,9@30").rows, np.random.default_rng(0)) as sequences:
        assert [sequence.n_left for sequence in sequences] == [1, 1, 9]
        step_of(core, sequences, False)()
        assert [pages.n_free for pages in core.kv_cache.allocators] != free
    assert [pages.n_free for pages in core.kv_cache.allocators] == free and not core.scheduler.running


def test_a_core_has_room_for_each_case_at_its_time():
    """Many short sequences and few long ones share pools whose sizes the memory plan chooses."""
    texts = "decode=40*1@8", "decode=3*1@120", "prefill=100", "mix=64,8*1@50"
    core, needs = core_of(spec_of("gemma3"), *texts, max_batch_tokens=128)
    assert [str(need.case) for need in needs] == [str(parse_case(text)) for text in texts]
    for need in needs:
        with seated(core, need.case.rows, np.random.default_rng(0)) as sequences:
            step_of(core, sequences, False)
    plan = core.plan
    assert plan.kv_bytes <= 2.5 * sum(                              # and little more
        max(need.pages(pool.spec, 16) for need in needs) * pool.page_bytes for pool in plan.pools)


@pytest.mark.parametrize("name", ["gemma3-vision", "gemma4-vision-bidir"])
def test_one_decode_of_a_model_that_splits_no_picture_has_room(name):
    """The memory plan gives one sequence room for a picture, though none comes."""
    spec = describe(Config.load(GOLDENS / name / "checkpoint"))
    assert spec.has_blocks
    core, (need,) = core_of(spec, "decode=1*1@64")
    with seated(core, need.case.rows, np.random.default_rng(0)) as sequences:
        step_of(core, sequences, False)


def test_what_has_no_room_is_skipped():
    spec, report = spec_of("gemma3", max_position_embeddings=1 << 20), Report()
    lane = mock.Mock(wraps=CPU, memory_bytes=lambda: 4 << 20, dtype=CPU.dtype)
    lane.name = "cpu"
    needs = [Needs(parse_case(text), 4, spec.max_positions, 64) for text in ("decode=1*1@100", "decode=9*1@90000")]
    assert config_of(spec, needs[:1], lane, {}).max_seq_len == 104
    with mock.patch("measure.step.seats.Core.open"), mock.patch("measure.step.seats.fill_cache"):
        _, left = open_core("big", spec, needs, lane, None, report, {}, 0)
    assert left == needs[:1] and [skipped["what"] for skipped in report.skipped] == ["big: decode=9*1@90000"]
    assert "cannot hold" in report.skipped[0]["why"]


def test_verify_samples_what_each_position_says():
    core, _ = core_of(spec_of("gemma4", tie_word_embeddings=False), "verify=2*9")
    with seated(core, [(2, 9, 9)], np.random.default_rng(5)) as sequences:
        batch = step_of(core, sequences, True)()
        tokens = [token for token, _ in core.step.run(batch).slots]
        ids = [sequence.tokens for sequence in sequences]
    probes = [Probe(9, 0, core.spec, False) for _ in ids]
    for row, probe in zip(ids, probes, strict=True):
        core.loop.submit(row, probe)
    core.loop.step()
    assert tokens == [int(token) for probe in probes for token in probe.logits.argmax(axis=1)]
