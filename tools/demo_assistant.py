"""Makes demo/assistant: trains a tiny draft model of demo/checkpoint, in the layout of the Gemma 4 Assistants.

    pip install -e '.[train]'
    python -m tools.demo_assistant [--target demo/checkpoint] [--out demo/assistant]

Runs on one CPU core, in about seven minutes, after tools/train_demo.py. The target stays as it is: its states, K and V
are what the assistant reads, its distributions are what the assistant learns. Writes metrics.json beside the weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from tools import demo_checkpoint as files
from tools import demo_corpus as corpus
from tools.train_demo import Optimizer, Progress, batches

SEED = 7
ROUNDS = 3                  # tokens drafted in a row while training
EVERY = 2                   # of so many training documents one is read
CENTROID_WEIGHT = 0.3       # of the loss of the choice of centroids, beside that of tokens
TARGET, EPS = files.TEXT_CONFIG, files.TEXT_CONFIG["rms_norm_eps"]
HIDDEN, BACKBONE, N_CENTROIDS, N_CHOSEN = 64, TARGET["hidden_size"], 64, 8
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
TEXT_CONFIG = {**TARGET, "final_logit_softcapping": None, "hidden_size": HIDDEN, "intermediate_size": 192,
               "layer_types": KINDS, "num_hidden_layers": len(KINDS), "num_kv_shared_layers": len(KINDS),
               "use_bidirectional_attention": None, "vocab_size_per_layer_input": 0}
CONFIG = {
    "architectures": ["Gemma4AssistantForCausalLM"],
    "backbone_hidden_size": BACKBONE,
    "boi_token_id": files.BEGIN_IMAGE,
    "centroid_intermediate_top_k": N_CHOSEN,
    "dtype": "bfloat16",
    "eoi_token_id": files.END_IMAGE,
    "eos_token_id": files.CONFIG["eos_token_id"],
    "image_token_id": files.IMAGE,
    "model_type": "gemma4_assistant",
    "num_centroids": N_CENTROIDS,
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": True,
    "use_ordered_embeddings": True,
}


# ---- the target, read only -----------------------------------------------------------------------------------------
class Target:
    """The frozen target: of each text its states, its logits, and K and V of its last layer of each kind."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32,
                                                                 attn_implementation="sdpa").requires_grad_(False)
        self.text, self._seen = self.model.model.language_model, {}
        self.embed = self.text.embed_tokens                 # times sqrt(hidden)
        for kind in set(KINDS):
            last = max(i for i, one in enumerate(TARGET["layer_types"]) if one == kind)
            for name in ("k_norm", "v_norm"):
                getattr(self.text.layers[last].self_attn, name).register_forward_hook(
                    lambda module, inputs, out, key=(kind, name): self._seen.update({key: out}))

    @torch.no_grad()
    def read(self, ids):
        """(states [n, length, hidden], logits [n, length, vocab], {kind: (k, v) [n, heads, length, head_dim]})."""
        states = self.text(input_ids=ids, use_cache=False).last_hidden_state
        cap = TARGET["final_logit_softcapping"]
        kv = {kind: (rotated(self._seen[kind, "k_norm"], kind).transpose(1, 2),
                     self._seen[kind, "v_norm"].transpose(1, 2)) for kind in set(KINDS)}
        return states, cap * torch.tanh(self.model.lm_head(states) / cap), kv


