"""One reward for TRL from the rewards of several properties: centred, bent, combined by a formula."""

from __future__ import annotations

import json
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsc_kernels.formula import Formula, compile_formula
from lsc_kernels.ops.aggregate_rewards import MISSING, aggregate_rewards
from lsc_kernels.ops.lsc_transform import lsc_transform
from lsc_kernels.reference import ReferenceTable, leave_one_out_quantile, quantile_reference
from lsc_kernels.trainers._rewards import GroupScalingWarning
from lsc_kernels.trainers.trl import known
from lsc_kernels.trainers.trl.sources import Columns, awaited, reward_source

Reward = Callable[..., Any] | nn.Module
# what TRL passes beside the columns of the data set
NOT_COLUMNS = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass(frozen=True)
class GroupQuantile:
    """The reference reward is a quantile of the samples of the same prompt, by default of the *others*.

    Attributes:
        q, method: as in :func:`lsc_kernels.reference.quantile_reference`.
        leave_one_out: whether a sample's own score is left out of its reference.
        size: samples per prompt, which lie one after another; None is the trainer's ``num_generations``.
    """

    q: float = 0.85
    method: str = "median_unbiased"
    leave_one_out: bool = True
    size: int | None = None


@dataclass(frozen=True)
class Canned:
    """The reference reward is that of one response to every prompt, scored once per prompt: "I can't help with that."

    Attributes:
        response: its text.
    """

    response: str


class Scored(NamedTuple):
    """What a batch got: ``scores`` and ``reference_reward`` [B, K], ``utility`` [B], NaN where there is none."""

    scores: Tensor
    reference_reward: Tensor
    utility: Tensor


