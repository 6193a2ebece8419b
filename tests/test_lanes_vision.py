"""Prompts with pictures on the kernels, emulated or (--lane cuda) on a GPU: goldens in bfloat16, the same bits in any
batch."""

import numpy as np
import pytest

from tests.golden import VISION_CASES
from tests.test_goldens_vision import Case
from tests.test_lanes import errors

# max and median over the positions of a case of transformers' own bfloat16 error (tests/goldens/README.md)
BF16_ERROR = {"gemma4-vision": (0.035, 0.013), "gemma4-vision-bidir": (0.023, 0.009), "gemma4-video": (0.062, 0.015),
              "gemma3-vision": (0.047, 0.013), "gemma4-unified": (0.081, 0.014)}


@pytest.fixture(scope="module", params=VISION_CASES)
def golden(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def opened(golden, open_llm):
    return open_llm(golden.checkpoint)


@pytest.fixture(scope="module")
def logits(golden, opened):
    """Of every position of all prompts, as one batch, every picture fresh."""
    return golden.forward(opened, return_logits="all").logits


def test_logits_are_as_close_as_bfloat16_allows(golden, logits):
    pooled = np.concatenate([errors(got, golden[f"p{i}.logits"]) for i, got in enumerate(logits)])
    most, median = BF16_ERROR[golden.checkpoint.parent.name]
    assert np.median(pooled) <= 1.5 * median
    assert pooled.max() <= 2 * most


def test_the_same_bits_alone_and_with_pictures_from_the_cache(golden, opened, logits):
    k = golden.meta["probe_prompt"]
    np.testing.assert_array_equal(golden.forward(opened, k, return_logits="all").logits[0], logits[k])


def test_the_same_bits_in_chunks(golden, open_llm, logits):
    """Pictures are encoded one or two at a time; some are split between steps where the model is causal."""
    if golden.checkpoint.parent.name == "gemma4-video":
        pytest.skip("as gemma4-vision, and slow")
    small = open_llm(golden.checkpoint, max_batch_tokens=50)
    for one, other in zip(golden.forward(small, return_logits="all").logits, logits, strict=True):
        np.testing.assert_array_equal(one, other)
