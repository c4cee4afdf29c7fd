"""Fused kernels for the reward half of an RLHF step. See ``lsc-kernels info`` and the README."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

try:
    import torch as _torch  # noqa: F401
except ImportError as problem:
    WITHOUT_TORCH: str | None = (
        f"lsc_kernels needs torch, which cannot be imported ({problem}); get it with: pip install 'torch>=2.11'"
    )
else:
    WITHOUT_TORCH = None

if WITHOUT_TORCH is None:
    from lsc_kernels import nn as nn
    from lsc_kernels.backends import backends, get_backend, set_backend
    from lsc_kernels.bradley_terry import ScaleFit, fit_scale
    from lsc_kernels.formula import Formula, at_least, prop, weakest
    from lsc_kernels.ops.aggregate_rewards import aggregate_rewards
    from lsc_kernels.ops.bradley_terry_loss import bradley_terry_loss
    from lsc_kernels.ops.discounted_returns import discounted_returns
    from lsc_kernels.ops.gae import gae
    from lsc_kernels.ops.group_advantages import group_advantages
    from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
    from lsc_kernels.ops.lsc_transform import lsc_transform
    from lsc_kernels.ops.masked_whiten import masked_whiten
    from lsc_kernels.ops.reward_head import reward_head
    from lsc_kernels.ops.shaped_rewards import ShapedRewards, shaped_rewards
    from lsc_kernels.ops.token_kl import TokenKL, token_kl
    from lsc_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs
    from lsc_kernels.ops.token_rewards import token_rewards
    from lsc_kernels.presets import Preset, preset
    from lsc_kernels.transforms import ENSEMBLES, TRANSFORMS, ensemble_reward, transform_reward

if TYPE_CHECKING:
    from lsc_kernels import analysis as analysis
    from lsc_kernels import reference as reference

__version__ = "0.1.0"

__all__ = [
    "ENSEMBLES",
    "Formula",
    "Preset",
    "ScaleFit",
    "ShapedRewards",
    "TRANSFORMS",
    "TokenKL",
    "TokenLogprobs",
    "aggregate_rewards",
    "at_least",
    "backends",
    "bradley_terry_loss",
    "discounted_returns",
    "ensemble_reward",
    "fit_scale",
    "gae",
    "get_backend",
    "group_advantages",
    "kl_from_logprobs",
    "lsc_transform",
    "masked_whiten",
    "preset",
    "prop",
    "reward_head",
    "set_backend",
    "shaped_rewards",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "transform_reward",
    "weakest",
]


def __getattr__(name: str) -> ModuleType:
    """``lk.analysis`` and ``lk.reference``, imported when first asked for; without torch, why nothing is there."""
    if WITHOUT_TORCH is not None and name in (*__all__, "nn", "analysis", "reference"):
        raise ImportError(WITHOUT_TORCH)
    if name in ("analysis", "reference"):
        return importlib.import_module(f"lsc_kernels.{name}")
    raise AttributeError(f"module 'lsc_kernels' has no attribute {name!r}")