def rotated(x, kind):
    """x [n, length, heads, head_dim] at positions 0, 1, ...; pairs (i, i + head_dim / 2), of which some do not turn."""
    rope, head_dim = TARGET["rope_parameters"][kind], x.shape[-1]
    n = int(rope.get("partial_rotary_factor", 1) * head_dim / 2)
    rates = torch.zeros(head_dim // 2)
    rates[:n] = rope["rope_theta"] ** (-2 * torch.arange(n) / head_dim)
    angles = torch.outer(torch.arange(x.shape[1]), rates)[:, None]
    low, high = x.chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def visible(length, kind):
    """[length, length] bool: which keys a query at each position sees, itself among them."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    return (back >= 0) & (back < (TARGET["sliding_window"] if kind == "sliding_attention" else length))


# ---- the assistant -------------------------------------------------------------------------------------------------
class RmsNorm(nn.Module):
    def __init__(self, width, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), weight))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


def linear(n_in, n_out):
    module = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(module.weight, std=n_in ** -0.5)
    return module


class Layer(nn.Module):
    """Queries only; the names are the checkpoint's."""

    def __init__(self, kind):
        super().__init__()
        self.kind, n_heads = kind, TARGET["num_attention_heads"]
        head_dim = TARGET["head_dim" if kind == "sliding_attention" else "global_head_dim"]
        inner = TEXT_CONFIG["intermediate_size"]
        self.input_layernorm, self.pre_feedforward_layernorm = RmsNorm(HIDDEN), RmsNorm(HIDDEN)
        self.post_attention_layernorm, self.post_feedforward_layernorm = RmsNorm(HIDDEN, 0.5), RmsNorm(HIDDEN, 0.5)
        self.self_attn = nn.ModuleDict({"q_proj": linear(HIDDEN, n_heads * head_dim), "q_norm": RmsNorm(head_dim, 0.6),
                                        "o_proj": linear(n_heads * head_dim, HIDDEN)})
        self.mlp = nn.ModuleDict({"gate_proj": linear(HIDDEN, inner), "up_proj": linear(HIDDEN, inner),
                                  "down_proj": linear(inner, HIDDEN)})
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x, k, v):
        attention, mlp = self.self_attn, self.mlp
        q = attention.q_norm(attention.q_proj(self.input_layernorm(x)).unflatten(-1, (-1, k.shape[-1])))
        q = rotated(q, self.kind).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q, k, v, visible(k.shape[2], self.kind), scale=1.0, enable_gqa=True)
        x = x + self.post_attention_layernorm(attention.o_proj(seen.transpose(1, 2).flatten(2)))
        y = self.pre_feedforward_layernorm(x)
        y = mlp.down_proj(F.gelu(mlp.gate_proj(y), approximate="tanh") * mlp.up_proj(y))
        return (x + self.post_feedforward_layernorm(y)) * self.layer_scalar


class Assistant(nn.Module):
    def __init__(self, ordering):
        super().__init__()
        self.pre_projection, self.post_projection = linear(2 * BACKBONE, HIDDEN), linear(HIDDEN, BACKBONE)
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(files.VOCAB, HIDDEN), "norm": RmsNorm(HIDDEN),
                                    "layers": nn.ModuleList(map(Layer, KINDS))})
        nn.init.normal_(self.model.embed_tokens.weight, std=HIDDEN ** -0.5)
        self.masked_embedding = nn.ModuleDict({"centroids": linear(HIDDEN, N_CENTROIDS)})
        self.masked_embedding.register_buffer("token_ordering", ordering)

    def forward(self, embedded, states, kv):
        """One step at every position of every text: (g [n, length, hidden], the states of the next step)."""
        x = self.pre_projection(torch.cat([embedded, states], -1))
        for layer in self.model.layers:
            x = layer(x, *kv[layer.kind])
        g = self.model.norm(x)
        return g, self.post_projection(g)

    def logits(self, g):
        return g @ self.model.embed_tokens.weight.T, self.masked_embedding.centroids(g)

    def likeliest(self, g):
        """Of the tokens of the N_CHOSEN likeliest centroids."""
        tokens, centroids = self.logits(g)
        candidates = self.masked_embedding.token_ordering.view(N_CENTROIDS, -1)[centroids.topk(N_CHOSEN).indices]
        candidates = candidates.flatten(-2)
        return candidates.gather(-1, tokens.gather(-1, candidates).argmax(-1, keepdim=True))[..., 0]


def ordered(rows):
    """[vocab]: token ids, those of a centroid together: the target's embeddings, halved along their widest direction
    until there are N_CENTROIDS parts."""
    parts = [torch.arange(len(rows))]
    while len(parts) < N_CENTROIDS:
        parts = [half for part in parts for half in halves(rows, part)]
    return torch.cat(parts)


