"""The model's forward pass: walks the LayerSpecs and launches ops in written order, into the workspace."""

from engine.models.spec import AttentionSpec, DenseSpec
from engine.workspace import ropes


class LayerScheduler:
    """Runs batches through one model. Allocates nothing of its own in a step, reads nothing back."""

    def __init__(self, spec, weights, kv_cache, workspace, lane):
        _refuse_unknown(spec)
        self.spec, self.weights, self.kv_cache, self.workspace = spec, weights, kv_cache, workspace
        self.ops = lane.ops
        self._embed_scale = float(lane.dtype.type(spec.embed_scale))
        self._inv_freq = {(rope, head_dim): lane.to_device(rope.inv_freq(head_dim)) for rope, head_dim in ropes(spec)}

    def run(self, batch, observe=None):
        """Computes `batch`, leaving its K and V in the cache. Returns the states after the final norm,
        [n_kept, hidden], a workspace buffer that the next run overwrites.

        observe(j, residual)  called with the residual stream [n_tokens, hidden] before layer j and once after the last
        """
        spec, weights, ops, rows = self.spec, self.weights, self.ops, self.workspace.rows
        n, norm = batch.n_tokens, (spec.norm_eps, weights.norm_offset)
        residual, normed, branch = (rows(name, n, spec.hidden) for name in ("residual", "normed", "branch"))
        ops.embed(weights.embed, batch.token_ids, self._embed_scale, residual)
        angles = self._angles(batch.positions)
        if observe:
            observe(0, residual)
        ops.rms_norm(residual, weights.layers[0].input_norm, *norm, normed)
        for i, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            is_last = i + 1 == len(spec.layers)
            pool, slot = self.kv_cache.layer_slot[i]
            paged, pages = batch.pools[pool], (self.kv_cache.k[pool][slot], self.kv_cache.v[pool][slot])
            q = self._project(layer.attention, w, normed, angles, paged.slots, pages)
            if is_last and batch.kept is not None:
                n = len(batch.kept)
                paged = batch.kept_pool(pool)
                q = ops.select_rows(q, batch.kept, rows("kept_q", n, layer.attention.q_width))
                residual = ops.select_rows(residual, batch.kept, rows("kept", n, spec.hidden))
                normed, branch = rows("normed", n, spec.hidden), rows("branch", n, spec.hidden)
            self._attend(layer.attention, w, q, pages, paged, branch)
            ops.add_norm(residual, branch, w.post_attention_norm, w.pre_mlp_norm, *norm, None, normed)
            self._feed_forward(layer.mlp, w, normed, branch)
            next_norm = weights.norm if is_last else weights.layers[i + 1].input_norm
            ops.add_norm(residual, branch, w.post_mlp_norm, next_norm, *norm, w.layer_scalar, normed)
            if observe:
                observe(i + 1, residual)
        return normed

    def logits(self, states):
        """Logits of final-norm states [n, hidden], n <= workspace.max_logit_rows: float32 [n, vocab], a buffer."""
        out = self.workspace.rows("logits", len(states), self.spec.vocab)
        self.ops.linear(states, self.weights.head, out, self.workspace.scratch)
        if self.spec.logit_softcap is not None:
            self.ops.logit_softcap(out, self.spec.logit_softcap)
        return out

    def _angles(self, positions):
        """{(rope, head_dim): cos and sin [n_tokens, 2, n_pairs]} at `positions`."""
        n, angles = len(positions), {}
        for i, (key, inv_freq) in enumerate(self._inv_freq.items()):
            n_pairs = len(inv_freq)
            angles[key] = self.workspace.rows(f"angles{i}", n, 2 * n_pairs).reshape(n, 2, n_pairs)
            self.ops.rope_angles(positions, inv_freq, angles[key])
        return angles

    def _project(self, attention, w, normed, angles, slots, pages):
        """q [n_tokens, n_heads * head_dim]; k and v are in `pages`, (k_pages, v_pages), afterwards."""
        qkv = self.workspace.rows("qkv", len(normed), attention.qkv_width)
        q = self.workspace.rows("q", len(normed), attention.q_width)
        self.ops.linear(normed, w.qkv, qkv, self.workspace.scratch)
        self.ops.qk_norm_rope_cache(
            qkv, w.q_norm, w.k_norm, angles[attention.rope, attention.head_dim], slots, *pages,
            n_heads=attention.n_heads, v_norm=attention.v_norm, v_is_k=attention.v_is_k, eps=self.spec.norm_eps,
            weight_offset=self.weights.norm_offset, interleaved=attention.rope.interleaved, out=q)
        return q

    def _attend(self, attention, w, q, pages, paged, out):
        mixed = self.workspace.rows("mixed", len(q), attention.q_width)
        self.ops.attention(q, *pages, paged, scale=attention.scale, out=mixed, scratch=self.workspace.scratch,
                           window=attention.window)
        self.ops.linear(mixed, w.o, out, self.workspace.scratch)

    def _feed_forward(self, mlp, w, normed, out):
        act = self.workspace.rows("act", len(normed), mlp.intermediate)
        self.ops.gated_linear(normed, w.gate_up, act, self.workspace.scratch)
        self.ops.linear(act, w.down, out, self.workspace.scratch)


def _refuse_unknown(spec):
    """Raises TypeError for what a ModelSpec can say and no branch here does."""
    if spec.per_layer_input:
        raise TypeError(f"no branch for per-layer inputs, of {spec.per_layer_input}")
    for i, layer in enumerate(spec.layers):
        attention, mlp = layer.attention, layer.mlp
        if type(attention) is not AttentionSpec or type(mlp) is not DenseSpec:
            raise TypeError(f"layer {i}: no branch for {type(attention).__name__} and {type(mlp).__name__}")
        if attention.chunk is not None:
            raise TypeError(f"layer {i}: no branch for {attention.kind} attention")
        if layer.kv_from is not None:
            raise TypeError(f"layer {i}: no branch for reading the K and V of layer {layer.kv_from}")
