"""What is said of the Triton kernels beyond the values: launches, compilations, chunks, code for GPUs not here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cases import logit_pair, normal
from _modes import TorchLaunches
from _sequences import packed_gae
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels import triton

pytestmark = pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu")))


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    before = lk.get_backend()
    lk.set_backend("triton")
    yield
    lk.set_backend(before)


class Launches(TorchLaunches):
    """The kernels that a GPU would be given: ours, and PyTorch's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ours: list[Any] = []
        for module in triton.ops().values():
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", self._recorded(module.launch))
        # these look at values, on the CPU only
        for name, module_name in (("check_actions", "token_kl"), ("_check_ids", "shaped_rewards")):
            monkeypatch.setattr(triton.ops()[module_name], name, lambda *_: None)

    def _recorded(self, launch: Any) -> Any:
        def record(kernel: Any, *arguments: Any, **meta: Any) -> None:
            self.ours.append(kernel)
            with torch.utils._python_dispatch._disable_current_modes():
                launch(kernel, *arguments, **meta)

        return record


BACKWARD_LAUNCHES = {("policy",): [2, 3], ("hidden", "weight", "policy"): [5, 3]}


def chain(generator: Generator, batch: int, length: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    policy, ref = logit_pair(generator, "near_1e-1", (batch, length, vocabulary))
    return {
        "hidden": normal(generator, batch, length, 16),
        "weight": normal(generator, 3, 16),
        "reference_reward": normal(generator, 3),
        "policy": policy,
        "ref": ref,
        "actions": torch.randint(0, vocabulary, (batch, length), generator=generator),
        "mask": torch.ones(batch, length, dtype=torch.int64),
        "beta": 0.1,
        "bias": normal(generator, 3),
    } | changes


@pytest.mark.parametrize("formula", [None, "at_least(2, 0, ~1, 2)"])
@pytest.mark.parametrize("placement", ["last", "eos_plus_one", "before_last"])
def test_shaped_rewards_is_one_launch(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, placement: str, formula: str | None
) -> None:
    options = {"placement": placement, "formula": formula}
    arguments = chain(generator, 2, 3, 50, attention_mask=torch.ones(2, 3), **options)
    if formula is not None:
        lk.shaped_rewards(**arguments)  # a program is copied to its device at its first use
    with Launches(monkeypatch) as launches:
        out = lk.shaped_rewards(**arguments)
    assert len(launches.ours) == 1 and launches.torch == []
    lk.set_backend("eager")
    assert torch.allclose(out.rewards, lk.shaped_rewards(**arguments).rewards, rtol=1e-5, atol=1e-6)


def test_launches_of_shaped_rewards_backward(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placement and token rows, and what leaves a token out; with the reward side the aggregation and the head too."""
    arguments = chain(generator, 2, 3, 50)
    for wanted, launches in BACKWARD_LAUNCHES.items():
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        rewards = lk.shaped_rewards(**(arguments | leaves)).rewards
        upstream = torch.ones_like(rewards)
        with monkeypatch.context() as patch, Launches(patch) as recorded:
            torch.autograd.grad(rewards, list(leaves.values()), upstream)
        assert [len(recorded.ours), len(recorded.torch)] == launches, recorded.torch


def test_the_policy_side_is_one_launch_each_way(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, ref = (x.requires_grad_() for x in logit_pair(generator, "near_1e-1", (4, 50)))
    actions, mask, upstream = torch.tensor([1, 2, -100, 3]), torch.ones(4, dtype=torch.bool), torch.ones(4)
    with Launches(monkeypatch) as launches:
        kl = lk.token_kl(policy, ref, actions, mask=mask, kl="full").kl
        assert len(launches.ours) == 1 and launches.torch == []
        torch.autograd.grad(kl, (policy, ref), upstream)
    assert len(launches.ours) == 2 and launches.torch == []


def long_rows(generator: Generator) -> Callable[[], list[Tensor]]:
    """What three kernels make of four rows of three chunks, one of which does not count."""
    arguments = chain(generator, 2, 2, 70_001, mask=torch.tensor([[True, True], [False, True]]))
    policy, ref, actions, mask = (arguments[name] for name in ("policy", "ref", "actions", "mask"))

    def outputs() -> list[Tensor]:
        reverse = lk.token_kl(policy, ref, actions, kl="full_reverse", mask=mask)
        alone, shaped = lk.token_logprobs(policy, actions, mask=mask), lk.shaped_rewards(**arguments)
        return [each for each in (*reverse, *alone, *shaped) if each is not None]

    return outputs


def test_few_long_rows_are_one_launch_and_the_same_bits(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = long_rows(generator)
    with monkeypatch.context() as patch:
        patch.setattr(triton.ops()["token_kl"], "SPLIT_BELOW", 0)
        whole = outputs()
    outputs()  # the counters of the interpreter's only stream are made, for good
    with monkeypatch.context() as patch, Launches(patch) as launches:
        split = outputs()
    assert len(launches.ours) == 3 and launches.torch == []
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


@pytest.mark.skipif(
    not triton.interpreted(), reason="about the order in which the interpreter takes programs"
)
def test_the_last_program_of_a_row_may_be_any(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    outputs = long_rows(generator)
    expected = outputs()
    ascending = builder.set_grid_idx
    monkeypatch.setattr(
        builder,
        "set_grid_idx",
        lambda *index: ascending(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True))),
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))


def test_counters_are_zero_between_launches_and_grow(generator: Generator) -> None:
    from lsc_kernels.triton import _launch

    long_rows(generator)()
    device = torch.device("cpu")
    counters = _launch.arrival_counters(1, device)
    assert not counters.any() and _launch.arrival_counters(1, device) is counters
    more = _launch.arrival_counters(len(counters) + 1, device)
    assert not more.any() and len(more) > len(counters)
    assert _launch.arrival_counters(1, device) is more


def test_masked_rows_read_no_logits(generator: Generator) -> None:
    policy, ref = logit_pair(generator, "near_1e-1", (1, 50))
    missing = torch.full((1, 50), torch.nan)
    x, y = torch.cat([policy, missing]), torch.cat([ref, missing])
    out = lk.token_kl(x, y, torch.tensor([3, -100]), kl="full")
    assert all(float(each[1]) == 0.0 for each in out)


@pytest.mark.parametrize("holes", ["skip", "zero", "cut"])
def test_a_sequence_is_the_same_bits_however_many_programs_share_it(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, holes: str
) -> None:
    monkeypatch.setattr(triton.ops()["gae"], "TILES", 2)  # a chunk is 1024 positions
    both, check_last = packed_gae(generator, [2500, 0, 1, 1024, 3000], holes)
    with Launches(monkeypatch) as launches:
        shared = both()
    assert len(launches.ours) == 4
    monkeypatch.setattr(triton.ops()["gae"], "SPLIT_BELOW", 0)
    with Launches(monkeypatch) as launches:
        alone = both()
    assert len(launches.ours) == 2
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    check_last(alone)


def without_interpreter(name: str, *arguments: str, **environment: str) -> list[Any]:
    """The lines of JSON that a program beside this file prints, in a process that does not interpret."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / name), *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(lk.__file__).parent.parent),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fifty_lengths_compile_once() -> None:
    """Nothing that Triton specialises on changes with B or T, 1 and multiples of 16 included."""
    ((first, again),) = without_interpreter("_lengths.py")
    assert len(first) == len(set(first)) == 15, "each of these launches is a kernel of its own"
    assert not again, f"compiled again: {again[0]}"


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = {"float32": ("full",), "bfloat16": ("k3",), "float16": ("full_reverse",)}


@pytest.fixture(scope="session")
def compiled_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache of this run: a kernel that does not see the logits' dtype is compiled once for a target."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "triton-cache"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time(compiled_before: Path, target: str, dtype: str) -> None:
    facts = without_interpreter(
        "_aot.py", target, dtype, *KINDS[dtype], TRITON_CACHE_DIR=str(compiled_before)
    )
    assert {fact["kernel"].split(".")[0] for fact in facts} >= {
        "aggregate_rewards", "gae", "group_advantages", "kl_from_logprobs", "lsc_transform", "masked_whiten",
        "reward_head", "shaped_rewards", "token_rewards", "token_rows",
    }  # fmt: skip
    if target.startswith("sm_"):
        # a few words, among hundreds of instructions
        spilled = [fact for fact in facts if fact["spilled"] > 64]
        assert not spilled, f"local memory is used: {spilled}"
        contracted = [fact for fact in facts if fact["contracted"]]
        assert not contracted, f"the assembler may contract: {contracted}"


@pytest.mark.skipif(not triton.interpreted(), reason="about the interpreter")
def test_the_quick_interpreter_gives_the_same_bits(generator: Generator) -> None:
    """Each shortcut against what it stands for: dtypes, shapes and numbers that it takes, and those that it leaves."""
    import _interpreter as quick
    import triton.language as tl

    def tensor(dtype: Any, shape: tuple[int, ...]) -> Any:
        size = math.prod(shape)
        values = 50 * torch.randn(size, generator=generator, dtype=torch.float64)
        values[::5] = 0.0
        data = values.numpy()
        if dtype.is_floating():
            data[1::7] = np.resize([np.inf, -np.inf, np.nan, -0.0], len(data[1::7]))
        data = data.astype(bool if dtype is tl.int1 else quick.interpreter._get_np_dtype(dtype)).reshape(
            shape or (1,)
        )
        return tl.tensor(quick.Handle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)

    def outcome(function: Any, arguments: Any) -> Any:
        named = arguments[-1] if isinstance(arguments[-1], dict) else {}
        before = memory.clone()
        try:
            result = function(*arguments[: len(arguments) - bool(named)], **named)
        except Exception as problem:
            return type(problem)
        written = memory.numpy().tobytes()
        memory.copy_(before)
        if result is None or result.handle is None:
            return written
        data = result.handle.data
        numel = tl.constexpr(math.prod(each.value for each in result.shape)).value
        return (
            np.broadcast_to(data, [each.value for each in result.shape] or (1,)).tobytes(), data.dtype,
            str(result.type), str(result.dtype), str(result.shape), result.numel.value == numel,
        )  # fmt: skip

    memory = torch.randn(64, generator=generator)

    def pointing(dtype: Any, shape: tuple[int, ...] = ()) -> Any:
        kind = tl.pointer_type(dtype)
        bytes_each = dtype.primitive_bitwidth // 8
        address = memory.data_ptr() + bytes_each * np.arange(math.prod(shape), dtype=np.uint64)
        return tl.tensor(
            quick.Handle(address.reshape(shape or (1,)), kind),
            tl.block_type(kind, list(shape)) if shape else kind,
        )

    pointer = pointing(tl.float32)
    dtypes = [tl.float32, tl.float64, tl.int32, tl.int64, tl.int1, tl.float16, tl.uint8]
    tensors = [tensor(dtype, shape) for dtype in dtypes for shape in ((), (8,), (4, 8), (4, 1), (1,))]
    numbers = [
        0,
        1,
        -3,
        2**31 - 1,
        2**40,
        0.0,
        -0.0,
        0.1,
        1e-40,
        1e300,
        math.inf,
        math.nan,
        True,
        tl.constexpr(0.3),
    ]
    pairs = [(a, b) for a in tensors for b in (*tensors, *numbers)]
    pairs += [(pointer, b) for b in (*tensors, *numbers)]
    random.Random(generator.initial_seed()).shuffle(pairs)
    conditions, one = [each for each in tensors if each.dtype is tl.int1], tensors[0]
    given = {
        **{name: [(a,) for a in tensors] for name in ("exp", "exp2", "log", "abs")},
        "to": [(a, dtype) for a in tensors for dtype in dtypes],
        "fma": [(*pair, third) for pair in pairs[:100] for third in (one, tensors[1], 0.5, 0.1)],
        "where": [
            (condition, *pair) for pair in (*pairs[:100], (0, 1), (0.5, 1.5)) for condition in conditions
        ],
        "load": [(pointer,), (pointer + tensors[11],)],
        "store": [(pointer, tensors[0]), (pointer, tensors[5]), (pointer, 2.0)],
        "full": [(shape, value, dtype) for shape in ((), [8]) for value in numbers for dtype in dtypes[:5]],
    }
    masks = [tensor(tl.int1, shape) for shape in ((8,), (4, 8), (1,), (4, 1))]
    for dtype in (*dtypes[:5], tl.float16, tl.bfloat16):
        given["load"] += [(pointing(dtype),)]
        for shape in ((8,), (4, 8)):
            block, value = pointing(dtype, shape), tensor(dtype, shape)
            for mask in masks:
                given["load"] += [(block, {"mask": mask, "other": other}) for other in (*numbers, value)]
                given["load"] += [(block, {"mask": mask})]
                given["store"] += [(block, each, {"mask": mask}) for each in (value, one, tensors[1])]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, name, _ in quick.shortcuts():
            shortcut = getattr(place, name)
            for arguments in given.get(name, pairs[:250]):
                expected = outcome(shortcut.__wrapped__, arguments)
                got = outcome(shortcut, arguments)
                shown = [(str(getattr(each, "type", "")), str(each)) for each in arguments]
                assert got == expected, f"{name}{shown}: {got}, want {expected}"


def test_importing_the_library_does_not_import_triton() -> None:
    program = "import sys, lsc_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert importlib.util.find_spec("triton")
