"""Command line: `python -m engine generate | chat | inspect | plan`, also installed as `rawgem`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from engine.draft_checkpoint import describe_draft, draft_path
from engine.errors import RawgemError
from engine.llm import LLM, plan
from engine.models import describe
from engine.models.presets import PRESETS
from engine.tensors import account, account_assistant, without_missing_media
from loaders.config import Config
from loaders.hub import resolve
from loaders.safetensors import Checkpoint

SAMPLING = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int,
            "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "min_tokens": int}
ENGINE = {"device": str, "dtype": str, "max_seq_len": int, "max_seqs": int, "max_batch_tokens": int, "page_size": int,
          "kv_cache_bytes": int, "memory_fraction": float, "ple": str, "draft": str, "draft_sampling": str,
          "n_draft_tokens": lambda text: int(text) if text.isdecimal() else text}
MEDIA = {"image_tokens": int, "video_tokens": int}


def main(argv=None):
    """Runs one command; returns the exit status. Errors a user can cause are printed as one line."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except RawgemError as error:
        print(f"rawgem: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                     # the reader has seen enough
        sys.stderr.close()
        return 1
    except (OSError, UnicodeError) as error:
        print(f"rawgem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="rawgem",
                                     description="Run Gemma and Llama 4 checkpoints, and see what they need.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help_text, *option_groups, model="checkpoint directory, or a Hugging Face repo id"):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.add_argument("model", help=model)
        for options in option_groups:
            for option, kind in options.items():
                sub.add_argument("--" + option.replace("_", "-"), type=kind, default=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        return sub

    def media(sub, use):
        for kind in ("image", "video"):
            sub.add_argument("--" + kind, action="append", default=[], metavar="FILE",
                             help=f"{kind} {use}; may be repeated")

    sub = command("generate", _generate, "Complete prompts.", ENGINE, SAMPLING, MEDIA)
    media(sub, "of the one prompt, which has a placeholder for it")
    sub.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    sub.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    sub.add_argument("--stop", action="append", default=[], help="a string that ends the text; may be repeated")
    sub.add_argument("--explain", action="store_true", help="also print what ran where")
    sub = command("chat", _chat, "Talk to a model: one line a turn, an empty line ends it.", ENGINE, SAMPLING, MEDIA)
    media(sub, "that the first message is about")
    sub.add_argument("--message", help="answer this one message and leave")
    sub.add_argument("--system", help="a system message")
    command("inspect", _inspect, "List a checkpoint's tensors and what the engine makes of each; with --draft those "
            "of a draft model for it.", {"draft": str})
    sub = command("plan", _plan, "What fits in memory, from config.json alone.", ENGINE,
                  model="checkpoint directory, a Hugging Face repo id, or one of " + ", ".join(PRESETS))
    sub.add_argument("--memory-bytes", type=float, help="memory to plan with, e.g. 141e9")
    return parser


def _given(args, options):
    return {name: getattr(args, name) for name in options if hasattr(args, name)}


def _params(args, llm, stop=()):
    """The checkpoint's generation defaults, with what the command line says on top; 256 tokens where neither says."""
    limit = {} if "max_tokens" in llm.generation.sampling else {"max_tokens": 256}
    return replace(llm.default_params, **{**limit, **_given(args, SAMPLING)}, stop=stop)


def _generate(args):
    prompts = args.prompt + (args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else [])
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise RawgemError("generate: no prompt; give --prompt TEXT or --prompts FILE")
    has_media = bool(args.image or args.video)
    if has_media and len(prompts) != 1:
        raise RawgemError(f"generate: --image and --video go with one prompt, {len(prompts)} came")
    llm = LLM(args.model, **_given(args, ENGINE))
    params = _params(args, llm, args.stop)
    began = perf_counter()
    outputs = llm.generate([{"prompt": prompt, "images": args.image, "videos": args.video, **_given(args, MEDIA)}
                            for prompt in prompts] if has_media else prompts, params)
    took = perf_counter() - began
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{prompt}{output.text}\n" if output.error is None else f"{prompt}\n  error: {output.error}\n")
    n_tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{n_tokens} tokens for {len(prompts)} prompts in {took:.2f} s: {n_tokens / took:.0f} tokens/s "
          f"({llm.lane.name})")
    if args.explain:
        print(llm.explain())
    return 0 if all(output.error is None for output in outputs) else 1


def _chat(args):
    llm = LLM(args.model, **_given(args, ENGINE))
    params = _params(args, llm)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        text = args.message or _ask()
        if not text:
            return
        parts = [{"type": kind, kind: file} for kind in ("image", "video") for file in getattr(args, kind)]
        is_first = not any(message["role"] == "user" for message in messages)
        content = [*parts, {"type": "text", "text": text}] if parts and is_first else text
        messages.append({"role": "user", "content": content})
        answer = ""
        for piece in llm.stream_chat(messages, params, **_given(args, MEDIA)):
            answer += piece.text
            print(piece.text, end="", flush=True)
        print()
        if args.message:
            return
        messages.append({"role": "assistant", "content": answer})


def _ask():
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _inspect(args):
    path = resolve(args.model)
    if draft := getattr(args, "draft", None):
        target, path = describe(Config.load(path)), draft_path(draft)
        checkpoint, spec = _listed(path), describe_draft(path, target)
        print(f"draft: {len(spec.layers)} layers, hidden {spec.hidden}, reading layers "
              f"{', '.join(map(str, spec.reads))} of the target")
        return _judged(checkpoint, account_assistant(spec, checkpoint.tensors))
    checkpoint, described = _listed(path), describe(Config.load(path))
    spec = without_missing_media(described, checkpoint.tensors)
    print(f"{spec.architecture}: {len(spec.layers)} layers, hidden {spec.hidden}, vocabulary {spec.vocab}")
    if described.media:
        print(f"vision: {spec.media.tower}" if spec.media else "vision: none, the checkpoint has no vision tensors")
    return _judged(checkpoint, account(spec, checkpoint.tensors))


def _listed(path):
    """The Checkpoint of a directory, closed; prints its tensors."""
    with Checkpoint.open(path) as checkpoint:
        for tensor in checkpoint.tensors.values():
            print(f"{tensor.dtype:<8} {list(tensor.shape)!s:<20} {tensor.name}")
    return checkpoint


def _judged(checkpoint, accounts):
    """Prints what is wrong with a Checkpoint by its Account; returns the exit status."""
    print(f"{len(checkpoint.tensors)} tensors, {checkpoint.n_bytes} bytes; {len(accounts.unused)} not read")
    for problem in accounts.problems:
        print(f"problem: {problem}")
    return 1 if accounts.problems else 0


def _plan(args):
    print(plan(args.model, memory_bytes=args.memory_bytes, **_given(args, ENGINE)))
