"""Run token_kl and hold every output, and every gradient, against the truth and the promised bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import _tolerances as tolerances
import _truth as truth
import torch
from torch import Generator, Tensor

import lsc_kernels as lk

OUTPUTS = ("kl", "logprobs", "ref_logprobs", "entropy")
EACH_AND_ALL: tuple[tuple[str, ...], ...] = (*((name,) for name in OUTPUTS), OUTPUTS)


def output_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in inputs] else torch.float32


def _d_bound(t: truth.TokenKL) -> Tensor:
    # the truth is itself a difference of fp64 log-probabilities
    own_error = 1e-15 * (1 + t.logprobs.abs() + t.ref_logprobs.abs()).nan_to_num(posinf=0.0)
    return (tolerances.log_ratio(t.d, t.x, t.y) + own_error).nan_to_num(nan=0.0, posinf=0.0)


def _kl_bound(t: truth.TokenKL, options: dict[str, Any]) -> Tensor:
    kind = options.get("kl", "k3")
    if kind.startswith("full"):
        bound = tolerances.divergence(t.unclamped)
    else:
        low, high = options.get("log_ratio_clamp") or (-torch.inf, torch.inf)
        function = truth.ESTIMATORS[kind]
        bound = tolerances.estimate(lambda d: function(d.clamp(low, high)), t.d, _d_bound(t))
    if options.get("old_logprobs") is not None:
        bound = t.weight * bound + t.kl.abs() * tolerances.logprob(t.logprobs)
    # where no digit of d is left, k3 may be anything
    return bound.nan_to_num(nan=0.0, posinf=1e300) + tolerances.rounding(t.kl, torch.float32)


def check_values(name: str, got: lk.TokenKL, t: truth.TokenKL, options: dict[str, Any]) -> None:
    bounds = {
        "kl": _kl_bound(t, options),
        "logprobs": tolerances.logprob(t.logprobs),
        "ref_logprobs": tolerances.logprob(t.ref_logprobs),
        "entropy": tolerances.entropy(t.entropy),
    }
    for output, bound in bounds.items():
        value = getattr(got, output)
        tolerances.check(f"{name} {output}", value, getattr(t, output), torch.where(t.kept, bound, 0.0))
    if options.get("kl", "k3") not in ("k1",) and options.get("kl_clamp") is None:
        assert not bool((got.kl < 0).any()), f"{name}: negative KL"


def _decided(t: truth.TokenKL, options: dict[str, Any]) -> Tensor:
    """Rows whose KL fp32 can hold, and whose clamps and sign of d do not hang on an error that is allowed."""
    d_bound = _d_bound(t)
    sure = t.kl.abs() < torch.finfo(torch.float32).max / 1e6
    for edge in options.get("log_ratio_clamp") or ():
        sure &= (t.d - edge).abs() > d_bound
    kind = options.get("kl", "k3")
    unweighted = _kl_bound(t, {**options, "old_logprobs": None})
    for edge in options.get("kl_clamp") or ():
        sure &= (t.unclamped - edge).abs() > unweighted
    if kind == "abs" and options.get("grad") != "straight_through":
        sure &= (t.d.abs() > d_bound) | (t.x == t.y).all(-1)
    return sure | ~t.kept


def check_token_kl(
    policy: Tensor, ref: Tensor, actions: Tensor, *, name: str = "token_kl", **options: Any
) -> lk.TokenKL:
    """Values of every output."""
    with torch.no_grad():
        got = lk.token_kl(policy, ref, actions, **options)
    t = truth.token_kl(policy.detach().double(), ref.detach().double(), actions, **options)
    wanted = output_dtype(policy, ref)
    assert all(output.dtype is wanted for output in got), (
        f"{name}: outputs {[o.dtype for o in got]}, want {wanted}"
    )
    check_values(name, got, t, options)
    return got


def check_token_kl_gradients(
    policy: Tensor,
    ref: Tensor,
    actions: Tensor,
    generator: Generator,
    *,
    combinations: Sequence[tuple[str, ...]] = EACH_AND_ALL,
    ref_grad: bool = True,
    name: str = "token_kl",
    **options: Any,
) -> None:
    """Values, and the gradients to both models' logits from each combination of outputs."""
    policy = policy.detach().requires_grad_()
    ref = ref.detach().requires_grad_(ref_grad)
    got = lk.token_kl(policy, ref, actions, **options)
    policy64, ref64 = policy.detach().double().requires_grad_(), ref.detach().double().requires_grad_()
    t = truth.token_kl(policy64, ref64, actions, **options)
    check_values(name, got, truth.TokenKL(*(field.detach() for field in t)), options)
    decided = _decided(truth.TokenKL(*(field.detach() for field in t)), options)
    leaves = (policy, ref) if ref_grad else (policy,)

    for outputs in combinations:
        upstream = {output: torch.randn(actions.shape, generator=generator) for output in outputs}
        if not ref_grad and outputs == ("ref_logprobs",):
            continue
        found = torch.autograd.grad(
            [getattr(got, output) for output in outputs],
            leaves,
            [upstream[output].to(getattr(got, output).dtype) for output in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        wanted = torch.autograd.grad(
            [getattr(t, output) for output in outputs],
            (policy64, ref64)[: len(leaves)],
            [upstream[output].double() for output in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        for leaf, leaf_name, gradient, true in zip(
            leaves, ("policy_logits", "ref_logits"), found, wanted, strict=False
        ):
            title = f"{name} d {'+'.join(outputs)} / d {leaf_name}"
            true = torch.zeros_like(policy64) if true is None else true
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            assert gradient.dtype is leaf.dtype, f"{title}: {gradient.dtype}, want {leaf.dtype}"
            bound = _gradient_bound(t, true, upstream, options, leaf.dtype)
            keep = decided.unsqueeze(-1)
            tolerances.check(
                title,
                torch.where(keep, gradient, 0.0),
                torch.where(keep, true, 0.0),
                torch.where(keep & t.kept.unsqueeze(-1), bound, 0.0),
            )


def _gradient_bound(
    t: truth.TokenKL, true: Tensor, upstream: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    total = torch.zeros_like(t.d)
    for output, gradient in upstream.items():
        total = total + gradient.abs() * (t.weight if output == "kl" else 1.0)
    temperature = options.get("temperature", 1.0)
    bound = tolerances.gradient(true, total, t.d, temperature, dtype)
    if options.get("old_logprobs") is not None and "kl" in upstream:
        # the ratio carries the error of the log-probability, and brings the KL's own into the gradient
        relative = tolerances.logprob(t.logprobs).unsqueeze(-1)
        carried = (upstream["kl"].abs() * _kl_bound(t, options) / temperature).unsqueeze(-1)
        bound = bound + relative * true.abs().amax(-1, keepdim=True) + carried
    return bound.detach()
