"""OpenRLHF's modules, without what they need of CUDA.

OpenRLHF does not install on a machine without it: its wheel lies in the environment of scripts/trainer_environment.sh
without what it depends on, for which mocks stand in while its modules are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

MISSING = (
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "liger_kernel",
    "optimum",
    "pylatexenc",
    "vllm",
    "wandb",
)
UTILS = "openrlhf.models.utils"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
ACTOR = "openrlhf.trainer.ray.ppo_actor"


class Mocks:
    """Finds a mock for each module of a package that is not installed."""

    def __init__(self) -> None:
        self.packages = [name for name in MISSING if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        mock = MagicMock(name=spec.name)
        mock.__path__, mock.__spec__, mock.__name__ = [], spec, spec.name
        return mock

    def exec_module(self, module: ModuleType) -> None:
        pass


def load() -> SimpleNamespace:
    """Its modules ``utils``, ``maker`` and ``actor``, and the functions that the adapter replaces."""
    mocks = Mocks()
    sys.meta_path.append(mocks)  # type: ignore[arg-type]
    try:
        utils, maker, actor = (importlib.import_module(name) for name in (UTILS, MAKER, ACTOR))
    finally:
        sys.meta_path.remove(mocks)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.partition(".")[0] in mocks.packages]:
            del sys.modules[name]
    return SimpleNamespace(
        utils=utils,
        maker=maker,
        actor=actor,
        kl=utils.compute_approx_kl,
        reward=utils.compute_reward,
        gae=maker.RemoteExperienceMaker.get_advantages_and_returns,
        returns=maker.RemoteExperienceMaker.get_cumulative_returns,
    )
