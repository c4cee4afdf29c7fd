"""What a mistake gets: the error of the contract, and a message that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lsc_kernels as lk

# on a GPU no host waits to look at values
pytestmark = pytest.mark.cpu

NAN, INF = float("nan"), float("inf")


def token_logprobs_arguments() -> dict[str, Any]:
    return {"logits": torch.randn(2, 3, 7), "actions": torch.randint(0, 7, (2, 3))}


def token_kl_arguments() -> dict[str, Any]:
    return {
        "policy_logits": torch.randn(2, 3, 7),
        "ref_logits": torch.randn(2, 3, 7),
        "actions": torch.randint(0, 7, (2, 3)),
    }


def kl_from_logprobs_arguments() -> dict[str, Any]:
    return {"logprobs": -torch.rand(2, 3), "ref_logprobs": -torch.rand(2, 3)}


def shaped_rewards_arguments() -> dict[str, Any]:
    return {
        "hidden": torch.randn(2, 5, 4),
        "weight": torch.randn(3, 4),
        "reference_reward": torch.randn(3),
        "policy": torch.randn(2, 3, 7),
        "ref": torch.randn(2, 3, 7),
        "actions": torch.randint(0, 7, (2, 3)),
        "mask": torch.ones(2, 3),
        "beta": 0.1,
    }


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "token_logprobs": (lk.token_logprobs, token_logprobs_arguments),
    "token_kl": (lk.token_kl, token_kl_arguments),
    "kl_from_logprobs": (lk.kl_from_logprobs, kl_from_logprobs_arguments),
    "shaped_rewards": (lk.shaped_rewards, shaped_rewards_arguments),
}

Mistake = tuple[str, object, type[Exception] | tuple[type[Exception], ...]]

ROWS: list[Mistake] = [
    ("actions", torch.zeros(2, 4, dtype=torch.int64), ValueError),
    ("actions", torch.zeros(6, dtype=torch.int64), ValueError),
    ("actions", torch.zeros(2, 3, 1, dtype=torch.int64), ValueError),
    ("actions", torch.zeros(2, 3), TypeError),
    ("actions", torch.zeros(2, 3, dtype=torch.int16), TypeError),
    ("actions", torch.zeros(2, 3, dtype=torch.bool), TypeError),
    ("actions", [[0, 1, 2], [0, 1, 2]], TypeError),
    ("actions", None, TypeError),
    ("actions", torch.zeros(2, 3, dtype=torch.int64, device="meta"), ValueError),
    ("actions", torch.full((2, 3), 7), IndexError),
    ("actions", torch.full((2, 3), -1), IndexError),
    ("actions", torch.full((2, 3), -101), IndexError),
    ("actions", torch.full((2, 3), 2**40), IndexError),
    ("actions", torch.full((2, 3), 2**31 - 1, dtype=torch.int32), IndexError),
    ("temperature", 0.0, ValueError),
    ("temperature", -1.0, ValueError),
    ("temperature", NAN, ValueError),
    ("temperature", INF, ValueError),
    ("temperature", "1", TypeError),
    ("temperature", None, TypeError),
    ("temperature", True, TypeError),
    ("temperature", torch.ones(3), ValueError),
    ("temperature", torch.ones(2, 3, 7), ValueError),
    ("temperature", torch.ones(2, 3, dtype=torch.int64), TypeError),
    ("temperature", torch.zeros(2, 3), ValueError),
    ("temperature", torch.full((2, 3), NAN), ValueError),
    ("temperature", torch.full((2, 3), INF), ValueError),
    ("temperature", torch.tensor(-0.5), ValueError),
    ("temperature", torch.ones(2, 3, device="meta"), ValueError),
    ("temperature", torch.ones(2, 3, requires_grad=True), ValueError),
    ("process_group", "world", ValueError),
]

MASKS: list[Mistake] = [
    ("mask", torch.ones(2, 4), ValueError),
    ("mask", torch.ones(3), ValueError),
    ("mask", torch.ones(2, 3, 1), ValueError),
    ("mask", [[1, 1, 1], [1, 1, 1]], TypeError),
    ("mask", 1, TypeError),
    ("mask", torch.ones(2, 3, dtype=torch.complex64), TypeError),
    ("mask", torch.ones(2, 3, device="meta"), ValueError),
]


def not_floating(name: str) -> list[Mistake]:
    return [
        (name, torch.zeros(2, 3, 7, dtype=torch.int64), TypeError),
        (name, torch.zeros(2, 3, 7, dtype=torch.complex64), TypeError),
        (name, [[[0.0] * 7] * 3] * 2, TypeError),
        (name, None, (TypeError, ValueError)),
    ]


KL: list[Mistake] = [
    ("kl", "k4", ValueError),
    ("kl", "K3", ValueError),
    ("kl", "", ValueError),
    ("kl", None, ValueError),
    ("kl", 3, ValueError),
    ("kl", ["k3"], ValueError),
    ("grad", "none", ValueError),
    ("grad", None, ValueError),
    ("log_ratio_clamp", 10.0, ValueError),
    ("log_ratio_clamp", (1.0,), ValueError),
    ("log_ratio_clamp", (1.0, 2.0, 3.0), ValueError),
    ("log_ratio_clamp", (1.0, -1.0), ValueError),
    ("log_ratio_clamp", (NAN, 1.0), ValueError),
    ("log_ratio_clamp", (0.0, NAN), ValueError),
    ("log_ratio_clamp", ("a", "b"), (ValueError, TypeError)),
    ("kl_clamp", 10.0, ValueError),
    ("kl_clamp", (2.0, 1.0), ValueError),
    ("kl_clamp", (NAN, NAN), ValueError),
    ("kl_clamp", ("a", "b"), (ValueError, TypeError)),
    ("old_logprobs", torch.zeros(2, 4), ValueError),
    ("old_logprobs", torch.zeros(3), ValueError),
    ("old_logprobs", torch.zeros(2, 3, dtype=torch.int64), TypeError),
    ("old_logprobs", 0.0, TypeError),
    ("old_logprobs", torch.zeros(2, 3, device="meta"), ValueError),
]

MISTAKES: dict[str, list[Mistake]] = {
    "token_logprobs": [
        *not_floating("logits"),
        ("logits", torch.randn(7), ValueError),
        ("logits", torch.tensor(1.0), ValueError),
        ("logits", torch.randn(2, 3, 0), ValueError),
        *ROWS,
        *MASKS,
    ],
    "token_kl": [
        *not_floating("policy_logits"),
        *not_floating("ref_logits"),
        ("policy_logits", torch.tensor(1.0), ValueError),
        ("policy_logits", torch.randn(2, 3, 0), ValueError),
        ("ref_logits", torch.randn(2, 3, 8), ValueError),
        ("ref_logits", torch.randn(2, 4, 7), ValueError),
        ("ref_logits", torch.randn(3, 7), ValueError),
        ("ref_logits", torch.randn(1, 1, 7), ValueError),
        ("ref_logits", torch.randn(2, 3, 7, device="meta"), ValueError),
        *ROWS,
        *MASKS,
        *KL,
    ],
    "kl_from_logprobs": [
        ("logprobs", torch.zeros(2, 3, dtype=torch.int64), TypeError),
        ("logprobs", [0.0], TypeError),
        ("logprobs", None, TypeError),
        ("ref_logprobs", torch.zeros(2, 3, dtype=torch.int32), TypeError),
        ("ref_logprobs", 0.0, TypeError),
        ("ref_logprobs", torch.zeros(2, 1), ValueError),
        ("ref_logprobs", torch.zeros(3), ValueError),
        ("ref_logprobs", torch.zeros(2, 3, device="meta"), ValueError),
        ("kl", "full", ValueError),
        ("kl", "full_reverse", ValueError),
        *MASKS,
        *KL,
    ],
    "shaped_rewards": [
        *[mistake for name in ("hidden", "policy", "ref") for mistake in not_floating(name)],
        ("hidden", torch.randn(3, 5, 4), ValueError),
        ("hidden", torch.randn(4), ValueError),
        ("hidden", [], (TypeError, ValueError)),
        ("weight", torch.randn(3, 5), ValueError),
        ("weight", torch.randn(0, 4), ValueError),
        ("weight", torch.randn(4), ValueError),
        ("weight", torch.zeros(3, 4, dtype=torch.int64), TypeError),
        ("weight", None, (TypeError, ValueError)),
        ("bias", torch.randn(2), ValueError),
        ("bias", torch.zeros(3, dtype=torch.int64), TypeError),
        ("index", torch.tensor([0, 5]), (ValueError, IndexError)),
        ("index", torch.tensor([0.0, 1.0]), TypeError),
        ("index", torch.tensor([0]), ValueError),
        ("attention_mask", torch.ones(2, 4), ValueError),
        ("cu_seqlens", torch.tensor([0.0, 2.0]), TypeError),
        ("reference_reward", torch.randn(4), ValueError),
        ("reference_reward", "0", TypeError),
        ("reference_reward", torch.zeros(3, dtype=torch.int64), TypeError),
        ("scale", 0.0, ValueError),
        ("scale", NAN, ValueError),
        ("scale", torch.tensor([1.0, -1.0, 1.0]), ValueError),
        ("floor", 1.0, ValueError),
        ("floor", -0.1, ValueError),
        ("weights", torch.randn(4), ValueError),
        ("weights", [1.0, 1.0, 1.0], TypeError),
        ("names", ["a", "b"], ValueError),
        ("formula", "a & b", ValueError),
        ("missing", "drop", ValueError),
        ("scores", torch.randn(2, 3), ValueError),
        ("policy_logprobs", torch.randn(2, 3), ValueError),
        ("policy", torch.randn(6, 7), ValueError),
        ("policy", torch.randn(2, 3, 0), ValueError),
        ("ref", torch.randn(2, 3, 8), ValueError),
        ("ref", torch.randn(2, 3, 7, device="meta"), ValueError),
        ("beta", NAN, ValueError),
        ("beta", INF, ValueError),
        ("beta", "0.1", TypeError),
        ("beta", None, TypeError),
        ("placement", "first", ValueError),
        ("placement_index", torch.tensor([0]), ValueError),
        ("placement_index", torch.tensor([0.0, 1.0]), TypeError),
        ("placement_index", torch.tensor([0, 3]), (ValueError, IndexError)),
        ("dense", torch.randn(2, 4), ValueError),
        ("dense", torch.zeros(2, 3, dtype=torch.int64), TypeError),
        ("utility_clip", (1.0, 0.0), ValueError),
        ("utility_clip", 1.0, ValueError),
        *ROWS,
        *MASKS,
        *KL,
    ],
}


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device.type}"
    return repr(value)[:20]


CASES = [
    pytest.param(op, *mistake, id=f"{op}-{mistake[0]}-{number}-{describe(mistake[1])}")
    for op, mistakes in MISTAKES.items()
    for number, mistake in enumerate(mistakes)
]


@pytest.mark.parametrize(("op", "argument", "value", "error"), CASES)
def test_mistake(
    backend: str, op: str, argument: str, value: object, error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    function, arguments = OPS[op]
    with pytest.raises(error, match=rf"\b{argument}\b") as caught:
        function(**{**arguments(), argument: value})
    assert len(str(caught.value)) > len(argument) + 12, (
        "the message must say what was given and what is wanted"
    )


NUMBERS: dict[str, Callable[[Callable[[float], Any]], Any]] = {
    "temperature": lambda n: lk.token_kl(**token_kl_arguments(), temperature=n(2)).kl,
    "clamps": lambda n: (
        lk.token_kl(**token_kl_arguments(), log_ratio_clamp=(n(-1), n(1)), kl_clamp=(n(0), None)).kl
    ),
    "beta": lambda n: lk.shaped_rewards(**{**shaped_rewards_arguments(), "beta": n(2)}).rewards,
    "operands": lambda n: lk.lsc_transform(torch.randn(3), n(1), scale=n(2), floor=n(0)),
    "exponent": lambda n: lk.aggregate_rewards(torch.randn(3, 1), 0.0, formula=lk.prop(0) ** n(2)),
    "margin": lambda n: lk.bradley_terry_loss(torch.randn(3), torch.randn(3), margin=n(1), center=n(2)),
    "gamma": lambda n: lk.gae(torch.randn(2, 3), torch.randn(2, 3), None, gamma=n(1), lam=n(0))[0],
    "eps": lambda n: lk.masked_whiten(torch.randn(2, 3), None, eps=n(1)),
}


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("number", [int, np.float32, np.float16, np.int64, np.int8, Fraction])
def test_a_number_of_another_library_is_a_number(
    backend: str, option: str, number: Callable[[float], Any]
) -> None:
    call = NUMBERS[option]
    torch.manual_seed(0)
    expected = call(float)
    torch.manual_seed(0)
    assert torch.equal(call(number), expected)


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("wrong", [np.bool_, np.array, str, complex, Decimal], ids=lambda kind: kind.__name__)
def test_what_is_no_real_number_is_none(backend: str, option: str, wrong: Callable[[float], Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        NUMBERS[option](wrong)


def test_message_holds_what_was_given_and_what_is_wanted(backend: str) -> None:
    arguments = token_kl_arguments()
    with pytest.raises(ValueError, match=r"ref_logits.*\[2, 3, 7\].*\[2, 3, 8\]"):
        lk.token_kl(**{**arguments, "ref_logits": torch.randn(2, 3, 8)})
    with pytest.raises(TypeError, match=r"actions.*int64.*int32.*float32"):
        lk.token_kl(**{**arguments, "actions": torch.zeros(2, 3)})
    with pytest.raises(IndexError, match=r"actions.*7.*\b12345\b"):
        lk.token_kl(**{**arguments, "actions": torch.full((2, 3), 12345)})
    with pytest.raises(ValueError, match=r"temperature.*> 0.*-2"):
        lk.token_kl(**arguments, temperature=-2.0)
    with pytest.raises(ValueError, match=r"kl must be one of k1, abs, k2, k3, full, full_reverse; got 'k9'"):
        lk.token_kl(**arguments, kl="k9")


def test_clamping_the_log_ratio_of_a_divergence_that_has_none(backend: str) -> None:
    for kl in ("full", "full_reverse"):
        with pytest.raises(ValueError, match="log_ratio_clamp"):
            lk.token_kl(**token_kl_arguments(), kl=kl, log_ratio_clamp=(-1.0, 1.0))


def test_options_are_keyword_only(backend: str) -> None:
    for op, (function, arguments) in OPS.items():
        with pytest.raises(TypeError, match="positional"):
            function(*arguments().values(), "k3", "autograd")
        with pytest.raises(TypeError, match="unexpected keyword"):
            function(**arguments(), nonsense=op)


def test_one_wrong_action_among_many(backend: str) -> None:
    """Wherever it stands, and whichever rows the mask counts, nothing is read outside the tensor."""
    policy, ref = torch.randn(50, 7), torch.randn(50, 7)
    for position in (0, 17, 49):
        actions = torch.randint(0, 7, (50,))
        actions[position] = 7
        with pytest.raises(IndexError, match="actions"):
            lk.token_kl(policy, ref, actions)
        with pytest.raises(IndexError, match="actions"):
            lk.token_logprobs(policy, actions, mask=torch.ones(50))
        mask = torch.ones(50)
        mask[position] = 0
        assert lk.token_kl(policy, ref, actions, mask=mask).kl[position] == 0
        assert lk.token_logprobs(policy, actions, mask=mask).logprobs[position] == 0


def test_wrong_temperature_under_the_mask_reaches_nothing(backend: str) -> None:
    arguments = token_kl_arguments()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    temperature = torch.where(mask == 1, 0.7, torch.nan)
    got = lk.token_kl(**arguments, temperature=temperature, mask=mask)
    expected = lk.token_kl(**arguments, temperature=0.7, mask=mask)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(got, expected, strict=True))
