"""What can only be seen on a GPU: graphs, waiting, and what a launch costs. The ops' values are in their own files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import _first_call
import pytest
import torch
from torch import Tensor

import lsc_kernels as lk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

B, T, V, H, K = 4, 6, 5003, 64, 3


@pytest.fixture(params=["triton", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if (reason := lk.backends()["cuda"][request.param]) != "available":
        pytest.skip(reason)
    before = lk.get_backend()
    lk.set_backend(request.param)
    yield request.param
    lk.set_backend(before)


def inputs(seed: int, vocabulary: int = V) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    policy = 3 * normal(B, T, vocabulary)
    return {
        "policy": policy,
        "ref": policy + 0.1 * normal(B, T, vocabulary),
        "actions": torch.randint(vocabulary, (B, T), generator=g, device="cuda"),
        "mask": torch.arange(T, device="cuda") < torch.randint(1, T + 1, (B, 1), generator=g, device="cuda"),
        "hidden": normal(B, T, H),
        "weight": normal(K, H),
        "reference": normal(K),
    }


def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward of the whole chain, and of the parts that it does not contain."""
    policy = x["policy"].detach().requires_grad_()
    shaped = lk.shaped_rewards(
        *(x["hidden"], x["weight"], x["reference"], policy, x["ref"], x["actions"], x["mask"]),
        beta=0.1,
        kl="full",
    )
    (gradient,) = torch.autograd.grad(shaped.kl.sum() + shaped.entropy.sum(), policy)
    utility = lk.lsc_transform(shaped.scores, x["reference"]).sum(-1)
    values = shaped.entropy.detach().requires_grad_()
    advantages, returns = lk.gae(shaped.rewards.detach(), values, x["mask"])
    whitened = lk.masked_whiten(advantages, x["mask"])
    (to_values,) = torch.autograd.grad(whitened.sum() + returns.square().sum(), values)
    grouped = lk.group_advantages(shaped.scores, x["mask"].sum(-1), method="gdpo")
    return shaped.rewards, shaped.utility, shaped.kl, gradient, utility, whitened, to_values, grouped


def test_a_graph_replays_with_new_data(kernels: str) -> None:
    static = inputs(0)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step(static)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (1, 2):
        fresh = inputs(seed)
        expected = step(fresh)
        for name, tensor in static.items():
            tensor.copy_(fresh[name])
        graph.replay()
        for got, wanted in zip(captured, expected, strict=True):
            assert torch.equal(got, wanted)


def test_streams_and_graphs_run_beside_one_another(kernels: str) -> None:
    """Few rows of a long vocabulary: which program of a row is the last is counted in memory."""
    each = [[inputs(seed, LONG)[name] for name in ("policy", "ref", "actions")] for seed in range(3)]
    streams = [torch.cuda.Stream() for _ in each]
    torch.cuda.synchronize()
    expected = [lk.token_kl(*arguments) for arguments in each]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0]):
        captured = lk.token_kl(*each[0])
    torch.cuda.synchronize()
    for _ in range(20):
        outputs = []
        for output in captured:
            output.fill_(torch.nan)
        torch.cuda.synchronize()
        graph.replay()  # beside the stream that it was captured from
        for stream, arguments in zip(streams, each, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(lk.token_kl(*arguments))
        torch.cuda.synchronize()
        for got, wanted in zip([captured, *outputs], [expected[0], *expected], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_torch_compile_records_graphs_of_few_long_rows(kernels: str) -> None:
    """Memory that is kept, such as counters, is no part of the pool that torch.compile counts on getting back."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, y, actions: lk.token_kl(x, y, actions, kl="full").kl * 2, mode="reduce-overhead"
    )
    x, y, actions = (inputs(0, LONG)[name] for name in ("policy", "ref", "actions"))
    expected = lk.token_kl(x, y, actions, kl="full").kl * 2
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x, y, actions), expected)


def test_a_first_call_may_be_compiled() -> None:
    _first_call.check("cuda", "auto")


def test_nothing_waits_for_the_device(kernels: str) -> None:
    x = inputs(0)
    step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


LONG = 70_001
"""A vocabulary that several programs or blocks share where rows are few."""


@pytest.mark.parametrize("rows", [1, 700], ids=["few rows", "many rows"])
@pytest.mark.parametrize("vocabulary", [V, LONG])
def test_one_launch_forward(
    kernels: str, vocabulary: int, rows: int, launches: Callable[[Callable[[], object]], int]
) -> None:
    policy, ref = torch.randn(2, 1, vocabulary, device="cuda").expand(2, rows, vocabulary).contiguous()
    actions = torch.full((rows,), 3, device="cuda")
    assert launches(lambda: lk.token_kl(policy, ref, actions)) == 1


@pytest.mark.parametrize("formula", [None, "at_least(2, 0, ~1, 2)"])
@pytest.mark.parametrize("vocabulary", [V, LONG])
def test_shaped_rewards_is_one_launch(
    kernels: str, vocabulary: int, formula: str | None, launches: Callable[[Callable[[], object]], int]
) -> None:
    x = inputs(0, vocabulary)
    arguments = [x[name] for name in ("hidden", "weight", "reference", "policy", "ref", "actions", "mask")]
    assert launches(lambda: lk.shaped_rewards(*arguments, beta=0.1, formula=formula)) == 1


@pytest.fixture
def launches() -> Callable[[Callable[[], object]], int]:
    """Kernels and memsets that a call starts, as the driver counts them."""

    def count(call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        if not events:
            pytest.skip("the profiler sees no kernels on this machine")
        return sum(not event.name.startswith("Memcpy") for event in events)

    return count
