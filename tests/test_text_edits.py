"""engine/text_edits.py: what grew with a text is what counting all of it again would find."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import LogitEdits
from engine.sampling_params import SamplingParams
from engine.tasks import Generation

IDS = st.integers(0, 11)
TEXT = st.lists(IDS, max_size=15)
PARAMS = st.builds(SamplingParams, repetition_penalty=st.sampled_from([1.0, 1.3]),
                   presence_penalty=st.sampled_from([0.0, 0.5]), frequency_penalty=st.sampled_from([0.0, -0.2]),
                   logit_bias=st.none() | st.dictionaries(IDS, st.sampled_from([-2.0, 3.0]), max_size=4),
                   min_tokens=st.integers(0, 9), stop_token_ids=st.lists(IDS, max_size=3))


def counted(params, prompt, output):
    """{token: (bias, is seen, occurrences, is banned)} of the row behind a text, for ids that a rule of it touches."""
    bias, counts = params.logit_bias or {}, Counter(output if params.has_penalties else ())
    seen = {*counts, *(prompt if params.repetition_penalty != 1 else ())}
    banned = {*params.stop_token_ids} if len(output) < params.min_tokens else set()
    return {token: (bias.get(token, 0), token in seen, counts[token], token in banned)
            for token in {*bias, *seen, *banned}}


def entries(edits, row):
    """{token: (bias, is seen, occurrences, is banned)} of a row of LogitEdits, but for entries that change nothing."""
    at = edits.row == row
    token = edits.token[at].tolist()
    columns = [column[at].tolist() for column in (edits.bias, edits.is_seen, edits.n_in_output, edits.is_banned)]
    found = dict(zip(token, zip(*columns, strict=True), strict=True))
    assert len(found) == len(token), "no id twice in a row"
    return {token: one for token, one in found.items() if any(one)}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_row_is_what_counting_again_finds(data):
    """Several texts that grow by a token, or by drafts that hold or do not; each step takes the rows of some."""
    requests = data.draw(st.lists(st.tuples(PARAMS, TEXT), min_size=1, max_size=3))
    tasks = [Generation(prompt, params, 0, (), None, 99) for params, prompt in requests]
    for _ in range(data.draw(st.integers(1, 6))):
        expected, rows = [], []
        for task, (params, prompt) in zip(tasks, requests, strict=True):
            drafts, output = data.draw(st.lists(IDS, max_size=3)), task.output.token_ids
            rows += task.edits(drafts)
            expected += [counted(params, prompt, [*output, *drafts[:n]]) for n in range(len(drafts) + 1)]
            n_accepted = data.draw(st.integers(0, len(drafts)))
            for token in (*drafts[:n_accepted], data.draw(IDS)):
                task.append(token, None)                        # the rows above stay what they were
        edits = LogitEdits.build(rows)
        for row, wanted in enumerate(expected):
            assert entries(edits, row) == wanted
        if any(expected):
            assert len(edits.repetition) == len(rows)


def test_rows_that_no_rule_touches_have_no_entries():
    """A graph without room for edits replays them, also once the ban of stop ids is over."""
    task = Generation([5, 6], SamplingParams(min_tokens=2, stop_token_ids=[7]), 0, (), None, 99)
    n_entries = []
    for token in (5, 5, 5):
        n_entries.append(len(LogitEdits.build(task.edits([6, 6])).token))
        task.append(token, None)
    assert n_entries == [2, 1, 0]


def test_a_step_does_not_read_the_text_again():
    class Text(list):
        n_reads = 0

        def __iter__(self):
            self.n_reads += 1
            return super().__iter__()
    prompt = Text(range(50))
    task = Generation(prompt, SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1), 0, (), None, 99)
    task.output.token_ids, n_reads = Text(), prompt.n_reads
    for token in range(40, 60):
        LogitEdits.build(task.edits([1, 2, 70]))
        task.append(token, None)
    assert prompt.n_reads == n_reads and not task.output.token_ids.n_reads
