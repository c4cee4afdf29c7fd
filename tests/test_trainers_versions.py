"""A trainer in a version that its adapter does not know is told, and nothing is hooked."""

from __future__ import annotations

from importlib import metadata

import pytest

from lsc_kernels.extras import MissingExtra
from lsc_kernels.trainers import _versions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("packaging", reason="packaging comes with every trainer")

    def version(package: str) -> str:
        if package != "trl":
            raise metadata.PackageNotFoundError(package)
        return found

    found = "1.16.2"
    monkeypatch.setattr(_versions.metadata, "version", version)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("known", [">=1.16,<1.17", "==1.16.*", "!=1.16.1", ""])
def test_a_known_version_comes_back(known: str) -> None:
    assert _versions.require("trl", known).release == (1, 16, 2)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("known", [">=1.17,<1.18", "==1.15.*", "<1.16"])
def test_an_unknown_version(known: str) -> None:
    with pytest.raises(_versions.UnknownVersion) as caught:
        _versions.require("trl", known)
    message = str(caught.value)
    assert "trl 1.16.2 is installed" in message and "nothing was hooked" in message
    assert f"pip install 'trl{known}'" in message


@pytest.mark.usefixtures("installed")
def test_a_missing_package() -> None:
    with pytest.raises(MissingExtra, match="verl is not installed; get it with: pip install 'verl==0.9.*'"):
        _versions.require("verl", "==0.9.*")
