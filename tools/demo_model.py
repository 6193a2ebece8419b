"""The demo's models while they are trained: how they begin, what they are given, what they are told.

tools/train_demo.py trains them.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

from engine.vision import patches
from tools import demo_checkpoint as files
from tools import demo_pictures as pictures


# ---- models --------------------------------------------------------------------------------------------------------
def new_reader():
    """The text model alone."""
    return begun(Gemma4ForCausalLM(Gemma4TextConfig(**files.TEXT_CONFIG, attn_implementation="sdpa")).float())


def new_model(reader):
    """The reader's weights with a new tower before them; reader: the weights of a `new_reader`."""
    config = Gemma4Config(**files.CONFIG)
    config._attn_implementation = "sdpa"
    model = begun(Gemma4ForConditionalGeneration(config).float())
    for layer in model.model.vision_tower.encoder.layers:       # patches begin by looking at their like, near them
        layer.self_attn.k_proj.linear.weight.data.copy_(layer.self_attn.q_proj.linear.weight)
    new_rows = model.get_input_embeddings().weight[files.BEGIN_IMAGE:].detach().clone()
    model.model.language_model.load_state_dict({name.removeprefix("model."): one for name, one in reader.items()})
    with torch.no_grad():
        model.get_input_embeddings().weight[files.BEGIN_IMAGE:] = new_rows
    return model


def begun(model):
    """Random weights, scaled so that the residual stream, the attention scores and the logits begin of order 1."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, 0.6)        # q · k is not divided by sqrt(head_dim): its std is 2 or 3
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            torch.nn.init.constant_(weight, 0.5)
        elif name.endswith("position_embedding_table"):
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


# ---- examples ------------------------------------------------------------------------------------------------------
class Example(NamedTuple):
    """ids of a document; pixels [height, width, 3] uint8 as the engine resizes them, or None; labels: see `labels`."""

    ids: list
    pixels: np.ndarray | None = None
    labels: np.ndarray | None = None


class Pictures:
    """Examples of scenes, drawn when they are asked for. A scene's number says how it is drawn."""

    def __init__(self, scenes, seed, tokenizer, processor):
        self.scenes, self.seed, self.processor = scenes, seed, processor
        self.texts = [encoding.ids for encoding in tokenizer.encode_batch([scene.document() for scene in scenes])]

    def example(self, number):
        grammar = pictures.PictureGrammar(f"{self.seed} {number}", held_out=False)
        picture, boxes = grammar.draw(self.scenes[number].items)
        taken, text = self.processor.image(picture), self.texts[number]
        at = text.index(files.IMAGE)
        ids = [*text[:at], files.BEGIN_IMAGE, *[files.IMAGE] * taken.n_tokens, files.END_IMAGE, *text[at + 1:]]
        return Example(ids, taken.pixels, labels(self.scenes[number].items, boxes, taken.pixels))

    def lengths(self):
        return [len(text) + files.SOFT_TOKENS + 1 for text in self.texts]


def labels(items, boxes, pixels):
    """[n_soft, 3]: (colour, shape, place) at the middle of each soft token; colour and shape are the last where no
    item is."""
    height, width = (length // (files.PATCH * files.POOL) for length in pixels.shape[:2])
    y, x = (np.indices((height, width)).reshape(2, -1) + 0.5) / np.array([[height], [width]])
    found = np.stack([np.full(y.size, len(pictures.COLOURS)), np.full(y.size, len(pictures.SHAPES)),
                      (3 * y).astype(int) * 3 + (3 * x).astype(int)], axis=1)
    for item, (left, top, right, bottom) in zip(items, boxes, strict=True):
        inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
        found[inside, :2] = list(pictures.COLOURS).index(item.colour), list(pictures.SHAPES).index(item.shape)
    return found


def vision_inputs(pixels):
    """What the model takes besides ids: patches and their positions, padded to the longest picture."""
    each = [(patches.patches(one, files.PATCH), patches.positions(*patches.grid(one, files.PATCH))) for one in pixels]
    longest = max(len(values) for values, _ in each)
    values = torch.zeros(len(each), longest, each[0][0].shape[1])
    where = torch.full((len(each), longest, 2), -1)
    for row, (patch, position) in enumerate(each):
        values[row, :len(patch)] = torch.from_numpy(patch)
        where[row, :len(patch)] = torch.from_numpy(position)
    return {"pixel_values": values, "image_position_ids": where}


def token_logits(model, batch):
    """Logits for, and ids of, every token after <bos>: [n, longest - 1, vocab], [n, longest - 1]."""
    ids = torch.zeros(len(batch), max(len(one.ids) for one in batch), dtype=torch.long)     # padded on the right:
    for row, one in zip(ids, batch, strict=True):                                           # nothing sees it
        row[:len(one.ids)] = torch.tensor(one.ids)
    seen = {}
    if batch[0].pixels is not None:
        seen = {**vision_inputs([one.pixels for one in batch]), "mm_token_type_ids": (ids == files.IMAGE).long()}
    return model(input_ids=ids, use_cache=False, **seen).logits[:, :-1], ids[:, 1:]


def token_losses(model, batch):
    """-log P of every token after <bos>, and which of them are words: both [n_documents, longest - 1]."""
    logits, ids = token_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    words = (ids != files.SPECIAL.index("<pad>")) & (ids != files.IMAGE if batch[0].pixels is not None else True)
    return losses.view(len(batch), -1), words


def answers(batch):
    """[n_documents, longest - 1]: which tokens after <bos> the model says in a chat, the ends of its turns included."""
    begin, end = map(files.SPECIAL.index, ("<|turn>", "<turn|>"))
    told = torch.zeros(len(batch), max(len(one.ids) for one in batch), dtype=torch.bool)
    for row, one in zip(told, batch, strict=True):
        turns = [i for i, token in enumerate(one.ids) if token == begin]
        for turn in turns[1::2]:                                    # a user's turn, a model's turn, ...
            row[turn + 3:one.ids.index(end, turn) + 1] = True       # behind "<|turn>", "model" and "\n"
    return told[:, 1:]


class Teacher(torch.nn.Module):
    """While training only: reads off each soft token what stands there, so that the tower learns to see by itself."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(pictures.COLOURS) + 1, len(pictures.SHAPES) + 1, len(pictures.PLACES)]
        self.head = torch.nn.Linear(files.TEXT_CONFIG["hidden_size"], sum(self.sizes))

    def forward(self, soft, batch):
        """The mean loss of soft tokens [n, hidden]; where no item is, a token counts a third."""
        wanted = torch.from_numpy(np.concatenate([one.labels for one in batch]))
        weight = torch.where(wanted[:, 0] < len(pictures.COLOURS), 1.0, 0.3)
        parts = self.head(soft).split(self.sizes, dim=-1)
        return sum((torch.nn.functional.cross_entropy(part, wanted[:, i], reduction="none") * weight).mean()
                   for i, part in enumerate(parts))
