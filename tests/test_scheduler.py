"""engine/scheduler.py over a real KVCache and no model: every history ends, no page is lost, mixed up or missing."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.kv_cache import KVCache, PoolSpec
from engine.scheduler import Scheduler
from engine.sequence import MediaRun, Sequence
from engine.vision.encoder_cache import EncoderCache
from tests.fake_encoder import FakeEncoder, assert_soft_tokens, picture

LANE = SimpleNamespace(empty=lambda shape: np.empty(shape, np.int8))
MOST = 12           # soft tokens of a picture at most


def scheduler_of(windows=(None,), page_size=4, max_len=40, extra_pages=0, max_seqs=4, max_batch_tokens=16,
                 sees_blocks=None):
    """Pools that hold one sequence of max_len tokens, and `extra_pages` more.

    sees_blocks  of each pool, and there are pictures; None is a model of text
    """
    sees = sees_blocks or [False] * len(windows)
    specs = [PoolSpec(window, 1, 1, (i,), sees_blocks=blocks)
             for i, (window, blocks) in enumerate(zip(windows, sees, strict=True))]
    longest_run = MOST if any(sees) else 1
    extra = [extra_pages] * len(specs) if isinstance(extra_pages, int) else extra_pages
    n_pages = [spec.pages_needed(max_len, page_size, longest_run) + more
               for spec, more in zip(specs, extra, strict=True)]
    max_step_tokens = max(max_batch_tokens, max_seqs + MOST) if any(sees) else max_batch_tokens
    encoder_cache = None
    if sees_blocks is not None:
        spec = SimpleNamespace(has_blocks=any(sees), hidden=1)
        n_rows = EncoderCache.n_rows(spec, max_step_tokens, MOST, 0, 8)
        encoder_cache = EncoderCache(FakeEncoder(), n_rows, 2, SimpleNamespace(empty=np.zeros))
    return Scheduler(KVCache(specs, n_pages, page_size, LANE), max_seqs, max_batch_tokens, max_step_tokens,
                     encoder_cache)


def submit(scheduler, number, n_prompt, media=()):
    task = SimpleNamespace(first_logit=n_prompt - 1, hidden=None, samples=False)
    sequence = Sequence(number, [0] * n_prompt, task, scheduler.kv_cache.new_page_lists(), media)
    scheduler.add(sequence)
    return sequence


class Memory:
    """What lies in each slot of each pool: (sequence number, position), so that a wrong page is noticed when read."""

    def __init__(self, kv_cache, encoder_cache=None):
        self.kv_cache, self.slots, self.encoder_cache = kv_cache, [{} for _ in kv_cache.specs], encoder_cache

    def step(self, work):
        """Writes the new tokens' slots, then reads every position that any of them attends to, and all that stands for
        pictures."""
        batch = Batch.build(work, self.kv_cache)
        if batch.media:
            assert_soft_tokens(self.encoder_cache, batch.media)
        new = [(s.number, position) for s, n in work for position in range(s.n_cached, s.n_cached + n)]
        for spec, stored, paged in zip(self.kv_cache.specs, self.slots, batch.pools, strict=True):
            stored.update(zip(paged.slots.tolist(), new, strict=True))
            for i, (sequence, n) in enumerate(work):
                end = sequence.n_cached + n
                oldest = 0 if spec.window is None else max(0, sequence.n_cached - spec.window + 1)
                read = [stored[slot + j] for slot, size in paged.runs(i, oldest, end) for j in range(size)]
                assert read == [(sequence.number, position) for position in range(oldest, end)]


def check_pages(scheduler):
    """Every page is free, or belongs to one running sequence."""
    for p, allocator in enumerate(scheduler.kv_cache.allocators):
        held = [page for s in scheduler.running for page in s.page_lists[p].pages]
        assert len(set(held)) == len(held) and len(held) + allocator.n_free == allocator.n_pages
    assert all(not held.pages for s in scheduler.waiting for held in s.page_lists)


def check_trimmed(scheduler, work):
    """A sliding pool keeps the pages from P - W on and no others, P being the last committed position."""
    size = scheduler.kv_cache.page_size
    for sequence, _ in work:
        for spec, held in zip(scheduler.kv_cache.specs, sequence.page_lists, strict=True):
            oldest = 0 if spec.window is None else max(0, sequence.n_cached - 1 - spec.window)
            assert held.first == oldest // size
            assert held.first + len(held.pages) == -(-sequence.n_cached // size)


def check_size(scheduler, work):
    """A step is larger than it should be for the sake of one run only, which is all that its sequence gets; where
    layers see blocks no run is split."""
    n_tokens = sum(n for _, n in work)
    assert n_tokens <= scheduler.max_step_tokens
    if n_tokens > scheduler.max_batch_tokens:
        assert any((s.n_cached, s.n_cached + n) == (run.begin, run.end) and n_tokens - n < scheduler.max_batch_tokens
                   for s, n in work for run in s.media)
    if any(pool.sees_blocks for pool in scheduler.kv_cache.specs):
        assert not any(run.begin < s.n_cached + n < run.end for s, n in work for run in s.media)


def step(scheduler, memory, n_total):
    """One step; sequences that reached n_total[number] tokens leave. Returns the work done."""
    work = scheduler.next_batch()
    assert work, "a step with nothing in it, though a sequence is left"
    check_size(scheduler, work)
    assert len(scheduler.running) <= scheduler.max_seqs
    assert all(1 <= n <= s.n_left for s, n in work)
    assert {s for s, _ in work} == set(scheduler.running), "a running sequence was left out of a step"
    check_pages(scheduler)
    memory.step(work)
    scheduler.commit(work)
    check_trimmed(scheduler, work)
    for sequence, _ in work:
        if not sequence.n_left and len(sequence.tokens) < n_total[sequence.number]:
            sequence.tokens.append(0)
        elif not sequence.n_left:
            scheduler.remove(sequence)
    check_pages(scheduler)
    return work


REQUEST = st.fixed_dictionaries({
    "arrival": st.integers(0, 25), "n_prompt": st.integers(1, 40), "n_generated": st.integers(0, 12),
    "abort_after": st.none() | st.none() | st.integers(0, 12)})


@settings(max_examples=1000, deadline=None)
@given(
    windows=st.lists(st.none() | st.integers(1, 45), min_size=1, max_size=3), page_size=st.integers(1, 9),
    extra_pages=st.lists(st.integers(0, 9), min_size=3, max_size=3), max_seqs=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 24), requests=st.lists(REQUEST, min_size=1, max_size=6), data=st.data())
def test_any_history_ends_and_loses_nothing(windows, page_size, extra_pages, max_seqs, max_batch_tokens, requests,
                                            data):
    """Random arrivals, lengths, aborts, pools and limits: no deadlock, no leak, and each token finds its own past."""
    scheduler = scheduler_of(windows, page_size, 40, extra_pages[:len(windows)], max_seqs, max_batch_tokens)
    run_history(scheduler, requests, data)


def run_history(scheduler, requests, data, take_step=None):
    """Runs requests to their ends, in steps that are checked, by take_step(n_total) or step(); nobody holds anything
    afterwards."""
    take_step = take_step or partial(step, scheduler, Memory(scheduler.kv_cache, scheduler.encoder_cache))
    numbers = data.draw(st.permutations(range(len(requests))))      # a stream may begin after a later submission
    n_total = {number: min(40, request["n_prompt"] + request["n_generated"])
               for number, request in zip(numbers, requests, strict=True)}
    pending, live = list(zip(numbers, requests, strict=True)), {}
    limit = 40 + (scheduler.max_seqs + 1) * sum(n_total.values())
    for now in range(limit):
        for number, request in [one for one in pending if one[1]["arrival"] <= now]:
            pending.remove((number, request))
            live[number] = submit(scheduler, number, request["n_prompt"], runs_of(request)), request["abort_after"], now
        for number, (sequence, abort_after, since) in list(live.items()):
            if sequence not in scheduler.running and sequence not in scheduler.waiting:
                assert len(sequence.tokens) == n_total[number] == sequence.n_cached
                del live[number]
            elif abort_after is not None and now - since >= abort_after:
                scheduler.remove(sequence)
                del live[number]
        if live:
            take_step(n_total)
        elif not pending:
            break
    assert not live and not pending, f"not done after {limit} steps"
    assert not scheduler.running and not scheduler.waiting
    assert all(allocator.n_free == allocator.n_pages for allocator in scheduler.kv_cache.allocators)
    assert scheduler.encoder_cache is None or scheduler.encoder_cache.stats()["held_pictures"] == 0


def runs_of(request):
    """The MediaRuns of a request: its pictures as (tokens before it, its name, its soft tokens), while they fit."""
    runs, at = [], 0
    for gap, name, n in request.get("pictures", ()):
        if at + gap + n <= request["n_prompt"]:
            runs.append(MediaRun(at + gap, picture(name, n)))
            at = runs[-1].end
    return runs


PICTURES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.integers(1, MOST)), max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    pools=st.lists(st.tuples(st.none() | st.integers(1, 45), st.booleans()), min_size=1, max_size=3),
    page_size=st.integers(1, 9), extra_pages=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    max_seqs=st.integers(1, 5), max_batch_tokens=st.integers(1, 24), data=st.data(),
    requests=st.lists(st.tuples(REQUEST, PICTURES).map(lambda pair: {**pair[0], "pictures": pair[1]}),
                      min_size=1, max_size=6))
def test_any_history_with_pictures_ends_and_loses_nothing(pools, page_size, extra_pages, max_seqs, max_batch_tokens,
                                                          requests, data):
    """Besides: no picture is split where layers see all of it, soft tokens are those of the right picture in a cache
    with room for no more than a step, and no picture is held in the end."""
    windows, sees_blocks = zip(*pools, strict=True)
    run_history(scheduler_of(windows, page_size, 40, extra_pages[:len(pools)], max_seqs, max_batch_tokens, sees_blocks),
                requests, data)


def test_decoding_goes_on_beside_a_long_prompt():
    """Chunks of a prompt fill what the decodes leave of a step; no decode waits for the prompt."""
    scheduler = scheduler_of(extra_pages=100, max_batch_tokens=8, max_len=200)
    memory = Memory(scheduler.kv_cache)
    n_total = {0: 60, 1: 60, 2: 100}
    decoding = [submit(scheduler, 0, 2), submit(scheduler, 1, 3)]
    step(scheduler, memory, n_total)
    prompt = submit(scheduler, 2, 100)
    for _ in range(10):
        work = dict(step(scheduler, memory, n_total))
        assert [work[s] for s in decoding] == [1, 1] and work[prompt] == 6


@pytest.mark.parametrize("max_batch_tokens", [1, 3])
def test_fewer_tokens_than_sequences(max_batch_tokens):
    """A budget below max_seqs: as many sequences run as can all go on in every step, the others follow in order."""
    scheduler = scheduler_of(extra_pages=100, max_seqs=8, max_batch_tokens=max_batch_tokens)
    memory, n_total = Memory(scheduler.kv_cache), dict.fromkeys(range(8), 5)
    for number in range(8):
        submit(scheduler, number, 2)
    ended = []
    while scheduler.running or scheduler.waiting:
        running = list(scheduler.running)
        step(scheduler, memory, n_total)
        assert len(scheduler.running) <= max_batch_tokens
        ended += [s.number for s in running if s not in scheduler.running]
    assert ended == list(range(8))


def test_the_newest_is_preempted_and_comes_back_first():
    scheduler = scheduler_of(page_size=1, max_len=10, extra_pages=2)        # 12 pages
    memory, n_total = Memory(scheduler.kv_cache), dict.fromkeys(range(4), 10)
    first, second, third = (submit(scheduler, number, 4) for number in range(3))
    step(scheduler, memory, n_total)
    assert scheduler.running == [first, second, third] and scheduler.kv_cache.allocators[0].n_free == 0
    last = submit(scheduler, 3, 1)
    step(scheduler, memory, n_total)
    assert scheduler.running == [first, second] and scheduler.waiting == [third, last]
    assert scheduler.n_preemptions == third.n_preemptions == 1 and third.n_cached == 0
    assert len(third.tokens) == 5                                           # what it generated is not lost
    while third in scheduler.waiting:
        assert last not in scheduler.running                                # no overtaking
        step(scheduler, memory, n_total)


def test_a_preempted_sequence_leaves_the_step_it_was_in():
    """An older sequence that came late needs the pages of a decode that this step had planned already."""
    scheduler = scheduler_of(page_size=1, max_len=13, max_batch_tokens=3)
    memory, n_total = Memory(scheduler.kv_cache), {1: 10, 5: 13}
    newer = submit(scheduler, 5, 3)
    for _ in range(4):
        step(scheduler, memory, n_total)
    older = submit(scheduler, 1, 6)
    for _ in range(2):
        assert dict(step(scheduler, memory, n_total)) == {newer: 1, older: 2}
    assert dict(step(scheduler, memory, n_total)) == {older: 2}
    assert scheduler.waiting == [newer] and newer.n_cached == 0 and len(newer.tokens) == 9


def test_admission_is_in_order_of_submission():
    """A long prompt that does not fit yet is not overtaken by a short one behind it."""
    scheduler = scheduler_of(page_size=1, max_len=20)
    memory, n_total = Memory(scheduler.kv_cache), {0: 14, 1: 16, 2: 2}
    submit(scheduler, 0, 12)
    long, short = submit(scheduler, 1, 15), submit(scheduler, 2, 1)
    step(scheduler, memory, n_total)
    assert scheduler.waiting == [long, short]


def test_a_sequence_left_out_of_a_failed_step_goes_on():
    """Pages reserved for a step that was never committed are used by the next one, not taken again."""
    scheduler = scheduler_of(windows=(None, 3), page_size=2, max_len=12)
    memory, n_total = Memory(scheduler.kv_cache), {0: 12}
    submit(scheduler, 0, 9)
    before = scheduler.next_batch()
    free = [allocator.n_free for allocator in scheduler.kv_cache.allocators]
    assert scheduler.next_batch() == before
    assert [allocator.n_free for allocator in scheduler.kv_cache.allocators] == free
    while scheduler.running:
        step(scheduler, memory, n_total)
    check_pages(scheduler)


# --- pictures that are not split

def chunks(scheduler, *sequences):
    """The tokens of each sequence in each step until all are through with their prompts."""
    memory, n_total, steps = Memory(scheduler.kv_cache, scheduler.encoder_cache), dict.fromkeys(range(9), 40), []
    while any(s.n_cached < s.task.first_logit + 1 for s in sequences):
        work = dict(step(scheduler, memory, n_total))
        steps.append([work.get(s, 0) for s in sequences])
    return steps


@pytest.mark.parametrize(("max_batch_tokens", "begin", "n", "expected"), [
    (1, 2, 5, [1, 1, 5, 1, 1, 1]), (4, 2, 5, [2, 5, 3]), (4, 0, 5, [5, 4, 1]), (4, 5, 5, [4, 1, 5]),
    (4, 4, 6, [4, 6]), (6, 2, 5, [2, 6, 2]), (7, 2, 5, [7, 3]), (8, 2, 5, [8, 2]), (4, 0, 10, [10]),
    (16, 0, 10, [10])])
def test_a_chunk_ends_before_a_run_or_holds_it_whole(max_batch_tokens, begin, n, expected):
    """Ten tokens, soft tokens at begin..begin + n; where pictures may be split, chunks are what the budget says."""
    media = [MediaRun(begin, picture("a", n))]
    scheduler = scheduler_of((None,), max_batch_tokens=max_batch_tokens, sees_blocks=[True])
    assert chunks(scheduler, submit(scheduler, 0, 10, media)) == [[n] for n in expected]
    scheduler = scheduler_of((None,), max_batch_tokens=max_batch_tokens, sees_blocks=[False])
    plain = [min(max_batch_tokens, 10 - at) for at in range(0, 10, max_batch_tokens)]
    assert chunks(scheduler, submit(scheduler, 0, 10, media)) == [[n] for n in plain]


def test_a_run_grows_past_a_budget_that_decodes_have_almost_filled():
    """Three decodes and a budget of four: the fourth prompt's picture of 12 does not wait for them to end."""
    scheduler = scheduler_of(extra_pages=100, max_seqs=4, max_batch_tokens=4, sees_blocks=[True])
    memory, n_total = Memory(scheduler.kv_cache, scheduler.encoder_cache), dict.fromkeys(range(4), 40)
    decoding = [submit(scheduler, number, 1) for number in range(3)]
    step(scheduler, memory, n_total)
    prompt = submit(scheduler, 3, 14, [MediaRun(1, picture("a", 12))])
    assert [dict(step(scheduler, memory, n_total))[prompt] for _ in range(3)] == [1, 12, 1]
    assert all(s.n_cached == 4 for s in decoding)


