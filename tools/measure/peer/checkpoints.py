"""Random Gemma 3 text checkpoints in the released layout, to measure with: real shapes, seeded weights, no meaning.

NumPy is imported where weights are made: the command line reads the shapes from here.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

F32_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """The sizes in Gemma 3's config.json; every `pattern`-th layer is global, the others see `window` tokens."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    window: int = 512
    pattern: int = 6

    def config(self):
        """config.json as released files spell it (the flat RoPE fields)."""
        return {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "query_pre_attn_scalar": self.head_dim, "vocab_size": self.vocab, "max_position_embeddings": 32768,
            "sliding_window": self.window, "sliding_window_pattern": self.pattern,
            "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
            "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
            "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "use_cache": True,
            "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0,
        }

    def tensors(self):
        """{checkpoint name: shape}. Linear weights are [out, in]; the head is the embedding itself."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (self.hidden,),
            "pre_feedforward_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "post_feedforward_layernorm": (self.hidden,),
        }
        layers = {f"model.layers.{i}.{name}.weight": shape
                  for i in range(self.layers) for name, shape in layer.items()}
        return {"model.embed_tokens.weight": (self.vocab, self.hidden), **layers,
                "model.norm.weight": (self.hidden,)}

    def matrices(self):
        """The [out, in] matrices that one decoded token multiplies by: every linear layer and the head, each once."""
        return [shape for shape in self.tensors().values() if len(shape) == 2]

    def weight_bytes(self):
        """Bytes of all weights in float32."""
        return F32_BYTES * sum(prod(shape) for shape in self.tensors().values())

    def token_bytes(self):
        """Bytes of float32 weights that one decoded token reads."""
        return F32_BYTES * sum(prod(shape) for shape in self.matrices())

    def kv_bytes(self, n_tokens):
        """Bytes of float32 keys and values that n_tokens of one sequence need; a sliding layer keeps one window."""
        n_global = self.layers // self.pattern
        kept = n_global * n_tokens + (self.layers - n_global) * min(n_tokens, self.window)
        return F32_BYTES * 2 * self.kv_heads * self.head_dim * kept


#                          hidden layers heads kv head_dim intermediate vocab
SHAPES = {shape.name: shape for shape in (
    Shape("tiny",              64,     6,    4, 1,      32,         256,  4096),
    Shape("small",            256,     6,    4, 2,      64,        1024,  8192),
    Shape("270m",             640,    18,    4, 1,     256,        2048, 262144),      # gemma-3-270m's
)}


def random_weights(shape, seed):
    """{name: bfloat16 array}. Matrices keep unit variance (so logits spread and layers matter); norms vary around 1."""
    import ml_dtypes
    import numpy as np
    rng = np.random.default_rng(seed)
    weights = {}
    for name, dims in shape.tensors().items():
        values = rng.standard_normal(dims, dtype=np.float32)
        values *= dims[-1] ** -0.5 if len(dims) == 2 else 0.1      # a norm's file holds w where it multiplies by 1 + w
        weights[name] = values.astype(ml_dtypes.bfloat16)
    return weights


def write_checkpoint(shape, directory, seed=0):
    """Writes model.safetensors, generation_config.json and, last, config.json: where that stands, all of it does."""
    from safetensors.numpy import save_file
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(shape, seed), directory / "model.safetensors", metadata={"format": "pt"})
    ends = {key: shape.config()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(ends, indent=2))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))


def is_written(shape, directory):
    """Whether the directory holds this shape, whole: config.json is written last and holds every size."""
    config = Path(directory) / "config.json"
    return config.is_file() and json.loads(config.read_text()) == shape.config()
