"""The compiled kernels, one module per op. Importing this package loads ``lsc_kernels._C`` if it was built."""

from __future__ import annotations

from types import ModuleType

UNAVAILABLE: str | None = None
"""Why the compiled kernels cannot be used; None when they can."""

OPS: dict[str, ModuleType] = {}

try:
    from lsc_kernels import _C  # noqa: F401  registers torch.ops.lsc_kernels.*
except ImportError as error:
    UNAVAILABLE = f"the extension lsc_kernels._C was not built or does not load: {error}"
