"""A dense Gemma text model in plain torch, on the engine's own weights: a whole-model peer, in the manner of gpt-fast.

A static KV cache (a ring of one window for sliding layers), one decode step as one function without branches on data,
which torch.compile fuses and a CUDA graph replays. All sequences stand at one position. Imported where torch runs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.models.spec import AttentionSpec, DenseSpec, MoeSpec
from engine.workspace import ropes
from measure.peer.torch_arrays import as_torch

CACHE_STEP = 64                 # a cache is a multiple of so many positions: the alignment that fused kernels want
MOST_FUSED_HEAD_DIM = 256       # SDPA's kernels that take fewer KV heads than query heads end there


def why_not(spec):
    """What of a ModelSpec this model has no code for, or None."""
    found = {}
    if spec.per_layer_input:
        found["per-layer inputs"] = None
    if spec.norm_rounds_first:
        found["norms that round before the weight"] = None
    for i, layer in enumerate(spec.layers):
        for words in _unknown(layer):
            found.setdefault(words, i)
    return ", ".join(words if i is None else f"{words} (layer {i})" for words, i in found.items()) or None


def _unknown(layer):
    """What of a LayerSpec there is no code for, in words."""
    attention, mlp = layer.attention, layer.mlp
    if type(attention) is not AttentionSpec or type(mlp) not in (DenseSpec, MoeSpec):
        return [f"{type(attention).__name__} and {type(mlp).__name__}"]
    rope, dense = attention.rope, layer.dense
    has = {"experts": layer.moe is not None, "K and V of another layer": layer.kv_from is not None,
           "no norms on outputs": not layer.sandwich, "chunked attention": attention.chunk is not None,
           "attention without RoPE": rope is None, "interleaved RoPE": rope is not None and rope.interleaved,
           "a temperature": attention.temperature is not None, "no QK norm": attention.qk_norm is None,
           "QK norm without weights": attention.qk_norm == "plain",
           "a SiLU gate": dense is not None and dense.activation == "silu"}
    return [words for words, is_so in has.items() if is_so]


def norm(x, weight, eps):
    """RMSNorm in float32; weight None multiplies by nothing."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def rotate(x, angles):
    """Split-half pairs (j, j + head_dim/2) of [n_seqs, n, heads, head_dim] by angles [n, head_dim/2]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attend_sdpa(q, k, v, seen, scale):
    """The queries of one KV head as rows of one product, so that no key is read twice or copied."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None], scale=scale)


def attend_matmul(q, k, v, seen, scale):
    """The same written out: two batched products, which Inductor may fuse with what is around them."""
    scores = torch.where(seen, (q @ k.mT).float() * scale, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def attend_flex(q, k, v, seen, scale):
    """The same by flex_attention's decoding kernel, which splits the keys over the machine."""
    from torch.nn.attention.flex_attention import flex_attention
    n_seqs, n_kv_heads, group, head_dim = q.shape

    def only_seen(score, seq, head, query, key):
        return torch.where(seen[key], score, -torch.inf)
    mixed = flex_attention(q.reshape(n_seqs, n_kv_heads * group, 1, head_dim), k, v, score_mod=only_seen, scale=scale,
                           enable_gqa=group > 1)
    return mixed.reshape(q.shape)


ATTENTIONS = {"sdpa": attend_sdpa, "matmul": attend_matmul, "flex": attend_flex}


class TorchLayer(nn.Module):
    """One decoder block and its cache, [n_seqs, n_kv_heads, size, head_dim] of K and of V."""

    def __init__(self, spec, layer, weights, norm_offset, n_seqs, max_len, attend, inv_freq):
        super().__init__()
        self.inv_freq = inv_freq                                # name of the model's buffer
        self.attention, self.eps, self.attend = layer.attention, spec.norm_eps, ATTENTIONS[attend]
        self.blocks = {}                                        # {prompt length: window_blocks}
        size = -(-max_len // CACHE_STEP) * CACHE_STEP
        self.size = size if layer.attention.window is None else min(layer.attention.window, size)
        for name in ("qkv", "o", "gate_up", "down"):
            self.register_buffer(name, as_torch(getattr(weights, name)), persistent=False)
        for name in ("input_norm", "q_norm", "k_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"):
            weight = as_torch(getattr(weights, name)).float() + norm_offset
            self.register_buffer(name, weight, persistent=False)
        scalar = None if weights.layer_scalar is None else as_torch(weights.layer_scalar)
        self.register_buffer("layer_scalar", scalar, persistent=False)
        shape = (n_seqs, self.attention.n_kv_heads, self.size, self.attention.head_dim)
        for name in ("k", "v"):
            cache = torch.zeros(shape, dtype=self.qkv.dtype, device=self.qkv.device)
            self.register_buffer(name, cache, persistent=False)

    def forward(self, x, angles, positions, is_decode):
        """x [n_seqs, n, hidden] at positions [n], the same in every sequence: one further token, or prompts."""
        a, n = self.attention, x.shape[1]
        qkv = F.linear(norm(x, self.input_norm, self.eps).to(x.dtype), self.qkv).unflatten(-1, (-1, a.head_dim))
        q, k = qkv[:, :, :a.n_heads], qkv[:, :, a.n_heads:a.n_heads + a.n_kv_heads]
        v = k if a.v_is_k else qkv[:, :, a.n_heads + a.n_kv_heads:]
        q = rotate(norm(q, self.q_norm, self.eps), angles).to(x.dtype).transpose(1, 2)
        k = rotate(norm(k, self.k_norm, self.eps), angles).to(x.dtype).transpose(1, 2)
        v = (norm(v, None, self.eps).to(x.dtype) if a.v_norm else v).transpose(1, 2)
        last = slice(max(0, n - self.size), None)               # what is left in the ring
        self.k.index_copy_(2, positions[last] % self.size, k[:, :, last])
        self.v.index_copy_(2, positions[last] % self.size, v[:, :, last])
        mixed = self.from_cache(q, positions) if is_decode else self.from_prompt(q, k, v)
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), self.o)
        x = (x.float() + norm(mixed, self.post_attention_norm, self.eps)).to(x.dtype)
        gate, up = F.linear(norm(x, self.pre_mlp_norm, self.eps).to(x.dtype), self.gate_up).chunk(2, -1)
        branch = F.linear(F.gelu(gate, approximate="tanh") * up, self.down)
        x = x.float() + norm(branch, self.post_mlp_norm, self.eps)
        return (x if self.layer_scalar is None else x * self.layer_scalar).to(self.qkv.dtype)

    def from_cache(self, q, positions):
        """Attention of one token a sequence; a ring that is full holds its window and nothing else."""
        a = self.attention
        seen = torch.arange(self.size, device=q.device) <= positions
        grouped = q.reshape(len(q), a.n_kv_heads, -1, a.head_dim)
        return self.attend(grouped, self.k, self.v, seen, a.scale).reshape(q.shape)

    def from_prompt(self, q, k, v):
        """Causal attention of whole prompts, within the window."""
        a, n = self.attention, q.shape[2]
        group = a.n_heads // a.n_kv_heads
        if a.window is None or n <= a.window:
            if a.head_dim > MOST_FUSED_HEAD_DIM:
                k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a.scale, enable_gqa=group > 1)
        if n in self.blocks and q.is_cuda:
            from torch.nn.attention.flex_attention import flex_attention
            return flex_attention(q, k, v, block_mask=self.blocks[n], scale=a.scale, enable_gqa=group > 1)
        keys = torch.arange(n, device=q.device)
        seen = (keys <= keys[:, None]) & (keys > keys[:, None] - a.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=a.scale, enable_gqa=group > 1)


