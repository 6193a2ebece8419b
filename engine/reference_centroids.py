"""The op table in NumPy, the head of a draft model that looks at the tokens of some centroids only: the twins of
cuda/centroids.cu."""

import numpy as np


def pick_centroids(scores, out):
    """out[i] = the centroids with the largest scores, largest first; of equal ones the lowest number, NaN last.

    scores  [n, n_centroids] float32, out [n, n_chosen] int32
    """
    out[...] = np.argsort(-scores, axis=1, kind="stable")[:, :out.shape[1]]


def candidate_argmax(g, head, ordering, chosen, out, scratch=None):
    """out[i] = the candidate with the largest g[i] · head[candidate], the lowest id on ties.

    g         [n, hidden], head [vocab, hidden]
    ordering  [n_centroids, size] int32: the tokens of each centroid; -1 in the place of one that is never drafted
    chosen    [n, n_chosen] int32: the candidates are the tokens of these centroids, each there once; out is 0 where
              that is none
    out       [n] int32
    """
    for i, (tokens, logits) in enumerate(_candidates(g, head, ordering, chosen)):
        out[i] = tokens[logits.argmax()] if len(tokens) else 0


def candidate_logits(g, head, ordering, chosen, out):
    """out[i, t] = g[i] · head[t] for the candidates t of row i, as candidate_argmax has them; -inf for all others. out
    [n, vocab]."""
    out[...] = -np.inf
    for i, (tokens, logits) in enumerate(_candidates(g, head, ordering, chosen)):
        out[i, tokens] = logits


def _candidates(g, head, ordering, chosen):
    """(tokens, ascending, logits) of each row."""
    for row, centroids in zip(g, chosen, strict=True):
        tokens = np.sort(ordering[centroids], axis=None)
        tokens = tokens[tokens >= 0]
        yield tokens, head[tokens] @ row
