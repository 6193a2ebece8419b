"""engine/assistant.py on the kernels: the same bits in any company and whatever the host planned for, as good as plain
bfloat16 math, captured in a graph; and the heads, with centroids and without, on every lane."""

from contextlib import contextmanager

import numpy as np
import pytest

from engine.assistant import Assistant
from engine.kernels import ops
from engine.trace import traced
from tests.draft_pair import Pair
from tests.draft_points import Points, assert_close
from tests.kernels.closeness import bf16, f64
from tests.plain_draft import PlainDraft

CASES = ("gemma4-assistant", "gemma4-assistant-dense")


@pytest.fixture(scope="module", params=CASES)
def emulated(request):
    case = request.param
    pair = Pair(case, "emulated", page_size=3, max_batch_tokens=64)
    points = Points.of(pair, case, [0, 2, 3], 2)
    return case, points, points.draft()


@pytest.mark.parametrize("value", [np.nan, 1e4])
def test_poison_on_the_kernels(emulated, value):
    case, _, (_, logits, states) = emulated
    pair = Pair(case, "emulated", page_size=3, max_batch_tokens=64)
    alone = Points.of(pair, case, [3], 1)
    pair.poison(alone.sequences[0], value, before=15)
    got = alone.draft(inputs=pair.inputs(alone.sequences, (2, 16)))
    np.testing.assert_array_equal(got[1][0].view(np.uint32), logits[4].view(np.uint32))
    np.testing.assert_array_equal(got[2][0].view(np.uint16), states[4].view(np.uint16))


def test_the_same_bits_in_any_batch(emulated):
    _, points, (ids, logits, states) = emulated
    for rows in ([0], [3], [5, 1], [4, 3, 2, 1, 0, 5, 5]):
        got = points.draft(rows)
        np.testing.assert_array_equal(got[0], ids[rows])
        np.testing.assert_array_equal(got[1].view(np.uint32), logits[rows].view(np.uint32))
        np.testing.assert_array_equal(got[2].view(np.uint16), states[rows].view(np.uint16))


def test_the_same_bits_whatever_position_the_host_planned_for(emulated):
    _, points, (_, logits, _) = emulated
    for spread in ((0, 16), (7, 2)):
        got = points.draft(inputs=points.pair.inputs(points.sequences, spread))
        np.testing.assert_array_equal(got[1].view(np.uint32), logits.view(np.uint32))


def test_bfloat16_is_as_good_as_plain_math(emulated):
    """Final states along the drafts of the definition, which both are made to follow: their distance from float64 is at
    most twice that of the same math done plainly in bfloat16 with float32 sums, over all points and steps."""
    case, points, _ = emulated
    exact, plain = PlainDraft(case), PlainDraft(case, np.float32, lambda x: bf16(x).astype(np.float32))
    wanted = [points.plain(b, exact) for b in range(len(points.tokens))]
    forced, want = np.array([ids for ids, _, _ in wanted]), np.stack([states for *_, states in wanted])
    got = f64(points.draft(forced=forced)[2])
    rough = np.stack([points.plain(b, plain, forced=forced[b])[2] for b in range(len(forced))])
    ours, plains = (np.linalg.norm(x - want, axis=-1) / np.linalg.norm(want, axis=-1) for x in (got, rough))
    assert np.median(ours) <= 2 * np.median(plains) and ours.max() <= 2 * plains.max()


# --- the head

@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("case", CASES)
def test_suppressed_ids_are_never_drafted(case, device):
    """The first drafts of three points: others come in their place, with unchanged logits."""
    free = Points.of(Pair(case, device), case, [0, 1, 3], 1)
    ids, logits, _ = free.draft(n_steps=1)
    banned = tuple(ids[:, 0].tolist())
    points = Points.of(Pair(case, device, suppressed=banned), case, [0, 1, 3], 1)
    logits[:, :, list(banned)] = -np.inf
    for rows in ([0, 1, 2], [1]):
        got = points.draft(rows, n_steps=1)
        assert_close(got[1], logits[rows], 1e-6 if device == "cpu" else 0)
        assert got[0].tolist() == logits[rows].argmax(axis=-1).tolist()
        sequences, tokens = ([of[b] for b in rows] for of in (points.sequences, points.tokens))
        np.testing.assert_array_equal(points.pair.draft(sequences, tokens, 1), got[0])


def test_the_likeliest_is_the_argmax_of_the_logits(emulated):
    _, points, (ids, _, _) = emulated
    np.testing.assert_array_equal(points.pair.draft(points.sequences, points.tokens), ids)


