"""KL, rewards and GAE of a step in verl and OpenRLHF: their own functions, and ours in their place.

In the environment that scripts/trainer_environment.sh makes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import _openrlhf
import pytest
import torch
from _measure import Outputs
from bench_advantages import BACKWARD, GAMMA, LAM, lengths_mask
from torch import Generator, Tensor

from lsc_kernels.trainers import openrlhf, verl

BETA = 0.05
TRAINERS = pytest.mark.parametrize("trainer", ["verl", "openrlhf"])
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None or importlib.util.find_spec("openrlhf") is None,
    reason="verl and OpenRLHF are not installed here; scripts/trainer_environment.sh has them",
)


@pytest.fixture(scope="module")
def openrlhfs() -> Iterator[SimpleNamespace]:
    yield _openrlhf.load()


def logprobs(size: Any, generator: Generator) -> tuple[Tensor, Tensor]:
    logp = -3 * torch.rand(size.sequences, size.length, generator=generator)
    return logp, logp + 0.1 * torch.randn(size.sequences, size.length, generator=generator)


def of(name: str, function: Callable[..., Tensor]) -> Callable[..., Outputs]:
    return lambda *given: {name: function(*given)}


@BACKWARD
@TRAINERS
def test_kl(
    compare: Any, size: Any, generator: Generator, openrlhfs: SimpleNamespace, trainer: str, backward: bool
) -> None:
    """k3, in the reward and in the loss."""
    from verl.trainer.ppo import core_algos

    pair = logprobs(size, generator)
    theirs, ours = {
        "verl": (
            lambda logp, ref: core_algos.kl_penalty(logp, ref, "low_var_kl"),
            lambda logp, ref: verl.kl_penalty(logp, ref, "low_var_kl"),
        ),
        "openrlhf": (
            lambda logp, ref: openrlhfs.kl(logp, ref, kl_estimator="k3"),
            lambda logp, ref: openrlhf.compute_approx_kl(logp, ref, kl_estimator="k3"),
        ),
    }[trainer]

    def truth(logp: Tensor, ref: Tensor) -> Outputs:
        d = logp.double() - ref.double()
        return {"kl": torch.expm1(-d) + d}

    compare(
        f"{'verl' if trainer == 'verl' else 'OpenRLHF'} KL",
        case="k3",
        ours=of("kl", ours),
        textbook=of("kl", theirs),
        truth=truth,
        inputs=pair,
        reads=pair,
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=0 if backward else None,
        compile=False,
    )


@TRAINERS
def test_rewards(
    compare: Any, size: Any, generator: Generator, openrlhfs: SimpleNamespace, trainer: str
) -> None:
    """The price of KL, k1, taken from the rewards; verl's KL included, OpenRLHF's given."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer

    logp, ref = logprobs(size, generator)
    mask = lengths_mask(size, generator)
    utility = torch.randn(size.sequences, generator=generator)
    ends = mask.sum(-1, keepdim=True) - 1
    scores = torch.zeros_like(logp).scatter_(1, ends, utility.unsqueeze(1))
    controller = core_algos.FixedKLController(BETA)

    def in_verl(function: Callable[..., Any]) -> Callable[..., Outputs]:
        def apply(logp: Tensor, ref: Tensor, mask: Tensor, scores: Tensor) -> Outputs:
            batch = {
                "old_log_probs": logp,
                "ref_log_prob": ref,
                "response_mask": mask,
                "token_level_scores": scores,
            }
            data = DataProto(batch=TensorDict(batch, batch_size=len(logp)))
            return {"rewards": function(data, controller)[0].batch["token_level_rewards"]}

        return apply

    def truth(*given: Tensor) -> Outputs:
        return {"rewards": scores.double() - BETA * torch.where(mask, logp.double() - ref.double(), 0.0)}

    if trainer == "verl":
        counted = mask.long()
        inputs: tuple[Tensor, ...] = (logp, ref, counted, scores)
        reads: tuple[Tensor, ...] = (logp, ref, scores)
        theirs, ours = in_verl(ray_trainer.apply_kl_penalty), in_verl(verl.apply_kl_penalty)
    else:
        inputs, reads = (utility, (logp - ref) * mask, mask), (logp,)
        theirs, ours = (
            of("rewards", lambda r, kl, mask, function=function: function(r, BETA, kl, action_mask=mask))
            for function in (openrlhfs.reward, openrlhf.compute_reward)
        )
    compare(
        f"{'verl' if trainer == 'verl' else 'OpenRLHF'} rewards",
        ours=ours,
        textbook=theirs,
        truth=truth,
        inputs=inputs,
        reads=reads,
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        compile=False,
    )


@TRAINERS
def test_gae(compare: Any, size: Any, generator: Generator, openrlhfs: SimpleNamespace, trainer: str) -> None:
    """A loop over the tokens in Python; verl's whitens."""
    from verl.trainer.ppo import core_algos

    rewards, values = torch.randn(2, size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator).long()
    theirs, ours = {
        "verl": (core_algos.compute_gae_advantage_return, verl.compute_gae_advantage_return),
        "openrlhf": (
            lambda rewards, values, *rest: openrlhfs.gae(None, values, rewards, *rest),
            lambda rewards, values, *rest: openrlhf.get_advantages_and_returns(None, values, rewards, *rest),
        ),
    }[trainer]

    def named(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Outputs]:
        return lambda *given: dict(zip(("advantages", "returns"), function(*given, GAMMA, LAM), strict=True))

    def truth(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
        """NaN, which is not compared, outside the mask: there they differ."""
        outputs = named(theirs)(rewards.double(), values.double(), mask)
        return {name: torch.where(mask.bool(), output, torch.nan) for name, output in outputs.items()}

    compare(
        f"{'verl' if trainer == 'verl' else 'OpenRLHF'} gae",
        ours=named(ours),
        textbook=named(theirs),
        truth=truth,
        inputs=(rewards, values, mask),
        reads=(rewards, values),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        compile=False,
    )
