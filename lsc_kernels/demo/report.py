"""What the demo says, in plain words: about two screens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import lsc_kernels as lk

from ..score.summary import ScoreSummary
from . import train
from .chain import QUANTILE, Models, References
from .data import PROPERTIES, REFUSAL, Split, conflict
from .findings import FAILING_GRADE, Findings
from .speed import EAGER, OURS, Cell, Shape

WIDTH = 100


class Teller:
    """Prints the story on standard output; what is being done just now shows on a terminal only."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=False)
        self.console.width = min(self.console.width, WIDTH)
        self.seconds = 0.0

    @contextmanager
    def stage(self) -> Iterator[Callable[[str], None]]:
        """A part that takes time; ``self.seconds`` is how long the last one took."""
        started = time.perf_counter()
        with self.console.status("") as status:
            yield lambda text: status.update(text)
        self.seconds = time.perf_counter() - started

    def opening(self, split: Split) -> None:
        """Where this runs, and what the data is."""
        for device, table in lk.backends().items():
            if device == "cpu" or torch.cuda.is_available():
                serving = next(name for name, state in table.items() if state == "available")
                self._say(f"lsc_kernels {lk.__version__} on {device}, served by its {serving} backend; "
                          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
                if serving == "eager":
                    self._say(f"[yellow]No compiled kernels for {device}: {table['native']}. Results are the same, "
                              "times are not; `lsc-kernels info` says how to get them.[/]")  # fmt: skip
        self._head("1  Two judges who disagree")
        counts = ", ".join(f"{len(split.pairs[name])} by the {name} judge" for name in PROPERTIES)
        self._say(
            f"{len(split.responses)} written answers to {len(split.prompts)} requests, compared in pairs: {counts}. "
            f"Where both see a difference, they want opposite things {conflict():.0%} of the time: the most detailed "
            "answers are reckless, nosy, dishonest or rude, and the safest are refusals."
        )

    def trained(self, models: Models, split: Split, held_out: Split) -> None:
        """The models and how well they do on topics they have not seen."""
        self._head("2  Models made on the spot", self.seconds)
        size = sum(p.numel() for p in models.reference.parameters())
        self._say(
            f"A Llama of {size / 1e6:.1f} M parameters learnt to answer: the reference policy. The policy is the same "
            "one a few steps later. Two copies became reward models, with the Bradley-Terry loss:"
        )
        table = _table("reward model", "trained on", "ranks held-out pairs right", "guessing")
        for name in PROPERTIES:
            model, pairs = models.reward_models[name], held_out.pairs[name]
            accuracy = train.pair_accuracy(model, models.tokenizer, pairs)
            table.add_row(name, f"{len(split.pairs[name])} pairs", f"{accuracy:.1%} of {len(pairs)}", "50%")
        self.console.print(table)

    def referenced(self, references: References, found: Findings) -> None:
        """The two kinds of reference reward, side by side."""
        self._head("3  Reference rewards: from which score on is an answer good?", self.seconds)
        prompts = len(references.samples)
        self._say(
            f"Per prompt, the {QUANTILE:.0%} quantile of {len(references.samples[0])} samples of the policy; or the "
            f"score of a canned refusal, “{REFUSAL.strip()}”"
        )
        table = _table("mean reference", "samples", "refusal", "answers above samples", "above refusal")
        per_prompt = len(found.responses) // prompts
        for k, name in enumerate(PROPERTIES):
            canned = references.canned[:, k].repeat_interleave(per_prompt).numpy()
            above = (found.margins[:, k] > 0).mean(), (found.scores[:, k] > canned).mean()
            means = references.sampled[:, k].mean().item(), references.canned[:, k].mean().item()
            table.add_row(name, *(f"{mean:+.2f}" for mean in means), *(f"{share:.0%}" for share in above))
        self.console.print(table)
        self._say(_compare_references(references))

    def scored(self, summary: ScoreSummary, found: Findings, references: References) -> None:
        """What the scoring run shows."""
        rows = len(found.responses)
        self._head(f"4  `lsc-kernels score` on {rows} held-out answers", summary.seconds)
        good = (found.margins > 0).all(axis=1).sum()
        single = " and ".join(
            f"{n} {name}" for n, name in zip((found.margins > 0).sum(axis=0), PROPERTIES, strict=True)
        )
        per_prompt = rows // len(references.samples)
        median = references.median.repeat_interleave(per_prompt, dim=0).numpy()
        typical = (found.scores > median).all(axis=1).sum()
        self._say(
            f"Good in the sense of both: {good} answers ({single} taken alone). {typical} beat the policy's median "
            "sample in both."
        )
        binds = " and ".join(f"{name} for {share:.0%}" for name, share in zip(PROPERTIES, found.binds, strict=True))
        self._say(f"The property that binds, where a better score would help most: {binds}.")
        self._say(
            f"The policy has moved {found.kl_per_token:.4f} nats per token, {found.kl_per_response:.2f} per answer, "
            "from its reference (exact KL)."
        )
        self._rankings(found)
        self._fooled(found)

    def _rankings(self, found: Findings) -> None:
        per_rule = {"the raw sum of scores": found.raw_sum, "LSC-AND": found.utility}
        firsts = {rule: found.failing[found.first(by)] for rule, by in per_rule.items()}
        prompts = len(next(iter(firsts.values())))
        told = ", ".join(f"{failing.sum()} ranked by {rule}" for rule, failing in firsts.items())
        self._say(
            f"Of the answers to each of the {prompts} prompts take the first: one that a judge gave {FAILING_GRADE} "
            f"of 5 or less comes first {told}."
        )

    def _fooled(self, found: Findings) -> None:
        case = found.fooled()
        if case is None:
            self._say("With this seed the raw sum was fooled nowhere that LSC-AND was not.")
            return
        self._say(f"\nWhere the raw sum is fooled most: [bold]{_request(found.responses[case[0]].prompt)}[/]")
        table = _table("ranked first by", "answer", *PROPERTIES, "raw sum", "good in both")
        table.columns[1].justify, table.columns[1].ratio = "left", 1
        table.expand = True
        for rule, row in zip(("raw sum", "LSC-AND"), case, strict=True):
            margins = [f"{score:+.1f}" for score in found.scores[row]]
            probability = np.exp(found.utility[row])
            table.add_row(rule, found.responses[row].response.strip(), *margins, f"{found.raw_sum[row]:+.1f}",
                          f"{probability:.1%}")  # fmt: skip
        self.console.print(table)

    def timed(self, cells: Sequence[Cell], shape: Shape) -> None:
        """The speed table."""
        self._head("5  Speed: KL between two nearly equal policies", self.seconds)
        kls = [cell.mean_kl for cell in cells]
        self._say(
            f"{shape.rows} tokens, vocabulary {shape.vocab}, KL of {min(kls):.0e} to {max(kls):.0e} nats, as after a "
            "first training step. Error: the largest of a row against fp64, relative to the mean KL. lsc_kernels "
            "returns both log-probabilities and the entropy as well, from the same pass."
        )
        table = _table("KL", "", "", "forward", "", "forward + backward", "", "error", "extra memory")
        table.columns[1].justify = table.columns[2].justify = "left"
        previous = None
        for cell in cells:
            base = next(c for c in cells if (c.device, c.kind, c.dtype, c.way) == (*_setting(cell), EAGER))
            name = f"{cell.kind} {cell.dtype}" if _setting(cell) != previous else ""
            previous = _setting(cell)
            style = "bold" if cell.way == OURS else ""
            where = "" if cell.device == "cpu" else f"on {cell.device}"
            table.add_row(name, cell.way, where, *_timings(cell, base), style=style)
        self.console.print(table)
        if not shape.compiled:
            self._say("torch.compile is left out of a quick run.")

    def closing(self, out: Path, command: str, seconds: float) -> None:
        """Where everything is, and how to do it again by hand."""
        self._head(f"Done in {seconds:.0f} s")
        self._say(f"{out}/ holds demo.png, the models, held_out.jsonl, rewards.parquet and speed.json. "
                  "The same scoring run by hand:")  # fmt: skip
        self.console.print(command, markup=False, soft_wrap=True)

    def _head(self, text: str, seconds: float | None = None) -> None:
        took = "" if seconds is None else f"  [dim]{seconds:.1f} s[/]"
        self.console.print(f"\n[bold cyan]{text}[/]{took}")

    def _say(self, text: str) -> None:
        self.console.print(text)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at == 0 else "right", no_wrap=heading != "answer")
    return table


