"""A golden's target and its draft model, at any point of a text: for tests of what is drafted."""

from dataclasses import replace

import numpy as np

from engine import LLM
from engine.assistant import Assistant, DraftInputs
from engine.assistant_weights import load_assistant
from engine.batch import Batch, PagedBatch
from engine.kernels.paged import NO_ITEMS, PagedInputs, blocks, plan_drafts
from engine.models.gemma4_assistant import describe_assistant
from engine.sequence import Sequence
from engine.tasks import Probe
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests.golden import GOLDENS

MAX_SEQS = 8
SPARE = 5                   # positions behind the last committed one that a sequence has pages for


def put(array, values):
    """Writes a host array into one of any lane."""
    if hasattr(array, "set"):
        array.set(np.ascontiguousarray(values, array.dtype))
    else:
        array[...] = values


class Pair:
    """The checkpoints of a case of tests/goldens on a device.

    geometry   (pos_offset, extra_keys)
    config     the name of the draft's config file
    suppressed ids that are never drafted
    samples    of Assistant
    arguments  of LLM
    """

    def __init__(self, case, device="cpu", geometry=(0, 0), config="config.json", suppressed=(), samples=True,
                 **arguments):
        self.llm = LLM(GOLDENS / case / "checkpoint", device=device,
                       **{"max_seq_len": 256, "max_seqs": 8, "progress": False, **arguments})
        self.lane, self.kv_cache = self.llm.lane, self.llm.kv_cache
        path = GOLDENS / case / "assistant"
        spec = describe_assistant(Config.load(path, config), self.llm.spec, suppressed)
        self.spec = replace(spec, pos_offset=geometry[0], extra_keys=geometry[1])
        with self.lane.running(), Checkpoint.open(path) as checkpoint:
            self.weights = load_assistant(self.spec, checkpoint, self.lane, lambda n_bytes: None)
            self.assistant = Assistant(self.spec, self.weights, self.llm._core.step.layers, MAX_SEQS, self.lane,
                                       samples)

    def cached(self, tokens):
        """A Sequence with all its tokens in the cache, and pages for SPARE more; its states are in task.hidden."""
        tokens = list(map(int, tokens))
        task = Probe(len(tokens), len(tokens) - 1, self.llm.spec, True)
        sequence = Sequence(0, tokens, task, self.kv_cache.new_page_lists())
        while sequence.n_left:
            n = self.kv_cache.reserve(sequence, min(sequence.n_left, self.llm.config.max_batch_tokens))
            self.llm._core.step.run(Batch.build([(sequence, n)], self.kv_cache))
            sequence.n_cached += n
            self.kv_cache.trim(sequence)
        assert self.kv_cache.reserve(sequence, SPARE) == SPARE
        return sequence

    def inputs(self, sequences, spread=(0, 0)):
        """The DraftInputs at the ends of sequences. spread: how far P may be from there for all the host knows."""
        last = np.array([sequence.n_cached - 1 for sequence in sequences], np.int32)
        put, pools = self.lane.to_device, {}
        positions, context_lens = put(last), put(last + np.int32(1))
        for p, attention in self.assistant.attentions.items():
            paged = PagedBatch([sequence.page_lists[p].copy() for sequence in sequences], None, [],
                               self.kv_cache.page_size)
            if self.lane.stages:
                items = plan_drafts([(max(0, at - spread[0]), at + spread[1]) for at in last.tolist()],
                                    n_heads=attention.n_heads, n_kv_heads=attention.n_kv_heads,
                                    head_dim=attention.head_dim, window=attention.window)
                n_items = np.array([len(items)], np.int32)
                paged = PagedInputs(
                    slots=None, page_table=put(paged.page_table), page_begin=put(paged.page_begin),
                    context_lens=context_lens, cu_seqlens=put(np.arange(len(last) + 1, dtype=np.int32)),
                    last_visible=None, page_size=paged.page_size, decode_work=put(items), n_decode_work=put(n_items),
                    n_decode_blocks=blocks(len(items), attention.n_kv_heads), prefill_work=put(NO_ITEMS),
                    n_prefill_work=put(np.zeros(1, np.int32)), n_prefill_blocks=0)
            pools[p] = paged
        return DraftInputs(positions, context_lens, pools)

    def draft(self, sequences, next_tokens, n_steps=4, inputs=None, choose=None):
        """[n_seqs, n_steps] ids drafted behind next_tokens at the ends of sequences."""
        to_device = self.lane.to_device
        states = np.stack([sequence.task.hidden[sequence.n_cached - 1] for sequence in sequences])
        with self.lane.running():
            out = to_device(np.full((n_steps, len(sequences)), -1, np.int32))
            self.assistant.draft(to_device(np.array(next_tokens, np.int32)),
                                 to_device(states.astype(self.lane.dtype)),
                                 self.inputs(sequences) if inputs is None else inputs, n_steps, out, choose)
            return np.array(self.lane.to_host(out)).T

    def draft_logits(self, sequences, next_tokens, n_steps=4, inputs=None, forced=None):
        """([n_seqs, n_steps] ids, logits [n_seqs, n_steps, vocab], states of the draft [n_seqs, n_steps, hidden]); the
        ids are the argmax of the logits, on the host, or the `forced` ones."""
        seen, states, run = [], [], self.assistant.run

        def watched(*args):
            g = run(*args)
            states.append(np.array(self.lane.to_host(g)))
            return g

        def choose(s, logits, out):
            seen.append(np.array(self.lane.to_host(logits)))
            put(out, seen[-1].argmax(axis=1) if forced is None else forced[:, s])
        self.assistant.run = watched
        try:
            ids = self.draft(sequences, next_tokens, n_steps, inputs, choose)
        finally:
            del self.assistant.run
        return ids, np.stack(seen, axis=1), np.stack(states, axis=1)

    def pages(self, pool, layer):
        """(K, V) of a layer of the target, host copies [n_pages, page_size, n_kv_heads, head_dim]."""
        assert self.kv_cache.layer_slot[layer][0] == pool
        slot = self.kv_cache.layer_slot[layer][1]
        return tuple(np.array(self.lane.to_host(pages[pool][slot])) for pages in (self.kv_cache.k, self.kv_cache.v))

    def poison(self, sequence, value, before=None):
        """Writes `value` over every slot of the pools but those of positions 0..P of `sequence`; with `before`, in
        sliding pools also over those of positions below P - before."""
        for p, spec in enumerate(self.kv_cache.specs):
            held, size = sequence.page_lists[p], self.kv_cache.page_size
            least = 0 if spec.window is None or before is None else sequence.n_cached - 1 - before
            keep = [held.pages[at // size - held.first] * size + at % size
                    for at in range(max(least, held.first * size), sequence.n_cached)]
            for pages in (self.kv_cache.k[p], self.kv_cache.v[p]):
                values = np.array(self.lane.to_host(pages))
                flat = values.reshape(len(values), -1, *values.shape[3:])
                kept = flat[:, keep].copy()
                flat[...] = value
                flat[:, keep] = kept
                put(pages, values)
