"""Positions: what layers read of the positions of a step's tokens, computed once for all of them."""

from engine.workspace import ropes, temperatures


class Positions:
    """Angles of RoPE and temperatures of queries, in workspace buffers that the next step overwrites."""

    def __init__(self, spec, workspace, lane):
        self.ops, self._workspace = lane.ops, workspace
        self._inv_freq = [lane.to_device(rope.inv_freq(head_dim)) for rope, head_dim in ropes(spec)]
        self._temperatures = temperatures(spec)
        self._place = {key: i for keys in (ropes(spec), self._temperatures) for i, key in enumerate(keys)}
        self._prefix, self._n = "", 0

    def compute(self, positions):
        """Makes `positions` [n_tokens] int32 the ones that of() speaks of."""
        self._prefix, self._n = "", len(positions)
        for i, inv_freq in enumerate(self._inv_freq):
            self.ops.rope_angles(positions, inv_freq, self._angles(i))
        for i, temperature in enumerate(self._temperatures):
            self.ops.attention_temperature(positions, temperature.scale, temperature.floor, self._temperature(i))

    def keep(self, kept):
        """Drops all but the tokens `kept` [n_kept] int32."""
        widths = {f"angles{i}": 2 * len(inv_freq) for i, inv_freq in enumerate(self._inv_freq)}
        widths |= {f"temperature{i}": 1 for i in range(len(self._temperatures))}
        for name, width in widths.items():
            self.ops.select_rows(self._workspace.rows(name, self._n, width), kept,
                                  self._workspace.rows("kept_" + name, len(kept), width))
        self._prefix, self._n = "kept_", len(kept)

    def of(self, attention):
        """(cos and sin [n_tokens, 2, n_pairs] or None, temperature [n_tokens] or None) of an AttentionSpec."""
        rope, temperature = attention.rope, attention.temperature
        return (None if rope is None else self._angles(self._place[rope, attention.head_dim]),
                None if temperature is None else self._temperature(self._place[temperature]))

    def _angles(self, i):
        n_pairs = len(self._inv_freq[i])
        return self._workspace.rows(f"{self._prefix}angles{i}", self._n, 2 * n_pairs).reshape(self._n, 2, n_pairs)

    def _temperature(self, i):
        return self._workspace.rows(f"{self._prefix}temperature{i}", self._n, 1).reshape(self._n)
