"""PerLayerInputs: what a second embedding table gives each layer of a token (Gemma 4 E-series), and its way in."""


class PerLayerInputs:
    """Inputs [n_tokens, n_layers * P], computed once a step; layer i reads its own P columns.

    Source: HF modeling_gemma4, Gemma4TextModel.project_per_layer_inputs and Gemma4TextDecoderLayer.
    """

    def __init__(self, spec, weights, norms, workspace, lane):
        self._weights, self._norms, self._workspace, self.ops = weights, norms, workspace, lane.ops
        self._eps, self._width, self._total = spec.norm_eps, spec.per_layer_input, spec.per_layer_width
        self._scale = float(lane.dtype.type(spec.per_layer_scale))
        self._context_scale = spec.hidden ** -0.5

    def compute(self, batch, residual):
        """The inputs, from the tokens' ids and from their embeddings `residual`; a buffer."""
        weights, n = self._weights, batch.n_tokens
        tokens, out = batch.per_layer_rows, self._workspace.rows("per_layer", n, self._total)
        if tokens is None:
            tokens = self._workspace.rows("per_layer_tokens", n, self._total)
            self.ops.embed(weights.per_layer_embed, batch.token_ids, self._scale, tokens)
        self.ops.linear(residual, weights.per_layer_model_projection, out, self._workspace.scratch)
        self.ops.mix_per_layer(out, tokens, weights.per_layer_norm, self._context_scale, self._eps, out)
        return out

    def keep(self, inputs, kept):
        """The rows `kept` of the inputs."""
        return self.ops.select_rows(inputs, kept, self._workspace.rows("per_layer_tokens", len(kept), self._total))

    def add(self, i, layer_weights, inputs, residual, next_weight, branch, out):
        """The end of layer i: residual = (residual + norm(projection(gelu(gate(residual)) * inputs))) * layer_scalar,
        out = norm(residual); `branch` is overwritten."""
        w, scratch = layer_weights, self._workspace.scratch
        gate, act = (self._workspace.rows(name, len(residual), self._width)
                     for name in ("per_layer_gate", "per_layer_act"))
        self.ops.linear(residual, w.per_layer_gate, gate, scratch)
        self.ops.gate_per_layer(gate, inputs, i, act)
        self.ops.linear(act, w.per_layer_projection, branch, scratch)
        self._norms.add(residual, branch, w.post_per_layer_norm, next_weight, w.layer_scalar, out)