def test_a_run_at_the_start_of_a_new_prompt_waits_for_a_step_that_has_room():
    """A prompt has filled the step so far that the next one's picture does not fit in what memory is laid out for."""
    scheduler = scheduler_of(extra_pages=100, max_seqs=2, max_batch_tokens=8, sees_blocks=[True])     # 14 tokens a step
    first, second = submit(scheduler, 0, 7), submit(scheduler, 1, 13, [MediaRun(0, picture("a", 12))])
    assert chunks(scheduler, first, second) == [[7, 0], [1, 12], [1, 1]]


def test_a_prompt_that_stops_before_a_picture_lets_no_other_in():
    """What is left of the budget is given to no new prompt: at most one is in the middle."""
    scheduler = scheduler_of(extra_pages=100, max_batch_tokens=8, sees_blocks=[True])
    first, second = submit(scheduler, 0, 13, [MediaRun(2, picture("a", 11))]), submit(scheduler, 1, 3)
    assert chunks(scheduler, first, second) == [[2, 0], [11, 0], [1, 3]]


def test_a_run_without_pages_preempts_newer_sequences():
    """Pages for half a picture are no use: a newer sequence gives back its own, and the picture is computed whole."""
    scheduler = scheduler_of(page_size=1, max_len=16, max_seqs=2, max_batch_tokens=3, sees_blocks=[True])   # 16 pages
    memory, n_total = Memory(scheduler.kv_cache, scheduler.encoder_cache), {0: 16, 1: 16}
    newer = submit(scheduler, 1, 1)
    step(scheduler, memory, n_total)
    older = submit(scheduler, 0, 14, [MediaRun(2, picture("a", 12))])
    assert dict(step(scheduler, memory, n_total)) == {newer: 1, older: 2}
    assert dict(step(scheduler, memory, n_total)) == {older: 12}
    assert scheduler.waiting == [newer] and newer.n_preemptions == 1
    while scheduler.running:
        step(scheduler, memory, n_total)
    check_pages(scheduler)


