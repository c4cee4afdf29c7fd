"""TRL: rewards for GRPOTrainer and RLOOTrainer, trainers with our losses, and drop-ins for its log-probabilities.

=================================  ================================================================================
:class:`LSCReward`                 one reward from K reward functions or models, for ``reward_funcs``
:class:`LSCGRPOTrainer`            GRPOTrainer with the KL in per-token rewards instead of in the loss
:class:`LSCRewardTrainer`          RewardTrainer with :func:`lsc_kernels.bradley_terry_loss`
:func:`selective_log_softmax`      and ``entropy_from_logits``, ``selective_log_softmax_and_entropy``: TRL's functions
                                   by name, from one pass over the logits
:func:`patch`, :func:`unpatch`     put these functions in place of TRL's, and back
=================================  ================================================================================

Only the trainers and ``patch`` need TRL, and only when they are used: in a version that is not in :data:`KNOWN` they
raise :class:`lsc_kernels.trainers._versions.UnknownVersion`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lsc_kernels.trainers.trl.drop_in import (
    entropy_from_logits,
    patch,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    unpatch,
)
from lsc_kernels.trainers.trl.known import KNOWN
from lsc_kernels.trainers.trl.reward import Canned, GroupQuantile, GroupScalingWarning, LSCReward, Scored

if TYPE_CHECKING:
    from lsc_kernels.trainers.trl.trainers import LSCGRPOTrainer as LSCGRPOTrainer
    from lsc_kernels.trainers.trl.trainers import LSCRewardTrainer as LSCRewardTrainer

__all__ = [
    "KNOWN",
    "Canned",
    "GroupQuantile",
    "GroupScalingWarning",
    "LSCGRPOTrainer",
    "LSCReward",
    "LSCRewardTrainer",
    "Scored",
    "entropy_from_logits",
    "patch",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """The trainers, whose base classes are TRL's."""
    if name in ("LSCGRPOTrainer", "LSCRewardTrainer"):
        return getattr(importlib.import_module("lsc_kernels.trainers.trl.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
