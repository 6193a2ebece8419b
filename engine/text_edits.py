"""TextEdits: what one request changes in the logits of its next tokens, kept up to date while its text grows."""

from array import array
from copy import copy


class TextEdits:
    """One entry for each token id that is touched: ids with a bias, ids that some rows ban, the prompt's where they
    count, the output's. A text is counted once, and then as it grows.

    params  SamplingParams
    banned  ids that some rows ban
    """

    def __init__(self, params, prompt=(), banned=()):
        self.params = params
        bias, banned = params.logit_bias or {}, set(banned)
        seen = set(prompt if params.repetition_penalty != 1 else ())
        self._touches = bool(bias) or params.has_penalties
        ids = list(dict.fromkeys([*bias, *banned, *seen]))
        self._entry = {token: i for i, token in enumerate(ids)}
        self._columns = (array("i", ids), array("f", [bias.get(token, 0) for token in ids]),
                         array("B", [token in seen for token in ids]), array("i", bytes(4 * len(ids))),
                         array("B", [token in banned for token in ids]))

    def append(self, token):
        """Takes the next token of the output."""
        if not self.params.has_penalties:
            return
        at = self._entry.setdefault(token, len(self._entry))
        if at == len(self._columns[0]):
            for column, value in zip(self._columns, (token, 0, 0, 0, 0), strict=True):
                column.append(value)
        _, _, is_seen, n_in_output, _ = self._columns
        is_seen[at] = 1
        n_in_output[at] += 1

    def rows(self, drafts=(), n_banned=0):
        """What LogitEdits.build takes of the rows that decide the token behind none of the drafts, behind the first of
        them, and so on to the last. The first n_banned of these rows ban `banned`. No entries: None."""
        text = self._copy() if drafts and self.params.has_penalties else self
        rows = [text._row(n_banned > 0)]
        for i, token in enumerate(drafts, start=1):
            text.append(token)
            rows.append(text._row(i < n_banned))
        return rows

    def _row(self, is_banning):
        """(SamplingParams, columns of entries as of now), or None for no entries."""
        if not (is_banning or self._touches):
            return self.params, None
        *columns, is_banned = (column[:] for column in self._columns)
        return self.params, (*columns, is_banned if is_banning else bytearray(len(is_banned)))

    def _copy(self):
        other = copy(self)
        other._entry, other._columns = dict(self._entry), tuple(column[:] for column in self._columns)
        return other