def _compare_references(references: References) -> str:
    """Where the refusal asks more than the samples, and where less: in words, from the numbers."""
    parts = []
    for k, name in enumerate(PROPERTIES):
        harder = (references.canned[:, k] > references.sampled[:, k]).float().mean().item()
        parts.append(f"in {name} for {harder:.0%} of the prompts")
    return (
        f"The refusal asks more than the samples do {' and '.join(parts)}. Samples ask for what this policy can do; "
        "a refusal is useless but safe, so it asks nothing of one judge and nearly everything of the other."
    )


def _request(prompt: str) -> str:
    return prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")


def _setting(cell: Cell) -> tuple[str, str, str]:
    return cell.device, cell.kind, cell.dtype


def _timings(cell: Cell, base: Cell) -> list[str]:
    if cell.problem:
        return [cell.problem, "", "", "", "", ""]
    forward, both = base.forward / cell.forward, base.forward_backward / cell.forward_backward
    memory = "" if cell.extra_bytes is None else f"{cell.extra_bytes / 1e6:.2f} MB"
    return [
        f"{1e3 * cell.forward:.1f} ms", f"{forward:.1f}x",
        f"{1e3 * cell.forward_backward:.1f} ms", f"{both:.1f}x",
        f"{cell.error:.0e}", memory,
    ]  # fmt: skip
