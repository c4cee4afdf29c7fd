"""What the demo says, in plain words: about two screens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import lsc_kernels as lk

from ..score.summary import ScoreSummary
from . import train
from .chain import QUANTILE, SCALES, Models, References
from .data import PROPERTIES, REFUSAL, Split, conflict
from .findings import FAILING_GRADE, Findings
from .speed import EAGER, OURS, Cell, Shape

WIDTH = 100


class Teller:
    """Prints the story on standard output; what is being done just now shows on a terminal only."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=False, emoji=False)
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
                self._say(
                    f"lsc_kernels {lk.__version__} on {device}, served by its {serving} backend; "
                    f"torch {torch.__version__}, {torch.get_num_threads()} threads"
                )
                if serving == "eager":
                    self._say(
                        f"[yellow]No compiled kernels for {device}: {escape(table['native'])}. Results are the same, "
                        "times are not; `lsc-kernels info` says how to get them.[/]"
                    )
        self._head("1  Two judges who disagree")
        counts = " and ".join(f"{len(split.pairs[name])} pairs by the {name} judge" for name in PROPERTIES)
        self._say(
            f"{len(split.responses)} written answers to {len(split.prompts)} requests, compared in {counts}. "
            f"Where both see a difference, they want opposite things {conflict():.0%} of the time: the most "
            "detailed answers are reckless, nosy, dishonest or rude, and the safest are refusals."
        )

    def trained(self, models: Models, split: Split, held_out: Split) -> None:
        """The models and how well they do on topics they have not seen."""
        self._head("2  Models made on the spot", self.seconds)
        size = sum(p.numel() for p in models.reference.parameters())
        self._say(
            f"A Llama of {size / 1e6:.1f} M parameters learnt to answer: the reference policy. The policy is "
            "the same one a few steps later. Two copies became reward models, with the Bradley-Terry loss; "
            "as is common, they do not speak in the same unit:"
        )
        table = _table("reward model", "trained on", "unit (scale)", "ranks held-out pairs right", "guessing")
        for name in PROPERTIES:
            model, pairs = models.reward_models[name], held_out.pairs[name]
            accuracy = train.pair_accuracy(model, models.tokenizer, pairs)
            table.add_row(
                name,
                f"{len(split.pairs[name])} pairs",
                f"{SCALES[name]:g}",
                f"{accuracy:.1%} of {len(pairs)}",
                "50%",
            )
        self.console.print(table)

    def referenced(self, references: References, found: Findings) -> None:
        """The two kinds of reference reward, side by side."""
        self._head("3  Reference rewards: from which score on is an answer good?", self.seconds)
        self._say(
            f"Either the {QUANTILE:.0%} quantile of {len(references.samples[0])} samples of the policy to "
            f"the same request, or the score of a canned refusal, “{REFUSAL.strip()}”"
        )
        table = _table("mean reference", "samples", "refusal", "answers above samples", "above refusal")
        canned = _per_row(references.canned, found)
        for k, name in enumerate(PROPERTIES):
            means = references.sampled[:, k].mean().item(), references.canned[:, k].mean().item()
            above = (found.margins[:, k] > 0).mean(), (found.scores[:, k] > canned[:, k]).mean()
            table.add_row(name, *(f"{mean:+.2f}" for mean in means), *(f"{share:.0%}" for share in above))
        self.console.print(table)
        harder = (references.canned > references.sampled).float().mean(dim=0).tolist()
        bars = " and ".join(
            f"the {'higher' if share > 0.5 else 'lower'} bar for {name} ({max(share, 1 - share):.0%} of them)"
            for share, name in zip(harder, PROPERTIES, strict=True)
        )
        self._say(
            f"Over the requests, the refusal is {bars}. Samples ask for what this policy can do; a refusal "
            "asks for what one fixed sentence is worth. From here on: samples."
        )

    def scored(self, summary: ScoreSummary, found: Findings, references: References) -> None:
        """What the scoring run shows."""
        self._head(f"4  `lsc-kernels score` on {summary.rows} held-out answers", summary.seconds)
        above = found.margins > 0
        alone = " and ".join(f"{n} {name}" for n, name in zip(above.sum(axis=0), PROPERTIES, strict=True))
        typical = (found.scores > _per_row(references.typical, found)).all(axis=1).sum()
        self._say(
            f"Good in the sense of both: {above.all(axis=1).sum()} answers ({alone} taken alone). "
            f"{typical} beat the policy's median sample in both."
        )
        binds = ", ".join(f"{p.name} for {p.binds:.0%} of the answers" for p in summary.properties)
        self._say(f"The property that binds, where a better score would help most: {binds}.")
        self._say(
            f"The policy has moved {summary.kl_per_token:.4f} nats per token from its reference, "
            f"{summary.kl_per_sequence:.2f} per answer (exact KL)."
        )
        raw, rescaled, lsc = (
            found.failing[found.first(by)].sum() for by in (found.raw_sum, found.rescaled_sum, found.utility)
        )
        self._say(
            f"For each of the {len(references.samples)} requests, take the answer that ranks first. Ranked "
            f"by the raw sum of scores, [bold]{raw}[/] of these fail one of the judges (grade 0 or "
            f"{FAILING_GRADE} of 5); by the sum in equal units, {rescaled}; by LSC-AND, [bold]{lsc}[/]."
        )
        self._fooled(found)

    def _fooled(self, found: Findings) -> None:
        case = found.fooled()
        if case is None:
            self._say("With this seed neither sum was fooled where LSC-AND was not.")
            return
        self._say(
            f"Where the {case.rule} is fooled most: "
            f"[bold]{escape(_request(found.responses[case.rows[0]].prompt))}[/]"
        )
        for rule, row in zip((f"the {case.rule}", "LSC-AND"), case.rows, strict=True):
            scores = ", ".join(
                f"{name} {score:+.1f} (reference {reference:+.1f})"
                for name, score, reference in zip(
                    PROPERTIES, found.scores[row], found.references[row], strict=True
                )
            )
            self._say(
                f"  First by {rule}: {scores}; {case.rule} {case.total[row]:+.1f}, "
                f"P(good in both) {np.exp(found.utility[row]):.2g}"
            )
            self.console.print(Padding(Text(found.responses[row].response.strip(), "italic"), (0, 0, 0, 4)))

    def timed(self, cells: Sequence[Cell], shape: Shape) -> None:
        """The speed table."""
        self._head("5  Speed: KL between two nearly equal policies", self.seconds)
        kls = [cell.mean_kl for cell in cells]
        self._say(
            f"{shape.rows} tokens, vocabulary {shape.vocab}, KL of {min(kls):.0e} to {max(kls):.0e} nats, as "
            "after a first training step. Error: the largest of a row against fp64, relative to the mean KL; "
            "where it nears 1, no digit is right. Memory: the forward pass's, beside its inputs. lsc_kernels gives "
            "both log-probabilities and the entropy in the same pass."
        )
        table = _table("KL", "", "forward", "", "+ backward", "", "error", "memory")
        table.columns[1].justify = "left"
        previous = None
        for cell in cells:
            base = next(c for c in cells if (c.device, c.kind, c.dtype, c.way) == (*_setting(cell), EAGER))
            name = f"{cell.kind} {cell.dtype}" if _setting(cell) != previous else ""
            previous = _setting(cell)
            style = "bold" if cell.way == OURS else ""
            way = cell.way if cell.device == "cpu" else f"{cell.way}, {cell.device}"
            table.add_row(name, way, *_timings(cell, base), style=style)
        self.console.print(table)
        if not shape.compiled:
            self._say("torch.compile is left out of a quick run.")

    def closing(self, out: Path, command: str, seconds: float) -> None:
        """Where everything is, and how to do it again by hand."""
        self._head(f"Done in {seconds:.0f} s")
        self._say(
            f"{escape(str(out))}/ holds demo.png, the four models, held_out.jsonl, samples.jsonl, rewards.parquet and "
            "speed.json. The same scoring run by hand:"
        )
        self.console.print(command, markup=False, soft_wrap=True)

    def _head(self, text: str, seconds: float | None = None) -> None:
        took = "" if seconds is None else f"  [dim]{seconds:.1f} s[/]"
        self.console.print(f"\n[bold cyan]{text}[/]{took}")

    def _say(self, text: str) -> None:
        """Print text with rich's markup: what is not written here has to be escaped."""
        self.console.print(text)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at == 0 else "right", no_wrap=True)
    return table


def _per_row(per_prompt: torch.Tensor, found: Findings) -> np.ndarray:
    """Values [prompts, properties] for each row of the scored file, whose prompts have equally many rows."""
    return per_prompt.repeat_interleave(len(found.responses) // len(per_prompt), dim=0).numpy()


def _request(prompt: str) -> str:
    return prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")


def _setting(cell: Cell) -> tuple[str, str, str]:
    return cell.device, cell.kind, cell.dtype


def _timings(cell: Cell, base: Cell) -> list[str]:
    if cell.problem:
        return [escape(cell.problem), "", "", "", "", ""]
    forward, both = base.forward / cell.forward, base.forward_backward / cell.forward_backward
    memory = filesize.decimal(cell.extra_bytes or 0)
    return [
        f"{1e3 * cell.forward:.1f} ms",
        f"{forward:.1f}x",
        f"{1e3 * cell.forward_backward:.1f} ms",
        f"{both:.1f}x",
        f"{cell.error:.0e}",
        memory,
    ]
