"""A stream of requests, drawn from a seed: when each is due, its prompt, and how many tokens it asks for."""

from dataclasses import dataclass

import numpy as np

from measure.report import BenchError


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    due_s     seconds after the trace begins
    tokens    ids of the prompt
    n_output  tokens to generate
    """

    due_s: float
    tokens: tuple
    n_output: int


def draw_requests(n, rate, n_input, n_output, vocab, seed, spread=0.0, n_shared=0):
    """[Request] in the order in which they are due, the first at 0.

    rate      requests a second on average, at random (Poisson) times; inf is all at once
    n_input   mean length of a prompt; lengths are uniform within n_input * (1 - spread) .. n_input * (1 + spread)
    n_output  the same for the tokens to generate
    n_shared  ids at the beginning that are the same in every prompt; n_input counts them
    Prompts, lengths and the pattern of arrivals are those of the seed: another rate plays them faster or slower.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.standard_exponential(n))
    inputs, outputs = (_lengths(rng, mean, spread, n) for mean in (n_input, n_output))
    least = _bounds(n_input, spread)[0]
    if n_shared >= least:
        raise BenchError(f"shared prefix of {n_shared} tokens: the shortest prompt has {least}, expected at least one "
                         "token of its own")
    shared = rng.integers(vocab, size=n_shared).tolist()
    due = (arrivals - arrivals[0]) / rate                       # all 0 at rate inf
    return [Request(float(at), tuple(shared + rng.integers(vocab, size=size - n_shared).tolist()), n_new)
            for at, size, n_new in zip(due, inputs, outputs, strict=True)]


def longest(mean, spread):
    """The largest length that draw_requests may draw."""
    return _bounds(mean, spread)[1]


def _bounds(mean, spread):
    return max(1, round(mean * (1 - spread))), max(1, round(mean * (1 + spread)))


def _lengths(rng, mean, spread, n):
    return rng.integers(*_bounds(mean, spread), size=n, endpoint=True).tolist()