def test_a_preempted_sequence_holds_no_picture():
    """It would keep what others need from being the first to go, for as long as it waits."""
    scheduler = scheduler_of(page_size=1, max_len=16, max_seqs=2, max_batch_tokens=3, sees_blocks=[True])   # 16 pages
    memory, n_total = Memory(scheduler.kv_cache, scheduler.encoder_cache), {0: 16, 1: 16}
    newer = submit(scheduler, 1, 3, [MediaRun(0, picture("b", 2))])
    step(scheduler, memory, n_total)
    assert scheduler.encoder_cache.stats()["held_pictures"] == 1
    submit(scheduler, 0, 12, [MediaRun(2, picture("a", 10))])
    for _ in range(2):
        step(scheduler, memory, n_total)
    assert scheduler.waiting == [newer]
    assert scheduler.encoder_cache.stats()["held_pictures"] == 1            # the other's


def test_a_sliding_pool_holds_the_window_and_a_whole_run():
    """A window of 3 and a run of 12 behind it, in pages of 4: no page is missing, and there are no more than that."""
    scheduler = scheduler_of((3, None), max_len=40, max_batch_tokens=2, max_seqs=1, sees_blocks=[True, False])
    sliding = scheduler.kv_cache.allocators[0]
    assert sliding.n_pages == 5                                 # positions P - 3 to P + 12, wherever a page begins
    sequence = submit(scheduler, 0, 40, [MediaRun(19, picture("a", 12))])
    memory, most = Memory(scheduler.kv_cache, scheduler.encoder_cache), 0
    while scheduler.running or scheduler.waiting:
        work = scheduler.next_batch()
        most = max(most, sliding.n_pages - sliding.n_free)
        memory.step(work)
        scheduler.commit(work)
        if not sequence.n_left:
            scheduler.remove(sequence)
    assert most == 5


