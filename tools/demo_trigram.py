"""A trigram model of token ids, smoothed by Witten and Bell: what the demo model has to beat."""

import numpy as np


class Trigram:
    """P(w | u v) = (n(u v w) + kinds(u v) · P(w | v)) / (n(u v) + kinds(u v)), and so on down to 1 / vocab.

    kinds(context) is how many different tokens were seen after it. Source: Witten and Bell 1991, interpolated as in
    Chen and Goodman 1998. Documents are lists of token ids that begin with <bos>, which is given, not predicted.
    """

    def __init__(self, documents, vocab):
        self.vocab = vocab
        grams = np.concatenate([self.grams(document) for document in documents])        # [n, 3]: u, v, w
        self.orders = []
        for order in (1, 2, 3):
            seen, counts = np.unique(self.pack(grams[:, 3 - order:]), return_counts=True)
            contexts, first = np.unique(seen // vocab, return_index=True)               # seen is sorted by context
            totals, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(seen))
            self.orders.append((order, seen, counts, contexts, totals, kinds))

    def grams(self, document):
        padded = np.array([document[0], *document], dtype=np.int64)     # the first token's context is <bos> <bos>
        return np.lib.stride_tricks.sliding_window_view(padded, 3)

    def pack(self, grams):
        """[n, order] ids as one int64 each, the context in the high digits."""
        return grams @ self.vocab ** np.arange(grams.shape[1], dtype=np.int64)[::-1]

    def log_probs(self, document):
        """log P of every token after <bos>, float64 [n - 1]."""
        grams = self.grams(document)
        probs = np.full(len(grams), 1 / self.vocab)
        for order, seen, counts, contexts, totals, kinds in self.orders:
            keys = self.pack(grams[:, 3 - order:])
            count, total, kind = look_up(seen, counts, keys), *(look_up(contexts, values, keys // self.vocab)
                                                                for values in (totals, kinds))
            known = total > 0
            probs[known] = ((count + kind * probs) / np.maximum(total + kind, 1))[known]
        return np.log(probs)


def look_up(keys, values, wanted):
    """values at the wanted keys, 0 where a key is absent; keys ascend."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def perplexity(log_probs):
    """exp of minus the mean over all tokens; log_probs: one array per document."""
    return float(np.exp(-np.concatenate(log_probs).mean()))