def window_blocks(window, n, device):
    """flex_attention's list of the blocks of scores that a window leaves of n x n."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(seq, head, query, key):
        return (key <= query) & (key > query - window)
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask     # or n x n is made
    return make(is_seen, None, None, n, n, device=device)


class TorchModel(nn.Module):
    """spec, weights   ModelSpec and engine Weights, whose arrays this model reads where they are
    n_seqs, max_len    of the static KV cache
    attend             a name of ATTENTIONS: how a decode step attends
    """

    def __init__(self, spec, weights, lane, n_seqs, max_len, attend="sdpa"):
        super().__init__()
        self.spec = spec
        self.register_buffer("embed", as_torch(weights.embed), persistent=False)
        self.register_buffer("head", as_torch(weights.head), persistent=False)
        self.register_buffer("norm", as_torch(weights.norm).float() + weights.norm_offset, persistent=False)
        self.embed_scale = float(lane.dtype.type(spec.embed_scale))
        names = {key: f"inv_freq{i}" for i, key in enumerate(ropes(spec))}
        for (rope, head_dim), name in names.items():            # a pair that does not rotate turns by 0
            inv_freq = torch.from_numpy(rope.inv_freq(head_dim))
            padded = F.pad(inv_freq, (0, head_dim // 2 - len(inv_freq))).to(self.embed.device)
            self.register_buffer(name, padded, persistent=False)
        self.inv_freqs = tuple(names.values())
        self.layers = nn.ModuleList(
            TorchLayer(spec, layer, w, weights.norm_offset, n_seqs, max_len, attend,
                       names[layer.attention.rope, layer.attention.head_dim])
            for layer, w in zip(spec.layers, weights.layers, strict=True))

    def run(self, ids, positions, is_decode):
        """Logits [n_seqs, vocab] float32 after ids [n_seqs, n] at positions [n]."""
        x = F.embedding(ids, self.embed) * self.embed_scale
        angles = {name: positions.float()[:, None] * getattr(self, name) for name in self.inv_freqs}
        for layer in self.layers:
            x = layer(x, angles[layer.inv_freq], positions, is_decode)
        x = norm(x[:, -1], self.norm, self.spec.norm_eps).to(x.dtype)
        logits = F.linear(x, self.head).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def expect_prompts(self, n):
        """Makes, once, what attention over prompts of n tokens wants where it is compiled for a GPU."""
        windows = {layer.attention.window for layer in self.layers} - {None}
        blocks = {window: window_blocks(window, n, self.embed.device) for window in windows if window < n}
        for layer in self.layers:
            if layer.attention.window in blocks:
                layer.blocks[n] = blocks[layer.attention.window]

    def prefill(self, ids):
        """Of whole prompts [n_seqs, n]; the cache is theirs afterwards."""
        return self.run(ids, torch.arange(ids.shape[1], device=ids.device), False)

    def decode(self, ids, position):
        """Of one more token each, ids [n_seqs, 1], at position [1]."""
        return self.run(ids, position, True)

    def fill_cache(self):
        """Random K and V of every position, as if so much context had been computed."""
        for layer in self.layers:
            layer.k.normal_()
            layer.v.normal_()


class Greedy:
    """Greedy decoding whose step reads and writes tensors at fixed addresses, so that a graph can be replayed."""

    def __init__(self, model, ids, position):
        self.model, self.decode = model, model.decode
        self.ids = ids.clone()                                  # [n_seqs, 1]
        self.position = torch.tensor([position], device=ids.device)

    def step(self):
        """Computes the next token of every sequence; nothing returns to the host."""
        logits = self.decode(self.ids, self.position)
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1
