"""``lsc-kernels score``: scores, utilities, KL and rewards per token for every row of a data set.

The command line is here; the work is in `lsc_kernels.score.pipeline`, which also is the function to call from
Python: ``score(ScoreConfig(...))``. Nothing beyond the core is imported until a run starts.
"""

from __future__ import annotations

import argparse
import sys

from .config import CHAT_MODES, DTYPES, EOS_MODES, KL_KINDS, PLACEMENTS, ScoreConfig

__all__ = ["ScoreConfig", "add_arguments", "run"]

INTERRUPTED = 130  # what a shell gives a command that was interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lsc-kernels score`` to a parser."""
    parser.description = (
        "Score every (prompt, response) of a data set with a policy, its reference model and reward models. "
        "Writes scores, utilities, log-probabilities, KL and rewards per token to a Parquet file."
    )
    _add_inputs(parser.add_argument_group("what to score"))
    _add_rewards(parser.add_argument_group("from scores to rewards"))
    _add_text(parser.add_argument_group("how text becomes tokens"))
    _add_running(parser.add_argument_group("running"))


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        required=True,
        help="JSON lines (.jsonl, .jsonl.gz), Parquet, a saved dataset, or a hub dataset (name:split)",
    )
    group.add_argument("--policy", required=True, help="causal language model: a folder or a hub name")
    group.add_argument("--ref", required=True, help="reference model of the policy: a folder or a hub name")
    group.add_argument(
        "--reward-model",
        dest="reward_models",
        action="append",
        required=True,
        metavar="MODEL",
        help="sequence-classification model: a folder or a hub name; repeat for more properties",
    )
    group.add_argument(
        "--names", type=_words, help="names of the properties, with commas (default: the models')"
    )
    group.add_argument("--out", required=True, help="Parquet file to write")
    group.add_argument("--plot", help="also draw one figure into this file (.png, .pdf, .svg)")
    group.add_argument("--limit", type=int, help="take this many records only")
    group.add_argument("--seed", type=int, help="with --limit: take them at random instead of the first ones")


def _add_rewards(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reference",
        action="append",
        help="reference reward: a number, quantile:0.85 of this file's scores (default), "
        "prompt-quantile:0.85 among the responses to the same prompt, column:NAME of the data, or "
        "canned:TEXT, scored as the response to the same prompt; repeat to give one per property",
    )
    group.add_argument(
        "--scale", type=_numbers, default=(1.0,), help="Bradley-Terry temperature, one or one per property"
    )
    group.add_argument(
        "--floor", type=_numbers, default=(0.0,), help="rate at which the judge is wrong, one or one each"
    )
    group.add_argument(
        "--weights", type=_numbers, default=(1.0,), help="exponent of each property's probability"
    )
    group.add_argument("--kl", choices=KL_KINDS, default="k3", help="KL per token (default: %(default)s)")
    group.add_argument(
        "--beta", type=float, default=0.05, help="weight of the KL in the rewards (default: %(default)s)"
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="last",
        help="token that gets the utility (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of both language models (default: %(default)s)"
    )


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat",
        choices=CHAT_MODES,
        default="auto",
        help="use a tokenizer's chat template for chats (auto), for plain prompts too (always), or never",
    )
    group.add_argument(
        "--eos",
        choices=EOS_MODES,
        default="policy",
        help="end plain text with the end-of-sequence token: for the policy, for all models, or for none",
    )
    group.add_argument(
        "--max-length", type=int, help="most tokens of prompt and response (default: what the model takes)"
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size", type=int, help="most rows of a batch (default: as many as --max-tokens allows)"
    )
    group.add_argument(
        "--max-tokens", type=int, help="most tokens of a batch (default: 2048 on a CPU, 8192 on a GPU)"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the models (auto: float32 on a CPU, their own on a GPU)",
    )
    group.add_argument(
        "--device", default="auto", help="auto (a GPU when there is one), cpu, cuda, cuda:1, ..."
    )
    group.add_argument("--threads", type=int, help="CPU threads")
    group.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    group.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    group.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=20.0,
        help="how often finished rows are kept on disk (default: %(default)s)",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="allow models that bring their own code"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options; returns the exit code.

    Raises:
        UserError: a mistake of the user, in one line.
    """
    from .extras import require

    require("rich")
    from rich.console import Console

    from .pipeline import score

    options = {name: getattr(args, name) for name in ScoreConfig.__dataclass_fields__}
    if options["reference"] is None:
        del options["reference"]
    try:
        summary = score(ScoreConfig(**options))
    except KeyboardInterrupt:
        print("interrupted; the finished rows are kept, --resume goes on with them", file=sys.stderr)
        return INTERRUPTED
    Console(highlight=False, markup=False).print(summary)
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: wants numbers with commas between them") from None
