"""Fixtures for every test file: the backend under test, and random inputs whose seed a failure shows."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator

import pytest
import torch

import lsc_kernels as lk
from lsc_kernels import native

SEED = int(os.environ.get("LSC_TEST_SEED") or secrets.randbits(31))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    # torch.compile's cache outlives the session and does not notice that the fake of an op has changed.
    cache = tempfile.TemporaryDirectory(prefix="lsc-inductor-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name


def pytest_report_header(config: pytest.Config) -> str:
    return f"inputs: LSC_TEST_SEED={SEED}"


@pytest.fixture(params=["native", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once per backend, with that backend chosen."""
    if request.param == "native" and native.UNAVAILABLE:
        pytest.skip(native.UNAVAILABLE)
    before = lk.get_backend()
    lk.set_backend(request.param)
    yield request.param
    lk.set_backend(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that are new in each run and do not depend on which other tests run."""
    print(f"to repeat these inputs: LSC_TEST_SEED={SEED}")
    digest = hashlib.sha256(f"{SEED} {request.node.nodeid}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
