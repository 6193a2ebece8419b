"""Sequences at the points where goldens have drafts, and what the definition makes of them."""

from dataclasses import dataclass

import numpy as np

from tests.draft_pair import Pair
from tests.golden import TOLERANCE, Golden
from tests.kernels.closeness import f64


def text_of(golden, i):
    return golden.prompts[i] + golden.greedy(i)


def points_of(golden, i):
    """[(n, next token)]: draft points of prompt i."""
    return list(zip(golden[f"p{i}.draft_prefix"].tolist(), golden[f"p{i}.draft_token"].tolist(), strict=True))


@dataclass
class Points:
    """Sequences of a Pair, and the token that follows each."""

    pair: Pair
    case: str
    sequences: list
    tokens: list

    @classmethod
    def of(cls, pair, case, prompts, n_points=2):
        """Up to the first draft points of some of the golden's prompts."""
        golden = Golden(case)
        wanted = [(i, *point) for i in prompts for point in points_of(golden, i)[:n_points]]
        sequences = [pair.cached(text_of(golden, i)[:n]) for i, n, _ in wanted]
        return cls(pair, case, sequences, [token for *_, token in wanted])

    def draft(self, rows=None, **more):
        rows = range(len(self.tokens)) if rows is None else rows
        return self.pair.draft_logits([self.sequences[b] for b in rows], [self.tokens[b] for b in rows], **more)

    def plain(self, b, of, n_steps=4, forced=None):
        """What a PlainDraft makes of point b."""
        pair, sequence = self.pair, self.sequences[b]
        last, kv = sequence.n_cached - 1, {}
        for layer, kind in zip(pair.spec.layers, of.text["layer_types"], strict=True):
            pool = pair.kv_cache.layer_slot[layer.kv_from][0]
            held, size = sequence.page_lists[pool], pair.kv_cache.page_size
            parts = []
            for pages in pair.pages(pool, layer.kv_from):
                rows = np.full((last + 1, *pages.shape[2:]), np.nan)
                for at in range(held.first * size, last + 1):
                    rows[at] = pages[held.pages[at // size - held.first], at % size]
                parts.append(rows)
            kv[kind] = tuple(parts)
        table = f64(pair.lane.to_host(pair.llm.weights.embed))
        scale = float(pair.lane.dtype.type(pair.llm.spec.embed_scale))
        return of.draft(lambda token: of.rounds((table[token] * scale).astype(of.dtype)), self.tokens[b],
                        sequence.task.hidden[last], kv, last, n_steps, forced)


def assert_close(got, want, tolerance=TOLERANCE):
    seen = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), seen)
    assert np.abs(got[seen] - want[seen]).max() <= tolerance * np.abs(want[seen]).max()
