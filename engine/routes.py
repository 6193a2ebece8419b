"""Which experts take which tokens of a step, as arrays on the lane."""

from typing import NamedTuple

import numpy as np


class Routes(NamedTuple):
    """What a router decides. A pair is a token and one of its experts, numbered token * experts_per_token + choice.

    experts  [n_tokens, experts_per_token] int32: of each token, the likeliest first, equally likely ones by number
    weights  [n_tokens, experts_per_token] float32
    order    [n_tokens * experts_per_token] int32: the pairs by expert, those of an expert ascending
    begins   [n_experts + 1] int32: expert e has the pairs order[begins[e]:begins[e + 1]]
    """

    experts: object
    weights: object
    order: object
    begins: object

    @staticmethod
    def shapes(n_tokens, experts_per_token, n_experts):
        """{name: (shape, dtype)} of the arrays."""
        chosen = n_tokens, experts_per_token
        return {"experts": (chosen, np.int32), "weights": (chosen, np.float32),
                "order": ((n_tokens * experts_per_token,), np.int32), "begins": ((n_experts + 1,), np.int32)}

    @classmethod
    def empty(cls, n_tokens, experts_per_token, n_experts, empty):
        """Arrays that empty(shape, dtype) makes."""
        shapes = cls.shapes(n_tokens, experts_per_token, n_experts)
        return cls(**{name: empty(*shape) for name, shape in shapes.items()})