class LSCReward:
    r"""A reward function for GRPOTrainer and RLOOTrainer: the log-probability that a completion is good.

    .. math:: u = \log P(\text{formula}), \qquad \log p_k = w_k \log\sigma((r_k - r_{\mathrm{ref},k}) / s_k)

    Args:
        rewards: the K properties: reward functions as TRL calls them (``async`` ones too), Hugging Face reward models
            (``AutoModelForSequenceClassification``; one with several labels is as many properties), or a mixture; or
            one of them alone. Models score the last token of prompt and completion, found from the attention mask. A
            function returns a number for each completion, None or NaN where it has none.
        reference_reward: what is good enough: the name of a column of the data set (per row a number, K numbers, or a
            number for each name), a number or K numbers, a :class:`lsc_kernels.reference.ReferenceTable` with these
            names, :class:`GroupQuantile` or :class:`Canned`.
        names: of the K properties; None takes the functions' names, the models' or their labels'.
        formula, weights, scale, floor: as in :func:`lsc_kernels.aggregate_rewards`; K numbers may be a list.
        missing: ``ignore``: a score that is missing counts as certainly good, which in the AND of all properties is
            TRL's own way, to leave it out of the sum. ``propagate``: then the completion has no reward. ``raise``.
            Where all scores are missing that the formula reads, the completion has none in any case.
        processing_class: the tokenizer of the models, or a list with one for each of ``rewards`` (None for functions).
        name: how TRL logs the reward.

    A call takes what TRL passes and returns a list of B floats, None for a completion without a reward (TRL gives those
    no advantage). It logs by ``log_metric``, for each property, ``NAME/PROPERTY/score``, ``.../reference_reward``,
    ``.../p_good`` (the mean probability of being good) and ``.../missing`` (the share of scores that are), and of the
    combination ``NAME/p_good``; and puts the scores into TRL's table of completions.

    **Scaling.** GRPOTrainer divides by the spread within each group unless told otherwise (``scale_rewards="group"``),
    which undoes the transform: see :func:`lsc_kernels.group_advantages`. The reward warns once of a trainer that does;
    take ``scale_rewards="none"`` or ``"batch"``.

    Attributes:
        last: :class:`Scored`, of the last call.

    Raises:
        TypeError: a reward that is neither a function nor a model; a prompt that is neither text nor messages.
        ValueError: names that are not K or not distinct, a formula that does not fit them, a model without a tokenizer;
            in a call, a reference that is not there, a reward function with another number of rewards, a utility of
            -inf (a property under ``~`` that is missing), of which advantages cannot be made.
        UnknownVersion: in a call by a trainer of a TRL that is not known.

    Example:
        >>> from lsc_kernels.trainers.trl import LSCReward
        >>> def helpful(completions, **columns):
        ...     return [2.0, -1.0]
        >>> def short(completions, **columns):
        ...     return [3.0 - len(completion) for completion in completions]
        >>> reward = LSCReward([helpful, short], reference_reward=[0.5, 0.0])
        >>> utilities = reward(prompts=["Why?", "Why?"], completions=["ab", "abcd"])
        >>> [round(utility, 4) for utility in utilities]
        [-0.5147, -3.0147]
    """

    def __init__(
        self,
        rewards: Reward | Sequence[Reward],
        *,
        reference_reward: str | float | Sequence[float] | Tensor | ReferenceTable | GroupQuantile | Canned = (
            "reference_reward"
        ),
        names: Sequence[str] | None = None,
        formula: Formula | str | None = None,
        weights: Sequence[float] | Tensor | None = None,
        scale: float | Sequence[float] | Tensor = 1.0,
        floor: float | Sequence[float] | Tensor = 0.0,
        missing: str = "ignore",
        processing_class: Any = None,
        name: str = "lsc",
    ) -> None:
        several = list(rewards) if isinstance(rewards, Sequence) else [rewards]
        if not several:
            raise ValueError("rewards must have at least one property; got none")
        tokenizers = (
            processing_class if isinstance(processing_class, list) else [processing_class] * len(several)
        )
        if len(tokenizers) != len(several):
            raise ValueError(
                f"processing_class must have one entry per reward, {len(several)}; got {len(tokenizers)}"
            )
        self._rewards = [reward_source(*pair) for pair in zip(several, tokenizers, strict=True)]
        own_names = [each for reward in self._rewards for each in reward.names]
        self.names = tuple(own_names if names is None else names)
        if len(self.names) != len(own_names) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"names must be {len(own_names)} distinct ones, one per property; got {list(self.names)}"
            )
        if missing not in MISSING:
            raise ValueError(f"missing must be one of {', '.join(MISSING)}; got {missing!r}")
        self._read = (
            tuple(range(len(self.names))) if formula is None else compile_formula(formula, self.names).columns
        )
        self._reference_reward = reference_reward
        self._options: dict[str, Any] = {"formula": formula, "names": self.names, "missing": missing}
        self._weights = None if weights is None else _numbers(weights)
        self._scale, self._floor = _numbers(scale), _numbers(floor)
        self._canned: dict[str, Tensor] = {}
        self._known_trainer: Callable[[], object] = lambda: None
        self.__name__ = name  # what TRL calls a reward function in its logs
        self.last: Scored | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        log = columns.get("log_metric")
        trainer = self._trainer(log)
        scored = self._score(prompts, completions, completion_ids, columns, trainer)
        if bool(scored.utility.isinf().any()):
            row = int(scored.utility.isinf().nonzero()[0])
            raise ValueError(
                f"completion {row} has utility {scored.utility[row].item()} from scores {scored.scores[row].tolist()} "
                f"of {list(self.names)}, and a trainer makes NaN of that for its whole group: give such a property a "
                "floor, or missing='propagate' where a missing score under ~ is the cause"
            )
        self.last = scored
        if log is not None:
            self._log(scored, log, columns.get("log_extra"))
        return [None if math.isnan(utility) else utility for utility in scored.utility.tolist()]

    def per_property(self) -> list[Callable[..., list[float | None]]]:
        """The K utilities as reward functions of their own, which share one scoring of each batch.

        For what TRL does with several reward functions: their sum is the AND, ``reward_weights`` are the exponents,
        ``multi_objective_aggregation="normalize_then_sum"`` is GDPO, and each is logged by its name.

        Raises:
            ValueError: with a formula or weights, which TRL's sum knows nothing of.
        """
        if self._options["formula"] is not None or self._weights is not None:
            raise ValueError(
                "per_property() gives the properties to TRL, which adds them up: leave out formula and weights (the "
                "weights are its reward_weights)"
            )
        shared = _Shared(self)
        return [_Property(shared, k, name) for k, name in enumerate(self.names)]

    def _score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None,
        columns: Columns,
        trainer: Any,
    ) -> Scored:
        device = None if trainer is None else trainer.accelerator.device
        scores = self._scores(prompts, completions, completion_ids, columns, device)
        references = self._references(prompts, scores, columns, trainer, device)
        utility = aggregate_rewards(
            scores, references, weights=self._weights, scale=self._scale, floor=self._floor, **self._options
        )
        unscored = scores[:, list(self._read)].isnan().all(-1)
        return Scored(scores, references, utility.masked_fill(unscored, math.nan))

    def _scores(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None,
        columns: Columns,
        device: torch.device | None,
    ) -> Tensor:
        """[B, K], NaN where missing."""
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        results = awaited([reward(device, given) for reward in self._rewards])
        return torch.cat(
            [
                reward.columns(result, len(prompts))
                for reward, result in zip(self._rewards, results, strict=True)
            ],
            dim=1,
        )

    def _references(
        self,
        prompts: Sequence[Any],
        scores: Tensor,
        columns: Columns,
        trainer: Any,
        device: torch.device | None,
    ) -> Tensor:
        """[B, K]."""
        kind = self._reference_reward
        if isinstance(kind, str):
            return self._from_column(kind, columns).expand_as(scores)
        if isinstance(kind, ReferenceTable):
            return self._from_table(kind, prompts)
        if isinstance(kind, GroupQuantile):
            return _from_group(kind, scores, trainer)
        if isinstance(kind, Canned):
            return self._from_canned(kind.response, prompts, columns, device)
        return _numbers(kind).expand_as(scores)

    def _from_column(self, name: str, columns: Columns) -> Tensor:
        if name not in columns or name in NOT_COLUMNS:
            there = [each for each in columns if each not in NOT_COLUMNS]
            raise ValueError(
                f"reference_reward={name!r} is no column of the data set, which has {there}: add one (a number per "
                "row, or one per property), or give LSCReward another reference_reward"
            )
        rows = []
        for row in columns[name]:
            if isinstance(row, Mapping):
                row = [row.get(each) for each in self.names]
            each = row if isinstance(row, (list, tuple)) else [row]
            if len(each) not in (1, len(self.names)):
                raise ValueError(
                    f"column {name!r} must hold a number or {len(self.names)} per row, one per property; got {row!r}"
                )
            rows.append([math.nan if value is None else float(value) for value in each])
        return torch.tensor(rows)

    def _from_table(self, table: ReferenceTable, prompts: Sequence[Any]) -> Tensor:
        unknown = [name for name in self.names if name not in table.properties]
        if unknown:
            raise ValueError(
                f"the reference table has no property {unknown[0]!r}: it has {list(table.properties)}; give LSCReward "
                "its names"
            )
        return table.lookup([_text(prompt) for prompt in prompts])[
            :, [table.properties.index(name) for name in self.names]
        ]

    def _from_canned(
        self, response: str, prompts: Sequence[Any], columns: Columns, device: torch.device | None
    ) -> Tensor:
        """Scores of the canned response; a prompt that was met before is not scored again."""
        keys = [_key(prompt) for prompt in prompts]
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._canned}
        rows = sorted(first.values())
        if rows:
            new = [prompts[row] for row in rows]
            canned = [
                response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
                for prompt in new
            ]
            own = {
                name: [values[row] for row in rows] if isinstance(values, (list, tuple)) else values
                for name, values in columns.items()
                if name not in ("log_metric", "log_extra", "environments")
            }
            for row, scores in zip(rows, self._scores(new, canned, None, own, device), strict=True):
                self._canned[keys[row]] = scores
        return torch.stack([self._canned[key] for key in keys])

    def _log(
        self, scored: Scored, log: Callable[[str, float], None], extra: Callable[..., None] | None
    ) -> None:
        scores, references, utility = scored
        each = lsc_transform(scores, references, scale=self._scale, floor=self._floor).exp()
        for k, name in enumerate(self.names):
            head = f"{self.__name__}/{name}"
            log(f"{head}/missing", float(scores[:, k].isnan().float().mean()))
            for what, values in (("score", scores), ("reference_reward", references), ("p_good", each)):
                if not bool(values[:, k].isnan().all()):
                    log(f"{head}/{what}", float(values[:, k].nanmean()))
            if extra is not None:
                extra(name, scores[:, k].tolist())
        if not bool(utility.isnan().all()):
            log(f"{self.__name__}/p_good", float(utility.exp().nanmean()))

    def _trainer(self, log_metric: object) -> Any:
        """The trainer that is calling, if one is: the function with which TRL lets rewards log is a method of it."""
        trainer: Any = getattr(log_metric, "__self__", None)
        if not hasattr(trainer, "accelerator"):
            return None
        if trainer is not self._known_trainer():
            known.check()
            _warn_of_scaling(trainer.args)
            self._known_trainer = weakref.ref(trainer)
        return trainer


