"""Train a reward model on part of a file of chosen/rejected pairs with the demo's code, and score the rest.

    python examples/score_hh.py --data harmless-base-test.jsonl.gz --train-pairs 1600

The file is JSON lines of whole dialogues, as in anthropics/hh-rlhf. Everything is made on the spot and stays
on this machine: a tokenizer, a small language model of the chosen responses (the reference policy), the same
one a little later (the policy), and a reward model. Without ``--data`` or LSC_HH_DATA there is nothing to do,
and it says so.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lsc_kernels.demo import models, train
from lsc_kernels.demo.data import Pair
from lsc_kernels.score import ScoreConfig
from lsc_kernels.score.data import BadLine, Data
from lsc_kernels.score.pipeline import score


def main() -> None:
    options = parse()
    if options.data is None:
        print("score_hh: skipped; it wants a file of chosen/rejected pairs: --data FILE, or LSC_HH_DATA=FILE")
        return
    console = Console(highlight=False)
    torch.manual_seed(options.seed)
    pairs = read_pairs(options.data)
    random.Random(options.seed).shuffle(pairs)
    training, held_out = pairs[: options.train_pairs], pairs[options.train_pairs :]
    if not held_out:
        sys.exit(
            f"score_hh: {options.data} has {len(pairs)} pairs; --train-pairs must leave some of them to score"
        )
    console.print(f"{len(training)} pairs to train on, {len(held_out)} to score")

    with console.status("training") as status:
        started = time.perf_counter()
        tokenizer = models.build_tokenizer(
            [p.prompt + r for p in training for r in (p.chosen, p.rejected)], options.vocab
        )
        reference = models.build_language_model(tokenizer, hidden_size=options.hidden)

        def shown(what: str) -> train.Progress:
            return lambda done, steps, loss: status.update(f"{what}: step {done} of {steps}, loss {loss:.3f}")

        chosen = [(p.prompt, p.chosen) for p in training]
        train.train_language_model(
            reference, tokenizer, chosen, epochs=options.epochs, learning_rate=2e-3, progress=shown("policy")
        )
        policy = copy.deepcopy(reference)
        train.train_language_model(
            policy, tokenizer, chosen[:256], epochs=1, learning_rate=2e-4, progress=shown("policy, later")
        )
        reward_model = models.reward_model_from(reference)
        train.train_reward_model(
            reward_model, tokenizer, training,
            epochs=options.epochs, learning_rate=options.learning_rate, progress=shown("reward model"),
        )  # fmt: skip
    accuracy = train.pair_accuracy(reward_model, tokenizer, training)
    console.print(
        f"trained in {time.perf_counter() - started:.0f} s; {accuracy:.1%} right on its training pairs"
    )

    summary = score(
        ScoreConfig(
            data=[{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in held_out],
            policy=(policy, tokenizer),
            ref=(reference, tokenizer),
            reward_models=[(reward_model, tokenizer)],
            names=["harmless"],
            reference="quantile:0.85",
            kl="full",
            out=options.out,
            overwrite=True,
        )
    )
    console.print(summary)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LSC_HH_DATA") or None)
    parser.add_argument("--train-pairs", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("hh-rewards.parquet"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the reward model")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_pairs(path: Path) -> list[Pair]:
    """The readable pairs of the file; what cannot be read is counted out loud."""
    records = list(Data(path))
    bad = [record for record in records if isinstance(record, BadLine)]
    if bad:
        print(f"left out {len(bad)} lines; the first is line {bad[0].line}: {bad[0].reason}")
    pairs = []
    for record in records:
        if not isinstance(record, BadLine):
            chosen, rejected = record
            pairs.append(Pair(chosen.prompt_text, chosen.response, rejected.response))
    return pairs


if __name__ == "__main__":
    main()
