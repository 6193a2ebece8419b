"""LogitEdits of engine/sampler.py against brute force."""

import numpy as np
import pytest

from engine.sampler import LogitEdits, apply_edits
from engine.sampling_params import SamplingParams
from engine.text_edits import TextEdits


def edits_of(*rows):
    """LogitEdits of (SamplingParams, prompt ids, output ids, banned ids) per row."""
    def row_of(params, prompt, output, banned):
        text = TextEdits(params, prompt, banned)
        for token in output:
            text.append(token)
        return text.rows(n_banned=1)[0]
    return LogitEdits.build(row_of(*row) for row in rows)


def brute_force_edits(logits, rows):
    """The rule of apply_edits, a scalar at a time in float32."""
    f32 = np.float32
    for line, (params, prompt, output, banned) in zip(logits, rows, strict=True):
        for token in range(len(line)):
            x = f32(line[token] + f32((params.logit_bias or {}).get(token, 0)))
            if token in prompt or token in output:
                x = f32(x / f32(params.repetition_penalty)) if x > 0 else f32(x * f32(params.repetition_penalty))
            n = output.count(token)
            x = f32(x - f32(f32(params.frequency_penalty) * f32(n)))
            x = f32(x - f32(params.presence_penalty if n else 0))
            line[token] = -np.inf if token in banned else x


@pytest.mark.parametrize("seed", range(20))
def test_edits_match_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(5):
        bias = {int(t): float(rng.normal()) for t in rng.choice(30, 4, replace=False)} if rng.random() < 0.5 else None
        params = SamplingParams(repetition_penalty=float(rng.choice([1, 0.7, 1.3])), logit_bias=bias,
                                presence_penalty=float(rng.choice([0, 0.5, -0.5])),
                                frequency_penalty=float(rng.choice([0, 0.3])))
        prompt, output = (rng.integers(0, 30, n).tolist() for n in rng.integers(0, 25, 2))
        rows.append((params, prompt, output, frozenset(rng.integers(0, 30, rng.integers(0, 3)).tolist())))
    logits = (rng.standard_normal((5, 30)) * 5).astype(np.float32)
    want = logits.copy()
    brute_force_edits(want, rows)
    apply_edits(logits, edits_of(*rows))
    assert (logits.view(np.int32) == want.view(np.int32)).all()


def test_rows_without_edits_keep_their_logits():
    logits = np.random.default_rng(0).standard_normal((2, 20), np.float32)
    before = logits.copy()
    apply_edits(logits, edits_of(*[(SamplingParams(), [1, 2], [3], ())] * 2))
    assert (logits == before).all()
    apply_edits(logits, edits_of((SamplingParams(), [1, 2], [3], ()), (SamplingParams(), [1], [3], [7])))
    assert logits[1, 7] == -np.inf
    logits[1, 7] = before[1, 7]
    assert (logits == before).all()
