"""Which backend serves, what is said when one is missing, and how a choice is made."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import _first_call
import pytest
import torch
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels import eager, native, triton

backends = importlib.import_module("lsc_kernels.backends")  # the package has a function of that name


@pytest.fixture(autouse=True)
def restore_choice() -> Iterator[None]:
    before = lk.get_backend()
    yield
    lk.set_backend(before)


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 5, dtype=dtype), torch.tensor([1, 2])


def test_backends_lists_every_device_and_a_reason_for_what_is_missing() -> None:
    table = lk.backends()
    assert set(table) == {"cpu", "cuda"}
    for device, row in table.items():
        assert set(row) == {"native", "triton", "eager"}
        for name, state in row.items():
            assert state == "available" or len(state) > 10, f"{device} {name}: {state!r} explains nothing"
    assert table["cpu"]["eager"] == "available"
    assert (table["cpu"]["native"] == "available") == (native.UNAVAILABLE is None)
    assert (table["cpu"]["triton"] == "available") == (triton.unavailable("cpu") is None)
    if not torch.cuda.is_available():
        assert "available" not in table["cuda"].values()


def test_set_backend_is_seen_by_get_backend() -> None:
    for name in ("eager", "auto"):
        lk.set_backend(name)
        assert lk.get_backend() == name


@pytest.mark.parametrize("name", ["", "cuda", "Eager", "torch", None, 3])
def test_unknown_backend(name: object) -> None:
    before = lk.get_backend()
    with pytest.raises(ValueError, match="backend.*auto.*native.*triton.*eager"):
        lk.set_backend(name)  # type: ignore[arg-type]
    assert lk.get_backend() == before


def test_asking_for_a_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = lk.get_backend()
    monkeypatch.setattr(triton, "unavailable", lambda device_type: f"not for {device_type}")
    with pytest.raises(RuntimeError, match="triton.*not available.*not for cpu"):
        lk.set_backend("triton")
    assert lk.get_backend() == before


def test_every_op_stands_in_both_backends() -> None:
    assert set(native.OPS) <= set(eager.OPS)
    if importlib.util.find_spec("triton"):
        assert set(triton.ops()) <= set(eager.OPS)
        assert all(callable(module.forward) for module in triton.ops().values())
    for module in (*eager.OPS.values(), *native.OPS.values()):
        assert callable(module.forward)
    if native.UNAVAILABLE is None:
        assert set(native.OPS) == set(eager.OPS), "an op without a native kernel"


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_auto_takes_the_native_kernels_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("eager was called")

    monkeypatch.setattr(eager.token_logprobs, "forward", refuse)
    lk.set_backend("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            lk.token_logprobs(*logits(dtype))


def test_fp64_is_computed_in_fp64_by_eager_whatever_was_chosen() -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    missing = {"native": native.UNAVAILABLE, "triton": triton.unavailable("cpu")}
    for name in ("auto", "eager", "native", "triton"):
        if missing.get(name):
            continue
        lk.set_backend(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = lk.token_kl(x, torch.zeros_like(x), torch.tensor([1]), kl="k1").kl
        assert got.dtype is torch.float64
        assert got.item() == pytest.approx(5e-13, rel=1e-3)


def test_falling_back_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OPS", {})
    monkeypatch.setattr(native, "UNAVAILABLE", "no compiler was found")
    monkeypatch.setattr(backends, "_warned", set())
    lk.set_backend("auto")
    with pytest.warns(RuntimeWarning, match=r"token_logprobs.*no compiler was found.*eager") as caught:
        lk.token_logprobs(*logits())
    assert len(caught) == 1 and caught[0].filename == __file__, "the warning must point at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.token_logprobs(*logits())
    with pytest.warns(RuntimeWarning, match="token_kl"):
        lk.token_kl(logits()[0], *logits())


def test_native_without_kernels_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OPS", {})
    monkeypatch.setattr(native, "UNAVAILABLE", "no compiler was found")
    with pytest.raises(RuntimeError, match="native.*no compiler was found"):
        lk.set_backend("native")


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_environment_variable_chooses() -> None:
    result = python("import lsc_kernels as lk; print(lk.get_backend())", LSC_KERNELS_BACKEND="eager")
    assert result.stdout.strip() == "eager", result.stderr


@pytest.mark.parametrize("name", ["nonsense", "triton"])
def test_environment_variable_with_a_backend_that_is_not_there(name: str) -> None:
    if torch.cuda.is_available() and name == "triton":
        pytest.skip("it is there")
    call = "lk.token_logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))"
    program = f"import torch, lsc_kernels as lk; {call}"
    result = python(program, LSC_KERNELS_BACKEND=name, TRITON_INTERPRET="0")
    assert result.returncode != 0 and name in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["auto", "eager", "native", "triton"])
def test_a_first_call_may_be_compiled(name: str) -> None:
    if reason := {"native": native.UNAVAILABLE, "triton": triton.unavailable("cpu")}.get(name):
        pytest.skip(reason)
    _first_call.check("cpu", name)


def test_auto_never_takes_the_interpreter() -> None:
    if triton.unavailable("cpu"):
        pytest.skip(str(triton.unavailable("cpu")))
    lk.set_backend("auto")
    assert backends.select("token_kl", logits()[0]) not in triton.ops().values()
    lk.set_backend("triton")
    assert backends.select("token_kl", logits()[0]) is triton.ops()["token_kl"]


@pytest.mark.parametrize(
    ("capability", "supported"),
    [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_gpus_older_than_sm_80_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: bool
) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    card = SimpleNamespace(name="NVIDIA Something", major=capability[0], minor=capability[1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    reason = triton.unavailable("cuda")
    assert reason is None if supported else "sm_75" in str(reason) and "NVIDIA Something" in str(reason)


@pytest.mark.parametrize(
    ("architecture", "supported"), [("gfx906:sramecc+", False), ("gfx90a", True), ("gfx942:xnack-", True)]
)
def test_amd_gpus(monkeypatch: pytest.MonkeyPatch, architecture: str, supported: bool) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = SimpleNamespace(name="AMD Something", gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert (triton.unavailable("cuda") is None) == supported


def test_the_first_available_backend_is_the_one_that_auto_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (native, triton):
        monkeypatch.setattr(module, "unavailable", lambda device: None)
    for device, table in lk.backends().items():
        assert next(name for name, state in table.items() if state == "available") == (
            "triton" if device == "cuda" else "native"
        )
        assert set(table) == {"native", "triton", "eager"}


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
@pytest.mark.parametrize(
    ("built", "capability", "covered"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_90"], (8, 0), False),
        (["sm_80"], (8, 6), True),
        (["sm_80"], (9, 0), False),
        (["sm_80", "sm_100", "compute_100"], (12, 0), True),
        (["sm_80", "sm_100", "compute_100"], (7, 5), False),
    ],
)
def test_gpus_that_the_kernels_were_not_compiled_for_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, built: list[str], capability: tuple[int, int], covered: bool
) -> None:
    """Machine code serves newer GPUs of its generation, PTX all newer ones; a build may have no PTX."""
    monkeypatch.setattr(native._C, "cuda_skipped", lambda: "")
    monkeypatch.setattr(native._C, "cuda_architectures", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    reason = native.unavailable("cuda")
    if covered:
        assert reason is None
    else:
        assert "NVIDIA Something" in str(reason) and ", ".join(built) in str(reason)
