"""What the trainers do, as options of this library's functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """The options with which this library's functions reproduce a trainer.

    Each is a dictionary of keyword arguments: ``lk.token_kl(policy, ref, actions, **preset.token_kl)``. The price of a
    nat of KL (``beta``) is yours. What options cannot say is in ``notes``.

    Attributes:
        name: as in :func:`preset`.
        version: the version of the trainer whose source this was read from; of a snapshot, its year.
        token_kl: ``kl`` and ``grad``, names of estimator and gradient; where the trainer clamps, ``log_ratio_clamp``
            and ``kl_clamp``, (low, high) in nats, None for no limit. For ``token_kl`` and ``kl_from_logprobs``.
        token_rewards: ``placement``, the name of where the sequence's utility goes.
        gae: ``gamma`` and ``lam``, the trainer's default discount and trace, in [0, 1]; ``holes``, the name of how a
            position that the mask leaves out between counted ones is treated.
        notes: what differs all the same, one sentence each.
    """

    name: str
    version: str
    token_kl: Options
    token_rewards: Options
    gae: Options
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Trainer:
    version: str
    default: str
    estimators: dict[str, str]  # the trainer's own names, for ours
    clamps: Callable[[str], Options]  # of one of the trainer's names
    lam: float
    holes: str
    notes: tuple[str, ...] = ()
    corrected: bool = False  # a "+" after the name asks for the gradient of k2


def _no_clamps(kl: str) -> Options:
    return {}


def _verl_clamps(kl: str) -> Options:
    return {"log_ratio_clamp": (-20.0, 20.0), "kl_clamp": (-10.0, 10.0)} if kl in ("k3", "low_var_kl") else {}


def _openrlhf_clamps(kl: str) -> Options:
    below = {"log_ratio_clamp": (-10.0, None)} if kl == "k3" else {}
    return below | {"kl_clamp": (-10.0, 10.0)}


def _slime_clamps(kl: str) -> Options:
    return {"kl_clamp": (-10.0, 10.0)} if kl == "low_var_kl" else {}


def _nemo_rl_clamps(kl: str) -> Options:
    return {"log_ratio_clamp": (-20.0, 20.0), "kl_clamp": (-10.0, 10.0)}


_SCHULMAN = {"k1": "k1", "k2": "k2", "k3": "k3"}
_TRAINERS = {
    "trl": _Trainer(
        version="1.16",
        default="k3",
        estimators={"k1": "k1", "k3": "k3"},
        clamps=_no_clamps,
        lam=0.95,
        holes="zero",
        notes=(
            "GRPO takes k3 in the loss; RLOO takes k1 in the reward, summed per sequence as a row of token_rewards.",
            "use_bias_correction_kl is old_logprobs.",
            "Its PPO trainer went with 1.13: gae is of 1.12, whose token_rewards had placement='eos_plus_one'.",
        ),
    ),
    "verl": _Trainer(
        version="0.9",
        default="k3",
        estimators={**_SCHULMAN, "abs": "abs", "kl": "k1", "mse": "k2", "low_var_kl": "k3"},
        clamps=_verl_clamps,
        lam=1.0,
        holes="skip",
        corrected=True,
        notes=(
            "Where a clamp acts the gradient is 0 here; verl's 'k3+' keeps that of k2.",
            "Its default in the reward is 'kl', in the loss 'low_var_kl'.",
            "A sequence without a token gets zeros here; there its score wraps to the last position.",
        ),
    ),
    "openrlhf": _Trainer(
        version="0.11",
        default="k1",
        estimators=_SCHULMAN,
        clamps=_openrlhf_clamps,
        lam=1.0,
        holes="zero",
        corrected=True,
        notes=(
            "Where a clamp acts the gradient is 0 here; its unbiased gradient ('+') keeps that of k2.",
            "Its advantages are whitened with correction=0.",
            "A sequence without a token gets zeros here; there the score goes to the last position.",
        ),
    ),
    "slime": _Trainer(
        version="2026",
        default="k1",
        estimators={**_SCHULMAN, "low_var_kl": "k3"},
        clamps=_slime_clamps,
        lam=1.0,
        holes="skip",
        notes=(
            "Its GAE knows no loss mask: every token of a response is a step. Give gae a mask of lengths, then.",
        ),
    ),
    "nemo_rl": _Trainer(
        version="2026",
        default="k3",
        estimators=_SCHULMAN,
        clamps=_nemo_rl_clamps,
        lam=0.95,
        holes="skip",
    ),
}


def preset(name: str, *, kl: str | None = None) -> Preset:
    """The options with which ``token_kl``, ``token_rewards`` and ``gae`` reproduce a trainer.

    Args:
        name: ``trl``, ``verl``, ``openrlhf``, ``slime`` or ``nemo_rl``.
        kl: the trainer's name of an estimator of KL, on which its clamps depend. None is k3, with OpenRLHF and slime
            k1. With verl and OpenRLHF a ``+`` at its end asks for the gradient of k2, which is unbiased on policy.

    Raises:
        ValueError: an unknown ``name``, or an estimator that the trainer does not have.

    Source:
        Read from TRL 1.16.0, verl 0.9.1, OpenRLHF 0.11.2 and snapshots of slime and NeMo-RL of 2026.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> verl = lk.preset("verl", kl="low_var_kl")
        >>> verl.token_kl
        {'kl': 'k3', 'grad': 'autograd', 'log_ratio_clamp': (-20.0, 20.0), 'kl_clamp': (-10.0, 10.0)}
        >>> verl.gae
        {'gamma': 1.0, 'lam': 1.0, 'holes': 'skip'}
        >>> lk.kl_from_logprobs(torch.tensor([-9.0]), torch.tensor([-1.0]), **verl.token_kl)
        tensor([10.])
    """
    if name not in _TRAINERS:
        raise ValueError(f"preset must be one of {', '.join(_TRAINERS)}; got {name!r}")
    trainer = _TRAINERS[name]
    wanted = trainer.default if kl is None else kl
    corrected = trainer.corrected and isinstance(wanted, str) and wanted.endswith("+")
    estimator = wanted[:-1] if corrected else wanted
    if estimator not in trainer.estimators:
        plus = " (or with '+')" if trainer.corrected else ""
        raise ValueError(f"kl must be one of {', '.join(trainer.estimators)}{plus} with {name}; got {kl!r}")
    gradient = "straight_through" if corrected else "autograd"
    return Preset(
        name=name,
        version=trainer.version,
        token_kl={"kl": trainer.estimators[estimator], "grad": gradient, **trainer.clamps(estimator)},
        token_rewards={"placement": "last"},
        gae={"gamma": 1.0, "lam": trainer.lam, "holes": trainer.holes},
        notes=trainer.notes,
    )
