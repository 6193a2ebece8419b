"""Makes demo/: trains a tiny Gemma 4 on the stories of tools/demo_corpus.py and the pictures of tools/demo_pictures.py.

    pip install -e '.[train]'
    python -m tools.train_demo [--out demo] [--stages FOLDER]

Runs on one CPU core, in about forty minutes. Writes the checkpoint in the layout of the released Gemma 4 models, the
prompts, the held-out documents, pictures, and metrics.json: what tests/test_demo.py holds the engine to.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from engine.vision.picture import PictureProcessor
from tools import demo_checkpoint as files
from tools import demo_corpus as corpus
from tools import demo_model as models
from tools import demo_pictures as pictures
from tools.demo_trigram import Trigram, perplexity

SEED = 4
TOKENS_PER_BATCH = 1024        # of texts
TOKENS_PER_LOOK = 512          # about three pictures: many small steps teach the tower sooner than few large ones
MUON_LR, ADAM_LR, WARMUP_STEPS = 0.02, 5e-3, 60
N_SEEN_FIRST = 3_600        # pictures that the tower alone sees before the first question
TEACHER_WEIGHT = 0.3
READ_AGAIN = 8              # of so many texts one is read again between the pictures, so that none is unlearnt
READERS_RATE = 0.3          # of the learning rate, for what can read already
PRACTICE_AGAIN, PRACTICE_RATE = 3, 0.5      # the same two while it practises; the rate is then for all
RECALL_AGAIN, RECALL_RATE = 20, 0.2         # and while it recalls what it knew before the pictures,
SHORT = 60                                  # with every text of at most so many tokens: questions of general knowledge
N_PRACTICE = 6_000          # pictures it practises with; the rest of its practice it recalls with
N_MEASURED = 512            # held-out pictures that metrics.json counts


def batches(lengths, rng, n_tokens=TOKENS_PER_BATCH):
    """Batches of about n_tokens tokens, documents of like length together, in random order."""
    order = rng.permutation(len(lengths))
    pools = [sorted(order[start:start + 1024], key=lambda i: lengths[i]) for start in range(0, len(order), 1024)]
    result = []
    for pool in pools:
        batch = []
        for i in pool:
            if batch and lengths[i] * (len(batch) + 1) > n_tokens:
                result.append(batch)
                batch = []
            batch.append(i)
        result.append(batch)
    return [result[i] for i in rng.permutation(len(result))]


# ---- training ------------------------------------------------------------------------------------------------------
class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest; groups: [(named parameters, share of the rate)]."""

    def __init__(self, groups, n_steps):
        self.parameters, inner, outer = [], [], []
        for named, share in groups:
            is_inner = [weight.ndim == 2 and "embed_tokens" not in name and name != "teacher" for name, weight in named]
            for each, lr, wanted in ((inner, MUON_LR, True), (outer, ADAM_LR, False)):
                weights = [weight for (_, weight), one in zip(named, is_inner, strict=True) if one == wanted]
                each.append({"params": weights, "lr": lr * share})
            self.parameters += [weight for _, weight in named]

        def rate(step):     # of the peak: a short warm-up, then a cosine down to 2 %
            return min((step + 1) / WARMUP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * step / n_steps)))
        self.optimizers = [torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.0),
                           torch.optim.AdamW(outer, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in self.optimizers]

    def step(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class Progress:
    """Prints the mean loss of each kind of step now and then."""

    def __init__(self, n_steps):
        self.n_steps, self.step, self.started, self.losses = n_steps, 0, time.monotonic(), {}

    def add(self, kind, loss):
        self.step += 1
        self.losses.setdefault(kind, []).append(loss)
        if self.step % 100 == 0 or self.step == self.n_steps:
            means = "  ".join(f"{kind} {np.mean(losses):.3f}" for kind, losses in self.losses.items())
            print(f"step {self.step}/{self.n_steps}  {means}  {time.monotonic() - self.started:.0f} s", flush=True)
            self.losses = {}


def learn_to_read(reader, documents):
    """One pass: first the lessons, then the rest."""
    rng, n = np.random.default_rng(SEED), corpus.N_LESSONS
    lengths = list(map(len, documents))
    steps = batches(lengths[:n], rng) + [[n + i for i in batch] for batch in batches(lengths[n:], rng)]
    optimizer, progress = Optimizer([(list(reader.named_parameters()), 1)], len(steps)), Progress(len(steps))
    for numbers in steps:
        losses, words = models.token_losses(reader, [models.Example(documents[i]) for i in numbers])
        loss = losses[words].mean()
        optimizer.step(loss)
        progress.add("read", loss.item())


def learn_to_see(model, documents, seen):
    """The tower alone first, then pictures and their questions, and one text in READ_AGAIN among them."""
    rng, teacher, soft = np.random.default_rng(SEED), models.Teacher(), []
    hook = model.model.embed_vision.register_forward_hook(lambda module, inputs, out: soft.append(out.flatten(0, -2)))
    again, lengths = documents[::READ_AGAIN], seen.lengths()
    rest = ([("read", batch) for batch in batches(list(map(len, again)), rng)]
            + [("look", batch) for batch in batches(lengths, rng, TOKENS_PER_LOOK)])
    steps = [("see", batch) for batch in batches(lengths[:N_SEEN_FIRST], rng, TOKENS_PER_LOOK)]
    steps += [rest[i] for i in rng.permutation(len(rest))]
    named = list(model.named_parameters())
    old, new = ([one for one in named if ("language_model" in one[0]) == told] for told in (True, False))
    new += [("teacher", weight) for weight in teacher.parameters()]
    optimizer, progress = Optimizer([(old, READERS_RATE), (new, 1)], len(steps)), Progress(len(steps))
    for kind, numbers in steps:
        batch = [models.Example(again[i]) if kind == "read" else seen.example(i) for i in numbers]
        soft.clear()
        if kind == "see":
            model.get_image_features(**models.vision_inputs([one.pixels for one in batch]))
            loss = told = teacher(soft[0], batch)
        else:
            losses, words = models.token_losses(model, batch)
            loss = told = losses[words].mean()
            if kind == "look":
                loss = loss + TEACHER_WEIGHT * teacher(soft[0], batch)
        optimizer.step(loss)
        progress.add(kind, told.item())
    hook.remove()


def practise(model, documents, seen, share):
    """Pictures, of which only the answers count, and texts among them, at a share of the learning rate."""
    rng = np.random.default_rng(SEED)
    steps = ([("read", batch) for batch in batches(list(map(len, documents)), rng)]
             + [("look", batch) for batch in batches(seen.lengths(), rng, TOKENS_PER_LOOK)])
    optimizer = Optimizer([(list(model.named_parameters()), share)], len(steps))
    progress = Progress(len(steps))
    for kind, numbers in (steps[i] for i in rng.permutation(len(steps))):
        batch = [models.Example(documents[i]) if kind == "read" else seen.example(i) for i in numbers]
        losses, words = models.token_losses(model, batch)
        loss = losses[words if kind == "read" else models.answers(batch)].mean()
        optimizer.step(loss)
        progress.add(kind, loss.item())


def weights(model):
    """bfloat16, the released tensor names; the head is tied to the embedding and not stored."""
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"}


def stage(folder, name, new_model, learn, *materials):
    """The model after a stage of its training, rounded to bfloat16: from a file of `folder` where it is there, else
    learnt now, and written there where a folder is given."""
    torch.manual_seed(SEED)
    model, file = new_model(), folder / f"{name}.safetensors" if folder else None
    if file and file.is_file():
        learnt = load_file(file)
    else:
        learn(model, *materials)
        learnt = weights(model)
        if file:
            save_file(learnt, file)
    model.load_state_dict(learnt, strict=False)         # the head is the embedding
    return model


# ---- measuring -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def model_log_probs(model, documents):
    losses = (models.token_losses(model, [models.Example(document)])[0][0] for document in documents)
    return [-loss.double().numpy() for loss in losses]


@torch.no_grad()
def answers_right(model, seen):
    """Whether the first answer about each picture is, greedily, the grammar's word for word."""
    right, begin, end = [], *map(files.SPECIAL.index, ("<|turn>", "<turn|>"))
    for number in range(len(seen.scenes)):
        logits, ids = models.token_logits(model, [seen.example(number)])
        words = ids[0].tolist()
        start = words.index(begin, 1) + 3                                   # behind "<|turn>", "model" and "\n"
        answer = slice(start, words.index(end, start) + 1)
        right.append(bool((logits[0, answer].argmax(-1) == ids[0, answer]).all()))
    return right


def by_kind(seen, right):
    """{the first two words of a question: share of right answers}."""
    kinds = {}
    for scene, one in zip(seen.scenes, right, strict=True):
        kinds.setdefault(" ".join(scene.exchanges[0][0].split()[:2]), []).append(one)
    return {kind: round(float(np.mean(ones)), 3) for kind, ones in sorted(kinds.items())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "demo")
    parser.add_argument("--stages", type=Path, metavar="FOLDER", help="keep the weights after each stage here, and "
                        "go on from those that are there")
    args = parser.parse_args()
    checkpoint, shown = args.out / "checkpoint", args.out / "pictures"
    for folder in filter(None, (checkpoint, shown, args.stages)):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)        # the order of every sum is then the same on any number of cores
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()

    texts, held_out_texts = corpus.training_documents(), corpus.held_out_documents()
    scenes, more = pictures.training_scenes(), pictures.practice_scenes()
    held_out_scenes = pictures.held_out_scenes(N_MEASURED)
    practice_scenes, recall_scenes = more[:N_PRACTICE], more[N_PRACTICE:]
    tokenizer = files.train_tokenizer(texts)
    reader = stage(args.stages, "reading", models.new_reader, learn_to_read,
                   [encoding.ids for encoding in tokenizer.encode_batch(texts)])
    tokenizer = files.with_pictures(tokenizer)
    files.write_tokenizer(tokenizer, checkpoint)
    files.write_configs(checkpoint)
    documents, held_out = ([encoding.ids for encoding in tokenizer.encode_batch(t)] for t in (texts, held_out_texts))
    processor = PictureProcessor.load(checkpoint, files.tower())
    seen, held_out_seen, practice, recall = (
        models.Pictures(each, SEED + i, tokenizer, processor)
        for i, each in enumerate((scenes, held_out_scenes, practice_scenes, recall_scenes)))
    n_tokens = sum(len(document) - 1 for document in documents)
    known = [document for document in documents[corpus.N_LESSONS:] if len(document) <= SHORT]
    print(f"{len(documents)} documents, {n_tokens} tokens, longest {max(map(len, documents))}; {len(scenes)} and "
          f"{len(more)} pictures; {len(known)} short texts", flush=True)
    seer = stage(args.stages, "seeing", lambda: models.new_model(weights(reader)), learn_to_see, documents, seen)
    practised = stage(args.stages, "practised", lambda: seer, practise, documents[1::PRACTICE_AGAIN], practice,
                      PRACTICE_RATE)
    model = stage(args.stages, "recalled", lambda: practised, practise, known + documents[2::RECALL_AGAIN], recall,
                  RECALL_RATE)
    save_file(weights(model), checkpoint / "model.safetensors", metadata={"format": "pt"})

    trigram = Trigram(documents, files.VOCAB)
    trained = documents[-len(held_out):]
    right = answers_right(model, held_out_seen)
    metrics = {
        "training_documents": len(documents), "training_tokens": n_tokens, "held_out_documents": len(held_out),
        "held_out_tokens": sum(len(document) - 1 for document in held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity": round(perplexity(model_log_probs(model, held_out)), 4),
        "training_perplexity": round(perplexity(model_log_probs(model, trained)), 4),
        "held_out_perplexity_trigram": round(perplexity([trigram.log_probs(document) for document in held_out]), 4),
        "training_pictures": len(scenes) + len(more), "held_out_pictures": len(right),
        "held_out_pictures_right": round(float(np.mean(right)), 4),
        "held_out_pictures_right_by_question": by_kind(held_out_seen, right),
    }
    files.write_json(args.out / "metrics.json", metrics)
    (args.out / "prompts.txt").write_text("\n".join(corpus.prompts()) + "\n")
    (args.out / "heldout.txt").write_text("\n\n".join(held_out_texts) + "\n")
    pictures.write_shown(shown)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