class _Shared:
    """One scoring of a batch for the reward functions of its K properties."""

    def __init__(self, reward: LSCReward) -> None:
        self.reward = reward
        self._batch: object = None
        self._each = torch.empty(0)

    def utilities(self, prompts: Any, completions: Any, completion_ids: Any, columns: Columns) -> Tensor:
        """[B, K]. TRL gives the functions of one batch the same list of completions, and a new one to the next."""
        if completions is not self._batch:
            reward = self.reward
            trainer = reward._trainer(columns.get("log_metric"))
            reward.last = reward._score(prompts, completions, completion_ids, columns, trainer)
            scores, references, _ = reward.last
            self._each = lsc_transform(scores, references, scale=reward._scale, floor=reward._floor)
            self._batch = completions
        return self._each


class _Property:
    """The utility of one property as a reward function."""

    def __init__(self, shared: _Shared, column: int, name: str) -> None:
        self._shared, self._column, self.__name__ = shared, column, name

    def __call__(
        self, prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        utilities = self._shared.utilities(prompts, completions, completion_ids, columns)[:, self._column]
        return [None if math.isnan(utility) else utility for utility in utilities.tolist()]


def _from_group(kind: GroupQuantile, scores: Tensor, trainer: Any) -> Tensor:
    """Quantiles of the groups, which a trainer on several processes may have spread over them."""
    size, first = kind.size, 0
    every = scores
    if trainer is not None:
        if size is None:
            size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        every = trainer.accelerator.gather(scores.to(trainer.accelerator.device)).to(scores.device)
        first = trainer.accelerator.process_index * len(scores)
    if size is None:
        raise ValueError(
            "GroupQuantile needs size, the samples per prompt, where no trainer is calling; got None"
        )
    least = 2 + (kind.method == "gaussian") if kind.leave_one_out else 1
    if size < least or len(every) % size:
        raise ValueError(
            f"GroupQuantile needs groups of at least {least} samples that fill the batch; got groups of {size}, and "
            f"{len(every)} samples"
        )
    groups = every.reshape(-1, size, every.shape[1])
    if kind.leave_one_out:
        references = leave_one_out_quantile(groups, kind.q, method=kind.method)
    else:
        references = quantile_reference(groups, kind.q, method=kind.method).unsqueeze(1).expand_as(groups)
    return references.reshape(every.shape)[first : first + len(scores)]


def _warn_of_scaling(args: Any) -> None:
    each = getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum"
    if getattr(args, "scale_rewards", None) == "group" or each:
        setting = 'multi_objective_aggregation="normalize_then_sum"' if each else 'scale_rewards="group"'
        warnings.warn(
            f"{setting} divides rewards by their spread within each group, which undoes the LSC transform: what is "
            'good enough already is pulled apart again. Take scale_rewards="none" or "batch" (and '
            '"sum_then_normalize")',
            GroupScalingWarning,
            stacklevel=4,
        )


def _text(prompt: object) -> str:
    """A prompt as reference tables know it: chats in the format of ``lsc-kernels score``."""
    if isinstance(prompt, str):
        return prompt
    from lsc_kernels.score.data import plain_text

    if not isinstance(prompt, Sequence):
        raise TypeError(f"a prompt must be a text or a list of messages; got {type(prompt).__name__}")
    return plain_text([(message["role"], _content(message["content"])) for message in prompt])


def _content(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message, without its images."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _key(prompt: object) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _numbers(value: float | Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").detach()
