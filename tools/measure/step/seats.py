"""Sequences whose context counts as computed, so that a step at 32 k needs no prefill; a Core with room for them."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from engine.batch import Batch
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import MemoryPlanError
from engine.kv_cache import pool_specs
from engine.memory_plan import plan_memory, step_limits
from engine.sampler import NO_EDITS, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.tasks import Generation
from measure.random_weights import Values
from measure.report import BenchError

WARMUPS = 3             # steps before the first that counts: the second captures a graph, the third replays it
VERIFY = "verify"       # label of cases whose logits are wanted, and sampled, at every new token
FIRST_ID = 3            # below are pad, eos and bos
ENDLESS = 1 << 30
GROWTH, MOST_GROWTHS = 1.25, 4      # of kv_cache_bytes, until what the memory plan gives each pool is enough


@dataclass(frozen=True)
class Needs:
    """What a case asks of a Core.

    n_steps   decode steps that go on from its context
    n_drafts  tokens that the Core's draft model drafts in a step at most; None without one
    n_beyond  tokens that its prompts, computed, go on for with drafts and without; 0 where they do not
    """

    case: object
    n_steps: int
    max_positions: int
    max_batch_tokens: int
    n_drafts: int | None = None
    n_beyond: int = 0

    @property
    def is_one_step(self):
        return self.case.n_tokens <= self.max_batch_tokens

    @property
    def n_logits(self):
        """Rows of logits of the step."""
        return self.case.n_tokens if self.case.label == VERIFY else self.case.n_seqs

    @property
    def n_seats(self):
        """Sequences of the step. Without a draft model each row of logits takes the place of one."""
        return self.n_logits if self.n_drafts is None else self.case.n_seqs

    @property
    def step_tokens(self):
        """Tokens of its largest step, in chunks of max_batch_tokens. Where prompts are computed that then go on with
        drafts, at most half of a step are of sequences that have begun to."""
        if not self.n_beyond:
            return self.case.n_tokens
        n_prompt = sum(part.n_seqs * part.context for part in self.case.parts)
        return max(self.case.n_tokens, 2 * self.case.n_seqs * (1 + self.n_drafts), n_prompt)

    @property
    def first_context(self):
        """{part: positions in the cache after the first of the decode steps}."""
        return {part: min(part.context, self.max_positions - self.n_steps + 1) for part in self.case.parts}

    @property
    def longest_wanted(self):
        return max(self._length(part) for part in self.case.parts)

    @property
    def longest(self):
        return min(self.max_positions, self.longest_wanted)

    def _length(self, part):
        return part.context + max(self.n_steps if self.case.is_decode else 1, self.n_beyond)

    def pages(self, pool, size):
        """Pages of one pool that the case's sequences hold at once."""
        n_pages = 0
        for part in self.case.parts:
            n_new = min(part.context if self.n_beyond else part.n_query, self.max_batch_tokens)
            of_one = -(-min(self._length(part), self.max_positions) // size)
            n_pages += part.n_seqs * (min(of_one, pool.live_pages(n_new, size)) if pool.is_local else of_one)
        return n_pages

    def rows(self):
        """As engine.cost.floor takes them, with the logits of each sequence."""
        return [(*row, row[1] if self.case.label == VERIFY else 1) for row in self.case.rows]


def config_of(spec, needs, lane, options, draft=None):
    """An EngineConfig with room for each of `needs`, one at a time.

    options  further fields of it
    draft    AssistantSpec, or None
    Raises MemoryPlanError where the memory does not hold them.
    """
    most_tokens = min(needs[0].max_batch_tokens, max(need.step_tokens for need in needs))
    config = EngineConfig(max_seqs=max(need.n_seats for need in needs if need.is_one_step or need.case.is_prompt),
                          max_seq_len=max(need.longest for need in needs), max_batch_tokens=most_tokens,
                          progress=False, **options)
    pools, memory = pool_specs(spec), lane.memory_bytes()
    longest_run, _ = step_limits(spec, config, config.max_seq_len)          # the plan wants room for one picture
    wanted = [max(pool.pages_needed(config.max_seq_len, config.page_size, longest_run),
                  *(need.pages(pool, config.page_size) for need in needs)) for pool in pools]
    n_bytes = sum(n * config.page_size * pool.token_bytes(lane.dtype.itemsize)
                  for n, pool in zip(wanted, pools, strict=True))
    for _ in range(MOST_GROWTHS):
        config = replace(config, kv_cache_bytes=n_bytes)
        plan = plan_memory(spec, config, lane.name, memory, draft)
        if all(pool.n_pages >= n for pool, n in zip(plan.pools, wanted, strict=True)):
            break
        n_bytes = int(n_bytes * GROWTH) + 1
    return config


def open_core(name, spec, needs, lane, checkpoint, report, options, seed, draft=None):
    """(Core whose cache is full of random numbers, the needs it can meet). What is too large for the memory is skipped.

    name   of the model, for what is skipped
    draft  (AssistantSpec, its checkpoint), where `options` name a draft model
    Raises ConfigError, and MemoryPlanError where nothing is left.
    """
    needs = list(needs)
    while True:
        try:
            config = config_of(spec, needs, lane, options, draft and draft[0])
            break
        except MemoryPlanError as error:
            if len(needs) == 1:
                raise
            largest = max(needs, key=lambda need: sum(
                need.pages(pool, 1) * pool.token_bytes(1) for pool in pool_specs(spec)))
            report.skip(f"{name}: {largest.case}", error)
            needs.remove(largest)
    core = Core.open(spec, config, lane, checkpoint, lambda n_bytes: report.bar(n_bytes, "weights"), draft)
    if core.control:
        core.control.wanted = 0                         # drafts are asked for where they are measured
    with lane.running():
        fill_cache(core, seed)
    return core, needs


def fill_cache(core, seed):
    """Every position of the KV cache gets random K and V, of the size of normed heads."""
    values = Values(seed)
    with core.lane.loading() as fill:
        for number, array in enumerate((*core.kv_cache.k, *core.kv_cache.v)):
            fill(array, lambda begin, end, out, n=number, size=array.size: values.write(out, begin, n, size))


def random_tokens(spec, rng, n):
    return rng.integers(min(FIRST_ID, spec.vocab - 1), spec.vocab, n).tolist()


def submit(core, tokens):
    """A greedy Sequence without end, waiting to be scheduled."""
    params = SamplingParams(max_tokens=ENDLESS, temperature=0, ignore_eos=True)
    return core.loop.submit(tokens, Generation(tokens, params, 0, (), None, ENDLESS))


def seat(core, tokens, n_cached):
    """A running sequence of `tokens`, the first n_cached of which count as computed. It holds the pages that it would
    hold then. Raises BenchError where they are not free."""
    cache = core.kv_cache
    firsts = [spec.first_live(n_cached) // cache.page_size for spec in cache.specs]
    counts = [-(-n_cached // cache.page_size) - first for first in firsts]
    for spec, pages, n in zip(cache.specs, cache.allocators, counts, strict=True):
        if n > pages.n_free:
            raise BenchError(f"the KV cache has {pages.n_free} free pages of {spec.kind}, a sequence needs {n}")
    sequence = submit(core, tokens)
    core.scheduler.waiting.remove(sequence)
    core.scheduler.running.append(sequence)
    for held, pages, first, n in zip(sequence.page_lists, cache.allocators, firsts, counts, strict=True):
        held.first = first
        held.pages.extend(pages.allocate(n))
    sequence.n_cached = n_cached
    return sequence


@contextmanager
def seated(core, parts, rng):
    """The sequences of [(n_seqs, n_query, context)], running, all but n_query tokens of each computed. They leave when
    the context ends."""
    sequences = []
    try:
        for n_seqs, n_query, context in parts:
            for _ in range(n_seqs):
                sequences.append(seat(core, random_tokens(core.spec, rng, context), context - n_query))
        yield sequences
    finally:
        for sequence in sequences:
            core.loop.withdraw(sequence)


def step_of(core, sequences, is_verify):
    """build() -> the Batch of a step that computes what is left of each sequence, the same one every time. With a draft
    model, is_verify makes all that is left but the first token drafts, which are checked, and as many drafted anew."""
    if is_verify and core.draft:
        return _checking_step(core, sequences)
    work = [(sequence, sequence.n_left) for sequence in sequences]
    for sequence, n in work:
        if core.kv_cache.reserve(sequence, n) < n:
            raise BenchError(f"the KV cache has no room for {n} tokens of a sequence at {sequence.n_cached}")
        if is_verify:
            sequence.next_logit = sequence.n_cached

    def build():
        batch = Batch.build(work, core.kv_cache)
        return every_row_sampled(batch) if is_verify else batch
    return build


def _checking_step(core, sequences):
    counts = {}
    for sequence in sequences:
        n = sequence.n_left - 1
        if core.kv_cache.reserve(sequence, 1 + n) < 1 + n:
            raise BenchError(f"the KV cache has no room for {1 + n} tokens of a sequence at {sequence.n_cached}")
        sequence.drafts, sequence.draft_rows = sequence.tokens[len(sequence.tokens) - n:], range(n)
        del sequence.tokens[len(sequence.tokens) - n:]
        sequence.next_logit = sequence.n_cached
        counts[sequence] = n
    return lambda: Batch.build([(sequence, 1) for sequence in sequences], core.kv_cache, wanted=counts.get)


def every_row_sampled(batch):
    """The batch with a next token for each of its rows, as checking drafted tokens wants them."""
    rows = [(sequence, row) for sequence, begin, end, _ in batch.spans for row in range(begin, end)]
    return replace(batch, to_take=[], take_next=np.empty(0, np.int32), to_sample=rows, edits=NO_EDITS,
                   sampling=SamplingBatch.build(sequence.task.rule() for sequence, _ in rows))