def halves(rows, part):
    away = rows[part] - rows[part].mean(0)
    direction = torch.linalg.svd(away, full_matrices=False)[2][0]
    return part[(away @ direction).argsort(stable=True)].chunk(2)


# ---- training ------------------------------------------------------------------------------------------------------
def drafted(assistant, target, documents):
    """Yields (g [n_slots, hidden], the target's logits [n_slots, vocab]) of each step of a round from every position
    of the documents, along their own text: a later draft counts only where those before it are the text."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest + ROUNDS, dtype=torch.long)
    for row, document in zip(ids, documents, strict=True):
        row[:len(document)] = torch.tensor(document)
    lengths = torch.tensor(list(map(len, documents)))[:, None]
    state, logits, kv = target.read(ids)
    kv = {kind: (k[:, :, :longest], v[:, :, :longest]) for kind, (k, v) in kv.items()}
    state = state[:, :longest]
    for step in range(ROUNDS):
        tokens = slice(1 + step, 1 + step + longest)                # of position P: P + 1 + step
        g, state = assistant(target.embed(ids[:, tokens]), state, kv)
        told = torch.arange(longest) + 1 + step < lengths - 1       # the last token says nothing
        yield g[told], logits[:, tokens][told]


def loss_of(assistant, target, documents):
    """The mean cross-entropy against the target's distributions, of tokens and of centroids."""
    order, losses = assistant.masked_embedding.token_ordering, []
    for g, wanted in drafted(assistant, target, documents):
        tokens, centroids = assistant.logits(g)
        wanted = wanted.softmax(-1)
        losses.append(F.cross_entropy(tokens, wanted) + CENTROID_WEIGHT
                      * F.cross_entropy(centroids, wanted[:, order].unflatten(-1, (N_CENTROIDS, -1)).sum(-1)))
    return torch.stack(losses).mean()


def learn(assistant, target, documents):
    steps = batches(list(map(len, documents)), np.random.default_rng(SEED))
    optimizer, progress = Optimizer([(list(assistant.named_parameters()), 1)], len(steps)), Progress(len(steps))
    for numbers in steps:
        loss = loss_of(assistant, target, [documents[i] for i in numbers])
        optimizer.step(loss)
        progress.add("draft", loss.item())


@torch.no_grad()
def agreement(assistant, target, documents):
    """[ROUNDS]: the share of drafts that are the target's likeliest token, where those before them are the text."""
    right = [[] for _ in range(ROUNDS)]
    for document in documents:
        for found, (g, wanted) in zip(right, drafted(assistant, target, [document]), strict=True):
            found.append(assistant.likeliest(g) == wanted.argmax(-1))
    return [round(torch.cat(found).double().mean().item(), 4) for found in right]


def main():
    demo = Path(__file__).resolve().parent.parent / "demo"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=demo / "checkpoint")
    parser.add_argument("--out", type=Path, default=demo / "assistant")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)        # the order of every sum is then the same on any number of cores
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    documents, held_out = ([encoding.ids for encoding in tokenizer.encode_batch(texts)]
                           for texts in (corpus.training_documents()[::EVERY], corpus.held_out_documents()))
    target = Target(args.target)
    assistant = Assistant(ordered(target.embed.weight))
    learn(assistant, target, documents)
    weights = {name: tensor if tensor.dtype == torch.long else tensor.to(torch.bfloat16)
               for name, tensor in assistant.state_dict().items()}
    assistant.load_state_dict(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, args.out / "model.safetensors",
              metadata={"format": "pt"})
    files.write_json(args.out / "config.json", CONFIG)
    metrics = {"training_documents": len(documents), "training_tokens": sum(len(one) - 1 for one in documents),
               "parameters": sum(parameter.numel() for parameter in assistant.parameters()),
               "held_out_agreement": agreement(assistant, target, held_out)}
    files.write_json(args.out / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
