"""Target: one array of the engine, the tensors of a checkpoint that fill it, and how their values lie in it."""

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np


@dataclass(frozen=True)
class Order:
    """How the values of a tensor lie in an array: the tensor, seen as `view`, with its axes in the order `axes`."""

    view: tuple
    axes: tuple

    def __call__(self, values):
        """The flat values of the array, from the flat ones of the tensor."""
        return np.ascontiguousarray(values.reshape(self.view).transpose(self.axes)).reshape(-1)


@dataclass(frozen=True)
class Target:
    """One array of the engine: the values of `parts`, ((checkpoint name, shape), ...), one after the other.

    in_out  a matrix, or one of each expert, that is [..., in, out] instead of [..., out, in]
    orders  of each part, the Order of its values in the array, or None where it is the file's; () for all parts
    shape   of the array; as a rule the rows of the parts, one below the other
    """

    name: str
    parts: tuple
    is_norm: bool = False
    in_out: bool = False
    orders: tuple = ()
    shape: tuple | None = None

    def __post_init__(self):
        if self.shape is None:
            first = self.parts[0][1]
            object.__setattr__(self, "shape", (sum(shape[0] for _, shape in self.parts), *first[1:]))

    @property
    def n_in(self):
        """Columns that a row of the input meets."""
        return self.shape[-2 if self.in_out else -1]

    def pieces(self):
        """((checkpoint name, shape, Order or None), ...) of the parts."""
        return tuple((name, shape, order) for (name, shape), order in zip_longest(self.parts, self.orders))