def test_a_prompt_waits_until_a_sliding_pool_has_pages_for_its_picture():
    """Another sequence leaves 11 of 16 pages: more than the window of 3 takes, fewer than a run of 12."""
    scheduler = scheduler_of((3, None), page_size=1, extra_pages=(0, 40), max_seqs=2, sees_blocks=[True, False])
    memory, n_total = Memory(scheduler.kv_cache, scheduler.encoder_cache), {0: 10, 1: 14}
    submit(scheduler, 0, 8)
    step(scheduler, memory, n_total)
    prompt = submit(scheduler, 1, 13, [MediaRun(0, picture("a", 12))])
    n_new = [dict(step(scheduler, memory, n_total)).get(prompt, 0) for _ in range(3)]
    assert n_new == [0, 0, 13] and prompt.n_preemptions == 0


def test_a_step_may_begin_in_a_picture_and_end_in_another():
    """Where pictures may be split, two tokens a step come to 23 soft tokens: the cache has room for both pictures."""
    scheduler = scheduler_of(max_batch_tokens=2, sees_blocks=[False])
    sequence = submit(scheduler, 0, 23, [MediaRun(0, picture("a", 11)), MediaRun(11, picture("b", 12))])
    assert chunks(scheduler, sequence) == [[2]] * 11 + [[1]]
    assert scheduler.encoder_cache.stats()["encoded_tokens"] == 23
