"""Fixtures for every test file: the backend under test, and random inputs whose seed a failure shows."""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import tempfile
import time
from collections.abc import Iterator

import _emulated
import pytest
import torch
from _on_gpu import use_gpu

import lsc_kernels as lk
from lsc_kernels import eager, native, triton

# Set for the processes that share the tests out between them: all have to draw the same cases.
SEED = int(os.environ.setdefault("LSC_TEST_SEED", str(secrets.randbits(31))))


def pytest_configure(config: pytest.Config) -> None:
    if triton.interpreted():
        import _interpreter

        _interpreter.quicken()
    torch.set_num_threads(2)
    # torch.compile's cache outlives the session and does not notice that the fake of an op has changed.
    cache = tempfile.TemporaryDirectory(prefix="lsc-inductor-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-case", action="store_true", help="all cases of emulated CUDA kernels, all compilations"
    )
    parser.addoption("--seconds", type=float, help="in random order, and skip what has not begun by then")


EMULATED_ONE_IN = 10


def _emulated_left_out(items: list[pytest.Item], draw: random.Random) -> list[pytest.Item]:
    """All but a part of the cases of emulated CUDA kernels; all of them take some ten minutes of a core."""
    emulated = [
        item
        for item in items
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == "cuda-emulated"
    ]
    taken = -(-len(emulated) // EMULATED_ONE_IN)
    return draw.sample(emulated, len(emulated) - taken)


def _compilations_left_out(items: list[pytest.Item], draw: random.Random) -> list[pytest.Item]:
    """All but as many compilations ahead of time, of a minute or more each, as have every target and every dtype."""
    pairs = {
        (item.callspec.params["target"], item.callspec.params["dtype"]): item
        for item in items
        if isinstance(item, pytest.Function) and item.originalname == "test_compiles_ahead_of_time"
    }
    targets, dtypes = (sorted(set(names)) for names in zip(*pairs, strict=True)) if pairs else ([], [])
    draw.shuffle(targets), draw.shuffle(dtypes)
    count = max(len(targets), len(dtypes))
    kept = {(targets[i % len(targets)], dtypes[i % len(dtypes)]) for i in range(count)}
    return [item for pair, item in pairs.items() if pair not in kept]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is slow takes a part of the cases that were asked for, others in each run."""
    if config.getoption("--seconds") is not None:
        random.Random(SEED).shuffle(items)
    if config.getoption("--every-case"):
        return
    draw = random.Random(SEED)
    left_out = {*_emulated_left_out(items, draw), *_compilations_left_out(items, draw)}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


# The session's, also in a process that takes the place of one that has ended.
STARTED = float(os.environ.setdefault("LSC_TEST_STARTED", str(time.time())))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.time() - STARTED > seconds:
        pytest.skip("no time left")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """An illegal access ends the CUDA context: pytest-xdist goes on with the tests after it in another process."""
    done = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return done


def pytest_report_header(config: pytest.Config) -> str:
    return f"inputs: LSC_TEST_SEED={SEED}"


def _cuda_emulated(request: pytest.FixtureRequest) -> Iterator[str]:
    if missing := native.unavailable("cpu"):
        pytest.skip(missing)
    op = request.path.stem.removeprefix("test_")
    if f"{native.KERNEL_OF.get(op, op)}_forward" not in _emulated.ops():
        pytest.skip(f"{op} is no op with a CUDA kernel of its own")
    before = lk.get_backend()
    with _emulated.serving():
        lk.set_backend("native")
        yield "cuda-emulated"
        lk.set_backend(before)


ON_THIS_MACHINE = ["native", "cuda-emulated", "triton", "eager"]
ON_A_GPU = ["native-cuda", "triton-cuda", "eager-cuda"] if torch.cuda.is_available() else []


@pytest.fixture(params=ON_THIS_MACHINE + ON_A_GPU)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs once per backend, with that backend chosen.

    "cuda-emulated" runs the CUDA kernels' source here. On a machine with a GPU every test also runs there: its tensors
    are moved, unless its mark says that it is about the CPU.
    """
    if request.param == "cuda-emulated":
        yield from _cuda_emulated(request)
        return
    name, _, on_gpu = request.param.partition("-")
    device = on_gpu or "cpu"
    if on_gpu and request.node.get_closest_marker("cpu"):
        pytest.skip("about what only the CPU does")
    if reason := {"native": native, "triton": triton}[name].unavailable(device) if name != "eager" else None:
        pytest.skip(reason)
    before = lk.get_backend()
    lk.set_backend(name)
    if on_gpu:
        use_gpu(monkeypatch)
    yield request.param
    lk.set_backend(before)


@pytest.fixture
def unchecked_actions(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the values of actions before the kernel does, as on a GPU."""
    if backend == "native":
        pytest.skip("the CPU's kernels raise")
    modules = [eager.token_logprobs]
    if backend.startswith("triton"):
        modules += [triton.ops()[op] for op in ("token_kl", "shaped_rewards")]
    for module in modules:
        monkeypatch.setattr(module, "check_actions", lambda *_: None)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that are new in each run and do not depend on which other tests run."""
    print(f"to repeat these inputs: LSC_TEST_SEED={SEED}")
    digest = hashlib.sha256(f"{SEED} {request.path.name} {request.node.getmodpath()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
