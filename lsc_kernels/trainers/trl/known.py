"""The versions of TRL that these adapters were tested with."""

from __future__ import annotations

from lsc_kernels.trainers._versions import require

KNOWN = ">=1.16,<1.17"


def check() -> None:
    """Refuse a TRL whose inside these adapters do not know.

    Raises:
        MissingExtra: TRL is not installed.
        UnknownVersion: another version is.
    """
    require("trl", KNOWN)
