"""An adapter hooks into what its trainer does not promise to keep, so it names the versions it was tested with."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from lsc_kernels.extras import MissingExtra, load

if TYPE_CHECKING:
    from packaging.version import Version


class UnknownVersion(ImportError):
    """A trainer is installed in a version that its adapter was not tested with; nothing has been hooked."""


def require(package: str, known: str) -> Version:
    """The installed version of a trainer, if its adapter knows it.

    Args:
        package: the name under which pip knows it.
        known: the versions that the adapter was tested with, as pip writes them: ``">=1.16,<1.17"``.

    Raises:
        MissingExtra: it is not installed.
        UnknownVersion: another version is; the message says which, which ones are known, and what to do.

    Example:
        >>> require("numpy", ">=99")
        Traceback (most recent call last):
        ...
        lsc_kernels.trainers._versions.UnknownVersion: numpy ... is installed, and this adapter knows numpy>=99 ...
    """
    wanted = f"{package}{known}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as problem:
        raise MissingExtra(
            f"{package} is not installed; get it with: pip install '{wanted}'", name=package
        ) from problem
    version: Version = load("packaging.version", package).Version(found)
    if not load("packaging.specifiers", package).SpecifierSet(known).contains(version, prereleases=True):
        raise UnknownVersion(
            f"{package} {found} is installed, and this adapter knows {wanted} only: it relies on functions that "
            "change between versions, so nothing was hooked. "
            f"Install one that it knows (pip install '{wanted}'), or look for a newer lsc-kernels "
            "(pip install -U lsc-kernels). The ops themselves (lk.token_kl and so on) work beside any version.",
            name=package,
        )
    return version
