"""The report of ``lsc-kernels plan``: a diagnosis of the scores, and the frontier up to a KL budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis import Diagnosis, Frontier, FrontierPoint, diagnose, frontier
from ..analysis.frontier import FEWEST_EFFECTIVE
from ..analysis.report import Report, percent
from ..wording import counted
from .read import Samples

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

KLS = 10  # points of the frontier up to the budget
FEW = 50  # effective samples below which the numbers at the budget are called rough


@dataclass(frozen=True)
class Plan(Report):
    """What is known of rewards on these scores. Printed with rich it is the report.

    Attributes:
        budget: KL from the base policy, in nats.
        rows, prompts: responses with all scores, and prompts they answer.
        pooled: all responses were taken as if they answered one prompt.
        references: where the references come from.
        mean_reference, scale, weights: of each property.
        diagnosis, frontier: of ``lsc_kernels.analysis``.
    """

    budget: float
    rows: int
    prompts: int
    pooled: bool
    references: str
    mean_reference: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    diagnosis: Diagnosis
    frontier: Frontier

    def at_budget(self, method: str) -> FrontierPoint | None:
        """A method's point at the budget; None where its samples do not reach it."""
        points = [one for one in self.frontier.of(method) if one.kl == self.budget]
        return points[0] if points else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text  # a name may hold what rich takes for markup

        counts = f"{counted(self.rows, 'response')} to {counted(self.prompts, 'prompt')}"
        yield Text(f"{counts}. References: {self.references}")
        shape = zip(self.frontier.names, self.mean_reference, self.scale, self.weights, strict=True)
        for name, reference, scale, weight in shape:
            yield Text(f"  {name}: reference {reference:.3g} on average, scale {scale:g}, weight {weight:g}")
        yield ""
        yield self.diagnosis.table()
        yield from (Text(f"- {text}") for text in self.diagnosis.findings())
        yield ""
        yield self.frontier.table()
        yield from (Text(f"- {text}") for text in self.findings())

    def findings(self) -> list[str]:
        """What the frontier says, and how far to trust it."""
        base, told = self.frontier.base, []
        for method in self.frontier.methods:
            point = self.at_budget(method)
            if point is None:
                told.append(
                    f"{method}: these samples do not reach a KL of {self.budget:g}: too many of them tie"
                )
                continue
            worst = min(range(len(point.p_good)), key=point.p_good.__getitem__)
            told.append(
                f"{method} at KL {self.budget:g}: gamma = {point.gamma:.3g}, P(all good) {percent(base.p_all)} -> "
                f"{percent(point.p_all)} ± {percent(point.p_all_error)}, worst {self.frontier.names[worst]} "
                f"{percent(base.p_good[worst])} -> {percent(point.p_good[worst])}"
            )
        told.append("gamma weighs the KL against the utility: it is the beta of token_rewards to begin with")
        if self.pooled and self.prompts > 1:
            told.append(
                f"{self.rows / self.prompts:.3g} responses per prompt cannot show a KL of {self.budget:g}: all were "
                "taken as if they answered one prompt. What differs between prompts then counts as if the policy could "
                "choose, so the gains are upper bounds; references per prompt make them tighter"
            )
        fewest = min((point.effective_samples for point in self.frontier.points), default=math.inf)
        if fewest < FEW:
            told.append(
                f"at the largest KL {fewest:.3g} samples carry a curve: rough there; more samples, or a smaller "
                "--kl-budget"
            )
        told.append(
            "all curves are judged by the reward models they are tilted by: what fools these is not seen here"
        )
        return told

    def figure(self) -> Any:
        """Scores and references, which property pulls, and both frontiers; a matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from ..analysis.figures import draw_frontier, draw_margins, draw_properties, draw_pull, extra_height
        from ..plotting import new_figure

        figure = new_figure(12, 7.2 + 2 * extra_height(len(self.frontier.names)))
        (margins, pull), (everything, single) = figure.subplots(2, 2)
        draw_margins(margins, self.diagnosis)
        draw_pull(pull, self.diagnosis)
        draw_frontier(everything, self.frontier)
        draw_properties(single, self.frontier)
        return figure


def make_plan(
    samples: Samples,
    reference: Tensor,
    origin: str,
    budget: float,
    *,
    scale: Tensor,
    floor: Tensor,
    weights: Tensor,
    methods: Sequence[str],
    pool: str = "auto",
    formula: str | None = None,
) -> Plan:
    """Diagnose samples and compute the frontier up to a KL budget.

    Args:
        samples: N responses.
        reference: [N, K].
        origin: where the references come from, in words.
        budget: in nats.
        scale, floor, weights: [K].
        methods: names in ``lk.TRANSFORMS``.
        pool: ``auto``, ``never`` or ``always`` take all responses as if they answered one prompt.
        formula: which outputs count as good.

    Raises:
        ValueError: the samples do not reach the budget, or an option is out of range.
    """
    whole = ~(samples.scores.isnan() | reference.isnan()).any(1)
    if not whole.any():
        raise ValueError("no response has a score and a reference of every property")
    prompt = samples.prompt[whole].unique(return_inverse=True)[1]
    sizes = torch.bincount(prompt)
    reach = sizes.double().log().mean().item()
    wanted = budget + math.log(FEWEST_EFFECTIVE)
    pooled = pool == "always" or (pool == "auto" and reach < wanted)
    scores, centres = samples.scores[whole], reference[whole]
    if pooled:
        reach, scores, centres = math.log(len(scores)), scores[None], centres[None]
    else:
        scores, centres = (_padded(values, prompt, sizes) for values in (scores, centres))
    if reach < wanted:
        shown = max(0.0, reach - math.log(FEWEST_EFFECTIVE))
        raise ValueError(
            f"--kl-budget {budget:g}: these samples show a KL of {shown:.3g} at most; "
            f"wants about {math.exp(min(wanted, 50)):.3g} responses{'' if pooled else ' per prompt'} or a smaller "
            "budget"
        )
    shape: dict[str, Any] = {"scale": scale, "floor": floor, "weights": weights, "names": samples.names}
    budgets = [budget * (number / KLS) ** 2 for number in range(1, KLS)] + [budget]
    found = frontier(scores, centres, kl=budgets, methods=methods, formula=formula, **shape)
    grouped = samples.prompt if (sizes > 1).any() else None
    return Plan(
        budget=budget,
        rows=int(whole.sum()),
        prompts=len(sizes),
        pooled=pooled,
        references=origin,
        mean_reference=tuple(reference.nanmean(0).tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights.tolist()),
        diagnosis=diagnose(samples.scores, reference, group=grouped, **shape),
        frontier=found,
    )


def _padded(values: Tensor, prompt: Tensor, sizes: Tensor) -> Tensor:
    """[P, n, K] from [N, K]: NaN where a prompt has fewer than n."""
    order = prompt.argsort(stable=True)
    place = torch.arange(len(prompt)) - (sizes.cumsum(0) - sizes)[prompt[order]]
    padded = values.new_full((len(sizes), int(sizes.max()), values.shape[1]), math.nan)
    padded[prompt[order], place] = values[order]
    return padded
