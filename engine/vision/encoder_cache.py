"""EncoderCache: the soft tokens of pictures, kept as long as somebody needs them, and longer where there is room."""

from dataclasses import dataclass, field

import numpy as np

DEFAULT_PICTURES = 8        # of the largest size, that the cache has room for where nobody says how many bytes


@dataclass
class _Entry:
    """The rows of one picture's soft tokens, and the sequences that hold it."""

    rows: np.ndarray
    holders: set = field(default_factory=set)


class EncoderCache:
    """Soft tokens by Picture.key, as rows of one array on the lane.

    A sequence holds the pictures it came to until it ends, is preempted or aborted. Where room is short, pictures that
    nobody holds go first, then those that the step at hand does not need: both least recently used first. A picture
    that went is encoded again if it is asked for.

    encoder  VisionEncoder: encode(pictures, soft, rows)
    soft     [n_rows, hidden] on the lane
    """

    def __init__(self, encoder, n_rows, hidden, lane):
        self.soft = lane.empty((n_rows, hidden))
        self.encoder, self._counts = encoder, dict.fromkeys(
            ("lookups", "hits", "encoded_pictures", "encoded_tokens", "evictions"), 0)
        self.clear()

    @staticmethod
    def n_rows(spec, max_step_tokens, longest_picture, n_bytes, itemsize):
        """Rows of the cache of a ModelSpec within n_bytes, or by default, but no fewer than one step may need.

        A step comes to soft tokens of its own number at most; but where pictures are split, it needs the whole of the
        one that it begins in and of the one that it ends in.
        """
        least = max_step_tokens + (0 if spec.has_blocks else 2 * (longest_picture - 1))
        wanted = DEFAULT_PICTURES * longest_picture if n_bytes is None else n_bytes // (spec.hidden * itemsize)
        return max(least, wanted)

    def source_of(self, media):
        """int32: the rows of `soft` that hold the soft tokens of Batch.media, one after the other. Pictures that are
        not there are encoded, all of them as one batch."""
        missing = {}
        for _, picture, first, _ in media:
            is_known = picture.key in self._entries
            if not first:                                   # a picture of a prompt counts once, in however many steps
                self._counts["lookups"] += 1
                self._counts["hits"] += is_known or picture.key in missing
            if not is_known:
                missing[picture.key] = picture
        if missing:
            self._encode(missing, {picture.key for _, picture, _, _ in media})
        source = []
        for sequence, picture, first, end in media:
            entry = self._entries[picture.key] = self._entries.pop(picture.key)     # now the most recently used
            entry.holders.add(sequence)
            source.append(entry.rows[first:end])
        return np.concatenate(source)

    def release(self, sequence):
        """The sequence holds nothing any more."""
        for entry in self._entries.values():
            entry.holders.discard(sequence)

    def clear(self):
        """Forgets every picture, whoever holds it."""
        self._entries, self._free = {}, np.arange(len(self.soft), dtype=np.int32)

    def stats(self):
        """Counters since the engine opened, and what is in the cache now, as a dict."""
        row_bytes = self.soft.nbytes // max(1, len(self.soft))
        n_held = sum(bool(entry.holders) for entry in list(self._entries.values()))     # threads may step meanwhile
        return {**self._counts, "pictures": len(self._entries), "held_pictures": n_held,
                "bytes": row_bytes * (len(self.soft) - len(self._free)), "capacity_bytes": self.soft.nbytes}

    def _encode(self, missing, needed):
        """Brings the pictures {key: picture} in; those under the keys `needed` stay."""
        n_tokens = [picture.n_tokens for picture in missing.values()]
        unneeded = [key for key in self._entries if key not in needed]
        for key in sorted(unneeded, key=lambda key: bool(self._entries[key].holders)):      # stable: the oldest first
            if len(self._free) >= sum(n_tokens):
                break
            self._free = np.concatenate([self._free, self._entries.pop(key).rows])
            self._counts["evictions"] += 1
        assert len(self._free) >= sum(n_tokens), "more soft tokens in a step than the cache is laid out for"
        *rows, free = np.split(self._free, np.cumsum(n_tokens))
        self.encoder.encode(list(missing.values()), self.soft, rows)
        self._free = free                                   # only now: nothing is lost if the encoder fails
        self._entries.update(zip(missing, map(_Entry, rows), strict=True))
        self._counts["encoded_pictures"] += len(rows)
        self._counts["encoded_tokens"] += sum(n_tokens)