@pytest.mark.parametrize("device, n", [("cpu", 10_000), ("emulated", 200)])
def test_centroids_against_a_masked_dense_head(device, n):
    """The tokens of the six best centroids, found the long way round: logits of all tokens, all others masked."""
    pair = Pair(CASES[0], device)
    assistant = Assistant(pair.spec, pair.weights, pair.llm._core.step.layers, n, pair.lane)
    g = np.random.default_rng(1).standard_normal((n, pair.spec.hidden)).astype(pair.lane.dtype)
    got = np.empty(n, np.int32)
    assistant.likeliest(g, got)
    head, centroids = f64(pair.weights.head), f64(pair.weights.centroids)
    logits, scores = f64(g) @ head.T, f64(g) @ centroids.T
    is_picked = scores >= np.sort(scores, axis=1)[:, [-6]]
    centroid_of = np.empty(len(head), np.int64)
    for c, tokens in enumerate(pair.weights.ordering):
        centroid_of[tokens] = c
    want = np.where(is_picked[:, centroid_of], logits, -np.inf).argmax(axis=1)
    np.testing.assert_array_equal(got, want)
    assert (want != logits.argmax(axis=1)).mean() > 0.05            # the mask is felt


# --- what a round does to the lane

def test_with_centroids_no_vector_of_all_logits_is_made():
    pair = Pair(CASES[0], samples=False)
    names = []

    @contextmanager
    def around(name, args, kwargs):
        names.append(name)
        assert all(getattr(x, "shape", (0,))[-1] != pair.spec.vocab for x in args)
        yield
    pair.assistant.use(traced(pair.lane.ops, around))
    pair.draft([pair.cached([5, 6, 7])], [8], 2)
    assert names.count("candidate_argmax") == names.count("pick_centroids") == 2
    assert not {"sample", "candidate_logits"} & set(names)
    with pytest.raises(KeyError, match="logits"):
        pair.assistant.logits(np.zeros((1, 32), np.float32))


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_workspace_takes_what_was_planned(gpu, case, samples):
    pair = Pair(case, "cuda")
    with pair.lane.running():
        before = gpu.n_live_bytes
        assistant = Assistant(pair.spec, pair.weights, pair.llm._core.step.layers, 3, pair.lane, samples)
        taken = gpu.n_live_bytes - before
    planned = Assistant.n_bytes(pair.spec, 3, 2, samples) + 4 * sum(Assistant.scratch_size(pair.spec, 3, ops))
    assert planned <= taken <= planned + 4096 and assistant         # rules of greedy rows, frequencies of RoPE


@pytest.mark.parametrize("case", CASES)
def test_a_round_allocates_nothing_and_reads_nothing_back(gpu, case):
    """And can be captured: what a replay drafts is what an eager round does, wherever sequences have come to."""
    pair = Pair(case, "cuda", suppressed=(5,))
    points = Points.of(pair, case, [0, 3], 2)
    assistant, lane, rounds = pair.assistant, pair.lane, []
    with lane.running():
        for which in ([0, 2], [1, 3]):
            sequences = [points.sequences[b] for b in which]
            states = np.stack([one.task.hidden[one.n_cached - 1] for one in sequences]).astype(lane.dtype)
            rounds.append([lane.to_device(np.array([points.tokens[b] for b in which], np.int32)),
                           lane.to_device(states), pair.inputs(sequences, (0, 4)),
                           lane.to_device(np.zeros((4, 2), np.int32))])
        def draft(token, states, inputs, out):
            assistant.draft(token, states, inputs, 4, out)
        draft(*rounds[0])
        before = gpu.counts.copy()
        draft(*rounds[1])
        assert set(gpu.counts - before) == {"launches"}
        eager = [lane.to_host(out).copy() for *_, out in rounds]
        graph = lane.capture(lambda: draft(*rounds[0]))
        rounds[0][3].set(np.zeros((4, 2), np.int32), lane.stream)
        graph.launch(lane.stream)
        np.testing.assert_array_equal(lane.to_host(rounds[0][3]), eager[0])
    emulated = Pair(case, "emulated", suppressed=(5,))
    alike = Points.of(emulated, case, [0, 3], 2)
    for which, got in zip(([0, 2], [1, 3]), eager, strict=True):
        want = emulated.draft([alike.sequences[b] for b in which], [alike.tokens[b] for b in which])
        np.testing.assert_array_equal(got.T, want)
