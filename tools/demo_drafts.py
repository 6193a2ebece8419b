"""Shows what drafts do: the demo's stories with demo/assistant and without it, how many drafts held, and whether the
text is the same text.

    python -m tools.demo_drafts [MODEL DRAFT] [--prompts FILE] [--max-tokens N] [--n-draft-tokens K]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from engine import LLM, SamplingParams

DEMO = Path(__file__).resolve().parent.parent / "demo"


def compare(model, draft, prompts, n_draft_tokens, max_tokens):
    """Yields (what, the outputs without drafts, those with, the counters of the drafts) of greedy and of drawn text."""
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0)
    for what, params in (("greedy", greedy), ("temperature 1, seed 0", replace(greedy, temperature=1.0, seed=0))):
        plain, drafting = (LLM(model, progress=False, **more) for more in
                           ({}, {"draft": draft, "n_draft_tokens": n_draft_tokens}))
        outputs = [llm.generate(prompts, params) for llm in (plain, drafting)]
        yield what, *outputs, drafting.stats()["drafts"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO / "checkpoint")
    parser.add_argument("draft", nargs="?", default=DEMO / "assistant")
    parser.add_argument("--prompts", type=Path, default=DEMO / "prompts.txt", help="one a line")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--n-draft-tokens", type=int, default=4)
    args = parser.parse_args()
    prompts, differ = args.prompts.read_text().splitlines(), 0
    for what, plain, drafted, stats in compare(args.model, args.draft, prompts, args.n_draft_tokens, args.max_tokens):
        others = sum(one.token_ids != other.token_ids for one, other in zip(plain, drafted, strict=True))
        share = stats["accepted"] / stats["drafted"] if stats["drafted"] else 0
        places = " ".join(f"{100 * rate:.0f}" for rate in stats["acceptance"])
        print(f"{what}: {stats['accepted']} of {stats['drafted']} drafted tokens held ({100 * share:.0f} %; by place "
              f"{places} %), {stats['tokens_per_step']:.2f} tokens a step; "
              + (f"{others} of {len(plain)} texts differ from those without drafts" if others else
                 "the text is the same as without drafts"))
        differ += others
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
