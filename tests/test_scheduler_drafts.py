"""engine/scheduler.py where sequences have drafts: what they may take of a step and of the pages, and what is left when
they are rejected."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from tests.test_scheduler import REQUEST, check_pages, check_trimmed, run_history, scheduler_of, submit

MOST_DRAFTS = 16


class Memory:
    """What lies in each slot of each pool: (sequence, position, number of the write), so that a wrong page is noticed,
    and what a rejected draft left behind."""

    def __init__(self, kv_cache):
        self.kv_cache, self.slots, self.n_writes = kv_cache, [{} for _ in kv_cache.specs], 0
        self.valid = {}                                         # (sequence, position): number of the write

    def step(self, work, accepted):
        """Writes tokens and drafts, then reads what each of them attends to, and what a draft model does behind those
        accepted: `accepted` of each sequence."""
        batch = Batch.build(work, self.kv_cache)
        new = [(s.number, at) for s, n in work for at in range(s.n_cached, s.n_cached + n + len(s.drafts))]
        assert batch.positions.tolist() == [at for _, at in new]
        assert batch.token_ids.tolist() == [token for s, n in work
                                            for token in [*s.tokens[s.n_cached:s.n_cached + n], *s.drafts]]
        for key in new:
            self.n_writes += 1
            self.valid[key] = self.n_writes
        for spec, stored, paged in zip(self.kv_cache.specs, self.slots, batch.pools, strict=True):
            stored.update(zip(paged.slots.tolist(), [(*key, self.valid[key]) for key in new], strict=True))
            for i, (sequence, n) in enumerate(work):
                whole, known = sequence.n_cached + n + len(sequence.drafts), sequence.n_cached + n
                window = spec.window or whole
                last = known + accepted[sequence] - 1           # P: the draft model sees P - window and what follows
                for begin, end in ((sequence.n_cached - window + 1, whole), (last - window, last + 1)):
                    begin = max(0, begin)
                    read = [stored[slot + j] for slot, size in paged.runs(i, begin, end) for j in range(size)]
                    assert read == [(sequence.number, at, self.valid[sequence.number, at]) for at in range(begin, end)]
        for sequence, n in work:                                # whoever reads these again finds what is not valid
            for at in range(sequence.n_cached + n + accepted[sequence], sequence.n_cached + n + len(sequence.drafts)):
                self.valid[sequence.number, at] = None


def step(scheduler, memory, n_total, accept, draft):
    """One step. accept(n drafts) says how many of them hold; draft(most) how many are made then."""
    before = {s: len(s.drafts) for s in scheduler.running}
    work = scheduler.next_batch()
    assert work and {s for s, _ in work} == set(scheduler.running)
    assert all(1 <= n <= s.n_left for s, n in work)
    assert sum(n + len(s.drafts) for s, n in work) <= scheduler.max_batch_tokens
    assert all(n == s.n_left == 1 and len(s.drafts) <= before[s] for s, n in work if s.drafts)
    assert not any(s.drafts for s in scheduler.waiting)
    check_pages(scheduler)
    accepted = {s: accept(len(s.drafts)) for s, _ in work}
    memory.step(work, accepted)
    for sequence, n in work:
        if n == sequence.n_left and len(sequence.tokens) < n_total[sequence.number]:
            sequence.tokens += [0] * (accepted[sequence] + 1)
    scheduler.commit([(s, n + accepted[s]) for s, n in work])
    check_trimmed(scheduler, work)
    for sequence, _ in work:
        n_more = n_total[sequence.number] - len(sequence.tokens)
        sequence.drafts = list(range(100, 100 + draft(min(MOST_DRAFTS, max(0, n_more - 1))))) * (sequence.n_left == 1)
        if not sequence.n_left:
            scheduler.remove(sequence)
    check_pages(scheduler)
    return work


@settings(max_examples=500, deadline=None)
@given(
    windows=st.lists(st.none() | st.integers(1, 45), min_size=1, max_size=3), page_size=st.integers(1, 9),
    extra_pages=st.lists(st.integers(0, 9), min_size=3, max_size=3), max_seqs=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 40), requests=st.lists(REQUEST, min_size=1, max_size=6), data=st.data())
def test_any_history_with_drafts_ends_and_loses_nothing(windows, page_size, extra_pages, max_seqs, max_batch_tokens,
                                                        requests, data):
    """Random drafts, accepted and rejected, among random arrivals, lengths, aborts, pools and limits."""
    scheduler = scheduler_of(windows, page_size, 40, extra_pages[:len(windows)], max_seqs, max_batch_tokens)
    memory, rng = Memory(scheduler.kv_cache), data.draw(st.randoms(use_true_random=False))
    run_history(scheduler, requests, data, lambda n_total: step(
        scheduler, memory, n_total, lambda n: rng.randint(0, n), lambda most: rng.randint(0, most)))


def decoding(scheduler, *n_drafts, n_prompt=4):
    """Sequences behind their prompts, with so many drafts each."""
    sequences = [submit(scheduler, number, n_prompt) for number in range(len(n_drafts))]
    memory = Memory(scheduler.kv_cache)
    step(scheduler, memory, dict.fromkeys(range(9), 40), lambda n: 0, lambda most: 0)
    for sequence, n in zip(sequences, n_drafts, strict=True):
        sequence.drafts = list(range(n))
    return sequences


@pytest.mark.parametrize("n_drafts, max_batch_tokens, expected", [
    ((4, 4), 16, [4, 4]), ((4, 4), 10, [4, 4]), ((4, 4), 9, [3, 4]), ((4, 4), 8, [3, 3]), ((1, 8), 9, [1, 6]),
    ((8, 1, 8), 12, [4, 1, 4]), ((16, 16), 8, [3, 3]), ((5, 0), 9, [5, 0])])
def test_drafts_share_what_a_step_has_left(n_drafts, max_batch_tokens, expected):
    scheduler = scheduler_of(extra_pages=100, max_batch_tokens=max_batch_tokens, max_len=60)
    sequences = decoding(scheduler, *n_drafts, n_prompt=max_batch_tokens // len(n_drafts))
    assert dict(scheduler.next_batch()) == dict.fromkeys(sequences, 1)
    assert [len(sequence.drafts) for sequence in sequences] == expected
    assert all(sequence.drafts == list(range(n)) for sequence, n in zip(sequences, expected, strict=True))


def test_a_prompt_and_drafts_get_half_each_where_both_want_more():
    scheduler = scheduler_of(extra_pages=100, max_batch_tokens=12, max_len=60)
    sequences = decoding(scheduler, 8, 8)
    prompt = submit(scheduler, 5, 50)
    assert dict(scheduler.next_batch())[prompt] == 5
    assert [len(sequence.drafts) for sequence in sequences] == [2, 3]
    prompt.n_cached = 48                                        # it needs less than its half
    sequences[0].drafts, sequences[1].drafts = [0] * 8, [0] * 8
    assert dict(scheduler.next_batch())[prompt] == 2
    assert [len(sequence.drafts) for sequence in sequences] == [4, 4]


def test_nobody_is_preempted_for_drafts():
    """Pages for one more position of each: the drafts go, the sequences stay."""
    scheduler = scheduler_of(page_size=1, max_len=10, extra_pages=2)        # 12 pages
    sequences = decoding(scheduler, 3, 3)                                   # which hold 8
    assert dict(scheduler.next_batch()) == dict.fromkeys(sequences, 1)
    assert [len(sequence.drafts) for sequence in sequences] == [2, 0]       # two pages are left, the older one's
    assert scheduler.n_preemptions == 0 and scheduler.kv_cache.allocators[0].n_free == 0
    scheduler.commit([(sequence, 1) for sequence in sequences])             # all are rejected
    assert scheduler.kv_cache.allocators[0].n_free == 2


def test_a_preempted_sequence_has_no_drafts():
    scheduler = scheduler_of(page_size=1, max_len=10)                       # 10 pages
    older, newer = decoding(scheduler, 3, 2, n_prompt=5)
    assert dict(scheduler.next_batch()) == {older: 1}
    assert scheduler.waiting == [newer] and newer.drafts == [] and len(older.drafts) == 3
