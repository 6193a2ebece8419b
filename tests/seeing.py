"""Requests with small random pictures in them, for engines on tiny checkpoints that see (tiny.seeing).

Pictures are handed to the engine as they are: resized ones would have 70 soft tokens or so, most of these have fewer.
"""

import hashlib

import numpy as np

from engine.models.vision_spec import SiglipSpec
from engine.sequence import MediaRun
from engine.tasks import Generation, Probe
from engine.vision.picture import Picture

SHAPES = ((1, 1), (2, 3), (1, 7), (4, 3), (3, 3))           # soft tokens down and across


def picture(tower, seed):
    """A random Picture of one of SHAPES, or as large as the tower wants them."""
    rng = np.random.default_rng([seed, 7])
    n_down, n_across = SHAPES[seed % len(SHAPES)]
    if type(tower) is SiglipSpec:
        n_down = n_across = tower.side // tower.block_side
    side = tower.block_side
    pixels = rng.integers(0, 256, (n_down * side, n_across * side, 3), np.uint8)
    return Picture(pixels, n_down * n_across, (hashlib.sha256(pixels.tobytes()).hexdigest(), 70))


def prompt(spec, *parts):
    """(token ids, MediaRuns): parts are numbers of random text tokens, and "a", "b", ... of pictures."""
    ids, runs = [], []
    for part in parts:
        if isinstance(part, str):
            runs.append(MediaRun(len(ids) + 1, picture(spec.media.tower, ord(part) - ord("a"))))
            n = runs[-1].picture.n_tokens
            ids += [spec.media.begin_image, *[spec.media.image_token] * n, spec.media.end_image]
        else:
            ids += np.random.default_rng([part, len(ids)]).integers(3, 58, part).tolist()
    return ids, runs


def forward(llm, prompts, hidden_states=False):
    """Logits [n_tokens, vocab] of all positions of each (token ids, MediaRuns), as one batch; or the Probes."""
    probes = [Probe(len(ids), 0, llm.spec, hidden_states) for ids, _ in prompts]
    sequences = [llm._core.loop.submit(ids, probe, runs) for (ids, runs), probe in zip(prompts, probes, strict=True)]
    try:
        while not all(probe.is_finished for probe in probes):
            llm._core.loop.step()
    finally:
        for sequence in sequences:
            llm._core.loop.withdraw(sequence)
    return probes if hidden_states else [probe.logits for probe in probes]


def request(llm, one, params):
    """What LLM._run takes, for (token ids, MediaRuns)."""
    ids, runs = one
    return ids, Generation(ids, params, params.seed or 0, llm.eos_ids, None, llm.max_seq_len), runs


def generate(llm, prompts, params):
    """Token ids of each (token ids, MediaRuns), as one batch."""
    return [output.token_ids for output in llm._run([request(llm, one, params) for one in prompts])]
