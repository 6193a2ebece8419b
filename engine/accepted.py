"""Where each sequence stands after its drafts were judged, as arrays on the lane."""

from typing import NamedTuple


class Accepted(NamedTuple):
    """What accept_drafts decides of each sequence; every field is [n_seqs] int32.

    n_accepted    drafts that hold
    next_token    the token after them, the first that no draft foretold
    state_rows    row of the state that decided it, in the step's states
    positions     position of that row: the last whose K and V are valid
    context_lens  tokens up to it, positions + 1
    """

    n_accepted: object
    next_token: object
    state_rows: object
    positions: object
    context_lens: object
