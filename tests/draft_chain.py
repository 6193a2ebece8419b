"""A toy language: what follows depends on the last two tokens alone. Text with drafts is made through the ops of a
table, plain text by engine/sampler.py."""

from dataclasses import fields

import numpy as np

from engine import reference, sampler
from engine.accepted import Accepted
from engine.kernels.sampling import scratch_size
from engine.sampler import SamplingBatch
from engine.workspace import Scratch


class HostLane:
    """Where the twins run."""

    def put(self, array):
        return array

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    zeros = empty

    def to_host(self, array):
        return array


class Ops:
    """The ops of draft verification, from host arrays to host arrays; scratch is made anew, and must be clean again."""

    def __init__(self, table, lane):
        self.table, self.lane = table, lane

    def _batch(self, batch):
        return SamplingBatch(*(self.lane.put(getattr(batch, field.name)) for field in fields(SamplingBatch)))

    def _run(self, op, logits, *args, **kwargs):
        """With scratch for the logits, which stay as they are."""
        n_floats, n_counters = scratch_size(*logits.shape)
        scratch = Scratch(self.lane.empty(n_floats, np.float32), self.lane.zeros(n_counters, np.int32))
        device, before = self.lane.put(logits), logits.copy()
        getattr(self.table, op)(device, *args, scratch=scratch, **kwargs)
        if self.table is not reference:
            assert not self.lane.to_host(scratch.counters).any()
        assert (self.lane.to_host(device).view(np.int32) == before.view(np.int32)).all()

    def sample(self, logits, batch):
        out = self.lane.empty(len(logits), np.int32)
        self._run("sample", logits, self._batch(batch), out)
        return self.lane.to_host(out)

    def sample_drafts(self, logits, batch, positions=None, ahead=0):
        out, probs = self.lane.empty(len(logits), np.int32), self.lane.empty(logits.shape, np.float32)
        positions = None if positions is None else self.lane.put(positions)
        self._run("sample_drafts", logits, self._batch(batch), out, probs, positions=positions, ahead=ahead)
        return self.lane.to_host(out), self.lane.to_host(probs)

    def sample_with_drafts(self, logits, batch, drafts, draft_probs, prob_rows=None):
        out = self.lane.empty(len(logits), np.int32)
        prob_rows = None if prob_rows is None else self.lane.put(np.asarray(prob_rows, np.int32))
        self._run("sample_with_drafts", logits, self._batch(batch), self.lane.put(np.asarray(drafts, np.int32)),
                  self.lane.put(draft_probs), out, prob_rows=prob_rows)
        return self.lane.to_host(out)

    def relax_drafts(self, logits, drafts, is_relaxed, top_k, delta, tokens):
        out = self.lane.put(np.array(tokens, np.int32))
        self._run("relax_drafts", logits, self.lane.put(np.asarray(drafts, np.int32)),
                  self.lane.put(np.asarray(is_relaxed, bool)), top_k, delta, out)
        return self.lane.to_host(out)

    def accept_drafts(self, *arrays):
        """tokens, drafts, slot_begin, slot_rows, positions"""
        arrays = [self.lane.put(np.asarray(array, np.int32)) for array in arrays]
        out = Accepted(*(self.lane.empty(len(arrays[4]), np.int32) for _ in Accepted._fields))
        self.table.accept_drafts(*arrays, out)
        return Accepted(*map(self.lane.to_host, out))


HOST = Ops(reference, HostLane())


class Chain:
    """target, draft  [vocab, vocab, vocab] f32: logits of what follows two tokens; text begins after 0, 0."""

    def __init__(self, vocab, seed, scale=1.5, noise=1.0):
        rng = np.random.default_rng(seed)
        self.target = (rng.standard_normal((vocab,) * 3) * scale).astype(np.float32)
        self.draft = (self.target + rng.standard_normal((vocab,) * 3) * noise).astype(np.float32)

    def plain(self, rule, seed, n_tokens):
        text = [0, 0]
        while len(text) < n_tokens + 2:
            logits = self.target[text[-2], text[-1]][None]
            text += sampler.sample(logits, SamplingBatch.build([(rule, seed, len(text))])).tolist()
        return text[2:]

    def with_drafts(self, ops, rules, seeds, n_drafts, n_tokens, sampled):
        """(texts, accepted drafts in all) of a batch; n_drafts(step, sequence) says how many, `sampled` which rule."""
        texts, n_accepted, step = [[0, 0] for _ in rules], 0, 0
        while live := [b for b, text in enumerate(texts) if len(text) < n_tokens + 2]:
            drafts, probs, logits, rows = [], [], [], []
            for b in live:
                text = list(texts[b])
                for i in range(n_drafts(step, b)):
                    row, of_row = self.draft[text[-2], text[-1]][None], [(rules[b], seeds[b], len(text))]
                    if sampled:
                        (token,), (of_token,) = ops.sample_drafts(row, SamplingBatch.build(of_row),
                                                                  np.array([len(texts[b])], np.int32), i)
                    else:
                        token, of_token = row.argmax(), row[0]
                    logits.append(self.target[text[-2], text[-1]])
                    drafts.append(int(token))
                    probs.append(of_token)
                    rows.append(of_row[0])
                    text.append(int(token))
                logits.append(self.target[text[-2], text[-1]])
                drafts.append(-1)
                probs.append(np.full(len(self.target), np.nan, np.float32))
                rows.append((rules[b], seeds[b], len(text)))
            logits, batch = np.stack(logits), SamplingBatch.build(rows)
            tokens = ops.sample_with_drafts(logits, batch, drafts, np.stack(probs)) if sampled \
                else ops.sample(logits, batch)
            begin = np.cumsum([0, *(n_drafts(step, b) + 1 for b in live)])
            out = ops.accept_drafts(tokens, drafts, begin, np.arange(len(tokens)), [len(texts[b]) - 1 for b in live])
            for i, b in enumerate(live):
                n = int(out.n_accepted[i])
                texts[b] += [*drafts[begin[i]:begin[i] + n], int(out.next_token[i])]
                assert texts[b][-n - 1:] == tokens[begin[i]:begin[i] + n + 1].tolist()
                assert out.positions[i] == len(texts[b]) - 2 and out.context_lens[i] == len(texts[b]) - 1
                assert out.state_rows[i] == begin[i] + n
                n_accepted += n
            step += 1
        return [text[2:n_tokens + 2] for text in texts], n_accepted
