"""shaped_rewards: the whole chain, against its parts in fp64 and the fp64 truth of the token op."""

from __future__ import annotations

from typing import Any

import _tolerances as tolerances
import _truth as truth
import pytest
import torch
from _cases import DTYPES, KINDS, SAMPLED_KINDS, few, logit_pair, sampled_actions
from _check import _kl_bound, check_values
from _modes import compile_once, needs_native, peak_memory
from torch import Generator, Tensor

import lsc_kernels as lk

BETA = 0.07
Arguments = dict[str, Any]


def inputs(
    generator: Generator,
    *,
    batch: int = 5,
    length: int = 9,
    vocabulary: int = 301,
    properties: int = 3,
    dtype: torch.dtype = torch.float32,
    regime: str = "near_1e-1",
) -> Arguments:
    """Every tensor of the chain. Masks have holes, and the last sequence counts nothing."""
    policy, ref = logit_pair(generator, regime, (batch, length, vocabulary), dtype)
    mask = torch.rand(batch, length, generator=generator) < 0.7
    if batch > 1:
        mask[0] = True
        mask[-1] = False
    attention = torch.arange(12) < torch.randint(1, 13, (batch, 1), generator=generator)
    return {
        "hidden": torch.randn(batch, 12, 16, generator=generator).to(dtype),
        "weight": torch.randn(properties, 16, generator=generator).to(dtype),
        "reference_reward": torch.randn(properties, generator=generator),
        "policy": policy,
        "ref": ref,
        "actions": sampled_actions(generator, policy)
        if policy.numel()
        else torch.zeros(batch, length).long(),
        "mask": mask,
        "beta": BETA,
        "bias": torch.randn(properties, generator=generator),
        "attention_mask": attention,
    }


HEAD = ("bias", "attention_mask", "index", "cu_seqlens")
AGGREGATION = ("formula", "names", "weights", "scale", "floor", "missing")
TOKEN = ("kl", "grad", "temperature", "log_ratio_clamp", "kl_clamp", "old_logprobs")
PLACEMENT = ("placement", "dense", "utility_clip")


def taken(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    return {name: arguments[name] for name in names if name in arguments}


def in_fp64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return [in_fp64(each) for each in value] if isinstance(value, list) else value


def chain(arguments: Arguments) -> tuple[lk.ShapedRewards, truth.TokenKL]:
    """The parts one after another, on fp64 arguments; the token op is the tests' own."""
    scores = arguments.get("scores")
    if scores is None:
        scores = lk.reward_head(arguments["hidden"], arguments["weight"], **taken(arguments, HEAD))
    utility = lk.aggregate_rewards(scores, arguments["reference_reward"], **taken(arguments, AGGREGATION))
    actions, mask = arguments["actions"], arguments["mask"]
    tokens = truth.token_kl(
        arguments["policy"], arguments["ref"], actions, mask=mask, **taken(arguments, TOKEN)
    )
    place = {"index": arguments["placement_index"]} if "placement_index" in arguments else {}
    rewards = lk.token_rewards(
        utility, tokens.kl, tokens.kept, beta=arguments["beta"], **taken(arguments, PLACEMENT), **place
    )
    return lk.ShapedRewards(rewards, utility, scores, *tokens[:4]), tokens


def score_bound(arguments: Arguments, scores: Tensor) -> Tensor:
    """A dot product in fp32: relative to the sum of its terms' sizes."""
    if arguments.get("scores") is not None:
        return torch.zeros_like(scores)
    sizes = {name: value.abs() for name, value in arguments.items() if name in ("hidden", "weight", "bias")}
    return 1e-6 * lk.reward_head(
        sizes["hidden"], sizes["weight"], **{**taken(arguments, HEAD), **taken(sizes, ("bias",))}
    ).nan_to_num(nan=0.0)


def check(arguments: Arguments) -> lk.ShapedRewards:
    """Every output within what its part promises."""
    with torch.no_grad():
        got = lk.shaped_rewards(**arguments)
    exact = {name: in_fp64(value) for name, value in arguments.items()}
    true, tokens = chain(exact)
    dtype = torch.float64 if arguments["policy"].dtype is torch.float64 else torch.float32
    assert all(output is not None and output.dtype is dtype for output in (got.rewards, got.kl, got.entropy))

    options = taken(exact, TOKEN)
    check_values(
        "shaped_rewards", lk.TokenKL(got.kl, got.logprobs, got.ref_logprobs, got.entropy), tokens, options
    )  # type: ignore[arg-type]
    of_scores = score_bound(exact, true.scores)
    tolerances.check("scores", got.scores, true.scores, of_scores + tolerances.rounding(true.scores, dtype))
    # the utility's slope in a score is at most weight / scale; beside a complement also 1 / scale
    slope = exact.get("weights", torch.ones(())).abs()
    slope = slope.clamp_min(float("formula" in arguments)) / torch.as_tensor(exact.get("scale", 1.0))
    of_utility = 1e-5 * true.utility.abs() + (slope * of_scores).sum(-1)
    tolerances.check("utility", got.utility, true.utility, of_utility.nan_to_num(nan=0.0))
    of_kl = torch.where(tokens.kept, _kl_bound(tokens, options), 0.0)
    bound = (
        BETA * of_kl + of_utility.nan_to_num(nan=0.0).unsqueeze(-1) + tolerances.rounding(true.rewards, dtype)
    )
    somewhere = tokens.kept.any(-1, keepdim=True)
    tolerances.check("rewards", got.rewards, true.rewards, torch.where(somewhere, bound, 0.0))
    return got


LEAVES = (
    "hidden",
    "weight",
    "bias",
    "reference_reward",
    "scale",
    "weights",
    "scores",
    "policy",
    "ref",
    "dense",
)


def check_gradients(arguments: Arguments, generator: Generator) -> None:
    """From all outputs together to everything that has a gradient."""
    names = [name for name in LEAVES if isinstance(arguments.get(name), Tensor)]
    ours = {**arguments, **{name: arguments[name].detach().requires_grad_() for name in names}}
    exact = {name: in_fp64(value) for name, value in arguments.items()}
    exact |= {name: exact[name].requires_grad_() for name in names}
    got, (true, tokens) = lk.shaped_rewards(**ours), chain(exact)
    upstream = {name: torch.randn(getattr(got, name).shape, generator=generator) for name in got._fields}
    if arguments.get("scores") is not None:
        del upstream["scores"]  # given, and given back

    def gradients(outputs: lk.ShapedRewards, leaves: Arguments) -> tuple[Tensor | None, ...]:
        values = [getattr(outputs, name) for name in upstream]
        grads = [upstream[name].to(value.dtype) for name, value in zip(upstream, values, strict=True)]
        return torch.autograd.grad(values, [leaves[name] for name in names], grads, allow_unused=True)

    for name, found, wanted in zip(names, gradients(got, ours), gradients(true, exact), strict=True):
        assert found is not None and wanted is not None, name
        assert found.dtype is arguments[name].dtype and found.shape == arguments[name].shape, name
        if name in ("policy", "ref"):
            total = sum(upstream[output].abs() for output in ("kl", "logprobs", "ref_logprobs", "entropy"))
            total = total + BETA * upstream["rewards"].abs()
            bound = tolerances.gradient(
                wanted, total, tokens.d, arguments.get("temperature", 1.0), found.dtype
            )
            bound = torch.where(tokens.kept.unsqueeze(-1), bound, 0.0)
        else:
            bound = 1e-5 * wanted.abs().amax() + tolerances.rounding(wanted, found.dtype)
        tolerances.check(f"d {name}", found, wanted, bound.expand_as(wanted))


def add(arguments: Arguments, generator: Generator, *names: str) -> Arguments:
    """More options, as tensors where they may be."""
    batch, length = arguments["mask"].shape
    properties = arguments["reference_reward"].shape[-1]
    options = {
        "scale": torch.rand(properties, generator=generator) + 0.5,
        "weights": torch.rand(properties, generator=generator) + 0.5,
        "floor": 0.05,
        "dense": torch.randn(batch, length, generator=generator),
        "temperature": torch.rand(batch, length, generator=generator) + 0.5,
        "old_logprobs": torch.randn(batch, length, generator=generator) * 0.1 - 3,
    }
    return {**arguments, **{name: options[name] for name in names}}


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chain(backend: str, generator: Generator, dtype: torch.dtype, kl: str) -> None:
    for vocabulary in (1, 7, 2500):
        arguments = inputs(generator, length=few(9), vocabulary=vocabulary, dtype=dtype) | {"kl": kl}
        check(arguments)
        check_gradients(arguments, generator)


@pytest.mark.parametrize("regime", ["independent", "near_1e-4", "confident", "shift_777", "masked_in_both"])
def test_regimes(backend: str, generator: Generator, regime: str) -> None:
    for dtype in DTYPES[:2]:
        for kl in ("k3", "full"):
            arguments = inputs(generator, length=few(9), regime=regime, vocabulary=2500, dtype=dtype)
            check(arguments | {"kl": kl})


@pytest.mark.parametrize("placement", ["last", "eos_plus_one", "before_last", "index"])
def test_placement(backend: str, generator: Generator, placement: str) -> None:
    arguments = inputs(generator) | {"placement": placement}
    if placement == "index":
        arguments["placement_index"] = torch.tensor([0, 8, 3, 4, 2])
    check(arguments)
    check_gradients(arguments, generator)


@pytest.mark.parametrize(
    "names",
    [
        ("scale",),
        ("weights",),
        ("floor", "scale", "weights"),
        ("dense",),
        ("temperature",),
        ("old_logprobs",),
    ],
)
def test_options(backend: str, generator: Generator, names: tuple[str, ...]) -> None:
    arguments = add(inputs(generator, length=few(9)), generator, *names)
    check(arguments)
    if "old_logprobs" not in names:
        check_gradients(arguments, generator)


def test_clamps_and_straight_through(backend: str, generator: Generator) -> None:
    options: list[Arguments] = [
        {"log_ratio_clamp": (-0.05, 0.1)},
        {"kl": "full", "kl_clamp": (0.001, 0.01)},
        {"grad": "straight_through", "kl": "k1"},
        {"utility_clip": (-1.0, -0.1)},
    ]
    for extra in options:
        check(inputs(generator, length=few(9)) | extra)


def test_formulas(backend: str, generator: Generator) -> None:
    names = ["helpful", "harmless", "verbose"]
    for formula in ("helpful & ~verbose", "at_least(2, helpful, harmless ** 0.5, ~verbose)"):
        arguments = add(inputs(generator, length=few(9)), generator, "weights", "scale", "floor")
        arguments |= {"formula": formula, "names": names}
        check(arguments)
        check_gradients(arguments, generator)
    arguments = inputs(generator)
    plain = lk.shaped_rewards(**arguments)
    conjunction = lk.shaped_rewards(**arguments, formula=lk.prop(0) & lk.prop(1) & lk.prop(2))
    assert torch.equal(plain.rewards, conjunction.rewards)
    with pytest.raises(ValueError, match="formula reads column 3, but scores has K = 3"):
        lk.shaped_rewards(**inputs(generator), formula="3")


def test_a_formula_of_as_many_properties_as_there_may_be(backend: str, generator: Generator) -> None:
    some, more = ", ".join(map(str, range(12))), " | ".join(f"~{k}" for k in range(12, 22))
    rest = "~(22 & 23 & 24) | weakest(25, 26, 27 ** 0.5, ~28) & 29 & 30 & 31"
    arguments = inputs(generator, length=few(9), properties=32)
    arguments |= {"formula": f"at_least(7, {some}) & ({more}) & {rest}"}
    check(arguments)
    check_gradients(arguments, generator)


def test_missing_scores(backend: str, generator: Generator) -> None:
    arguments = inputs(generator) | {"hidden": None, "weight": None}
    scores = torch.randn(5, 3, generator=generator)
    scores[1, 2] = torch.nan
    arguments = {name: value for name, value in arguments.items() if name not in ("bias", "attention_mask")}
    arguments["scores"] = scores
    assert check(arguments).utility.isnan().tolist() == [False, True, False, False, False]
    assert not check(arguments | {"missing": "ignore"}).utility.isnan().any()
    with pytest.raises(ValueError, match="scores"):
        lk.shaped_rewards(**arguments, missing="raise")


def test_from_scores(backend: str, generator: Generator) -> None:
    arguments = inputs(generator) | {
        "hidden": None,
        "weight": None,
        "scores": torch.randn(5, 3, generator=generator),
    }
    del arguments["bias"], arguments["attention_mask"]
    got = check(arguments)
    assert torch.equal(got.scores, arguments["scores"])
    check_gradients(add(arguments, generator, "scale", "dense"), generator)


def test_separate_models_and_packed_hidden_states(backend: str, generator: Generator) -> None:
    arguments = inputs(generator)
    lists = arguments | {
        "hidden": [torch.randn(5, 4 + k, 8 + k, generator=generator) for k in range(3)],
        "weight": [torch.randn(8 + k, generator=generator) for k in range(3)],
    }
    del lists["attention_mask"]
    got = lk.shaped_rewards(**lists)
    scores = lk.reward_head(lists["hidden"], lists["weight"], lists["bias"])
    assert torch.allclose(got.scores, scores, rtol=1e-5, atol=1e-5)
    packed = arguments | {
        "hidden": torch.randn(20, 16, generator=generator),
        "cu_seqlens": torch.tensor([0, 3, 4, 9, 15, 20]),
    }
    del packed["attention_mask"]
    check(packed)
    check_gradients(packed, generator)


@pytest.mark.parametrize("kl", SAMPLED_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_logprobs(backend: str, generator: Generator, dtype: torch.dtype, kl: str) -> None:
    logprobs = (-5 * torch.rand(5, 9, generator=generator)).to(dtype)
    ref_logprobs = (logprobs + 0.1 * torch.randn(5, 9, generator=generator)).to(dtype)
    whole = inputs(generator, dtype=dtype) | {"policy": None, "ref": None, "actions": None, "kl": kl}
    logprobs[~whole["mask"]] = torch.nan
    upstream = torch.randn(2, 5, 9, generator=generator).double()
    found, wanted = [], []
    for results, cast in ((found, dtype), (wanted, torch.float64)):
        leaves = [tensor.detach().to(cast).requires_grad_() for tensor in (logprobs, ref_logprobs)]
        arguments = {name: value if cast is dtype else in_fp64(value) for name, value in whole.items()}
        if results is found:
            out = lk.shaped_rewards(**arguments, policy_logprobs=leaves[0], ref_logprobs=leaves[1])
            assert out.entropy is None
            values = (out.rewards, out.kl, out.utility, out.logprobs, out.ref_logprobs)
        else:
            kl_value = truth.kl_from_logprobs(*leaves, kl=kl, mask=whole["mask"]).kl
            scores = lk.reward_head(arguments["hidden"], arguments["weight"], **taken(arguments, HEAD))
            utility = lk.aggregate_rewards(scores, arguments["reference_reward"])
            rewards = lk.token_rewards(utility, kl_value, whole["mask"], beta=BETA)
            given = (torch.where(whole["mask"], leaf, 0) for leaf in leaves)
            values = (rewards, kl_value, utility, *given)
        results.extend(value.detach() for value in values)
        total = values[0].sum() + sum(
            (weight * value).sum() for weight, value in zip(upstream, values[3:], strict=True)
        )
        results.extend(torch.autograd.grad(total, leaves))
    names = ("rewards", "kl", "utility", "logprobs", "ref_logprobs", "d policy", "d ref")
    for name, a, b in zip(names, found, wanted, strict=True):
        assert name.startswith("d ") or a.dtype is (dtype if dtype is torch.float64 else torch.float32)
        scale = 1e-5 * (1 + b.abs()) if name in ("rewards", "utility") else 1e-6 * b.abs() + 1e-6
        tolerances.check(name, a, b, scale + tolerances.rounding(b, a.dtype))


def test_ignored_actions_beside_logprobs(backend: str, generator: Generator) -> None:
    logprobs, ref_logprobs = -torch.rand(2, 2, 3, generator=generator)
    actions, mask = torch.tensor([[1, -100, 2], [0, -100, -100]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    arguments: dict[str, Any] = {
        "scores": torch.randn(2, 2, generator=generator), "beta": BETA, "policy_logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
    }  # fmt: skip
    for given, counted in ((None, actions != -100), (mask, (actions != -100) & (mask != 0))):
        found = lk.shaped_rewards(None, None, 0.0, None, None, actions, given, **arguments)
        wanted = lk.shaped_rewards(None, None, 0.0, None, None, None, counted, **arguments)
        assert torch.equal(found.rewards, wanted.rewards) and torch.equal(found.kl, wanted.kl)
    with pytest.raises(TypeError, match="actions must be"):
        lk.shaped_rewards(None, None, 0.0, None, None, "none", None, **arguments)
    with pytest.raises(ValueError, match="placement_index must be given with placement='index'"):
        lk.shaped_rewards(None, None, 0.0, None, None, None, None, **arguments, placement="index")


def test_what_the_mask_leaves_out_reaches_nothing(backend: str, generator: Generator) -> None:
    arguments = add(inputs(generator), generator, "dense", "old_logprobs")
    clean = lk.shaped_rewards(**arguments)
    out = ~arguments["mask"]
    for under in (torch.nan, torch.inf, -torch.inf):
        spoilt = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        for name in ("policy", "ref", "dense", "old_logprobs"):
            spoilt[name][out] = under
        spoilt["actions"][out] = 10**9
        spoilt["policy"].requires_grad_()
        got = lk.shaped_rewards(**spoilt)
        for a, b in zip(got, clean, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
        got.rewards.sum().backward()
        gradient = spoilt["policy"].grad
        assert bool(gradient.isfinite().all()) and bool((gradient[out] == 0).all())


@pytest.mark.usefixtures("unchecked_actions")
def test_a_row_whose_action_is_outside_is_nan(backend: str, generator: Generator) -> None:
    """Nobody waits for a GPU, so nobody raises."""
    given = inputs(generator, batch=3, length=4) | {"mask": None, "kl": "full"}
    wrong = given["actions"].clone()
    wrong[1, 2] = given["policy"].shape[-1]
    policy = given["policy"].requires_grad_()
    expected, got = lk.shaped_rewards(**given), lk.shaped_rewards(**(given | {"actions": wrong}))
    others = torch.ones_like(wrong, dtype=torch.bool)
    others[1, 2] = False
    gradients = [torch.autograd.grad(out.rewards.sum(), policy)[0] for out in (got, expected)]
    for name in ("rewards", "kl", "logprobs", "ref_logprobs", "entropy"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a[1, 2].isnan() and torch.equal(a[others], b[others]), name
    assert gradients[0][1, 2].isnan().all() and torch.equal(gradients[0][others], gradients[1][others])
    assert torch.equal(got.utility, expected.utility)


def test_ignore_index_and_no_mask(backend: str, generator: Generator) -> None:
    arguments = inputs(generator)
    mask = arguments["mask"]
    ignored = arguments | {"actions": torch.where(mask, arguments["actions"], -100), "mask": None}
    for a, b in zip(lk.shaped_rewards(**ignored), lk.shaped_rewards(**arguments), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_layouts_and_empty_batches(backend: str, generator: Generator) -> None:
    arguments = inputs(generator)
    clean = lk.shaped_rewards(**arguments)
    other = arguments | {
        "policy": arguments["policy"].transpose(0, 1).contiguous().transpose(0, 1),
        "ref": arguments["ref"].movedim(-1, 0).contiguous().movedim(0, -1),
        "actions": arguments["actions"].T.contiguous().T.int(),
        "mask": arguments["mask"].T.contiguous().T.float(),
        "hidden": arguments["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": arguments["weight"].T.contiguous().T,
    }
    for a, b in zip(lk.shaped_rewards(**other), clean, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    for batch, length in ((0, 4), (3, 0), (0, 0)):
        got = lk.shaped_rewards(**inputs(generator, batch=batch, length=length))
        assert got.rewards.shape == (batch, length) and got.utility.shape == (batch,)


def test_bitwise_the_same_alone_and_in_a_batch(backend: str, generator: Generator) -> None:
    arguments = inputs(generator, vocabulary=5003)
    per_sequence = ("hidden", "policy", "ref", "actions", "mask", "attention_mask")
    whole = lk.shaped_rewards(**arguments)
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            for rows in (torch.arange(5), torch.tensor([2]), torch.tensor([4, 0])):
                some = arguments | {name: arguments[name][rows] for name in per_sequence}
                for name, a, b in zip(whole._fields, whole, lk.shaped_rewards(**some), strict=True):
                    assert a is not None and b is not None and torch.equal(a[rows], b), name
    finally:
        torch.set_num_threads(2)


def test_inputs_are_left_as_they_were(backend: str, generator: Generator) -> None:
    arguments = add(inputs(generator), generator, "dense", "scale", "weights")
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    leaf = arguments["policy"].requires_grad_()
    lk.shaped_rewards(**arguments).rewards.sum().backward()
    assert leaf.grad is not None
    assert all(torch.equal(value, arguments[name]) for name, value in before.items())


@pytest.mark.parametrize("kl", KINDS)
def test_a_reference_that_backward_does_not_read_is_not_kept(
    backend: str, generator: Generator, kl: str
) -> None:
    arguments = inputs(generator) | {"kl": kl}

    def gradient(ref: Tensor) -> tuple[Tensor, int]:
        kept: list[Tensor] = []
        leaf = arguments["policy"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: kept.append(saved) or saved, lambda saved: saved
        ):
            out = lk.shaped_rewards(**arguments | {"policy": leaf, "ref": ref})
        wide = sum(saved.shape == leaf.shape for saved in kept)
        if wide == 1:
            ref.detach().fill_(torch.nan)
        (out.rewards.sum() + out.entropy.sum()).backward()
        return leaf.grad, wide

    expected, all_kept = gradient(arguments["ref"].clone().requires_grad_())
    got, kept = gradient(arguments["ref"].clone())
    assert (all_kept, kept) == (2, 2 if kl.startswith("full") else 1)
    assert torch.equal(got, expected)


def test_modes(backend: str, generator: Generator) -> None:
    arguments = inputs(generator)
    arguments["policy"].requires_grad_()
    expected = lk.shaped_rewards(**arguments)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            for a, b in zip(lk.shaped_rewards(**arguments), expected, strict=True):
                assert a is not None and b is not None and torch.equal(a, b)


def test_second_derivative_raises(backend: str, generator: Generator) -> None:
    arguments = inputs(generator)
    policy = arguments["policy"].requires_grad_()
    rewards = lk.shaped_rewards(**arguments).rewards
    (gradient,) = torch.autograd.grad(rewards.sum(), policy, create_graph=True)
    with pytest.raises(RuntimeError, match="shaped_rewards.*(first derivative|twice)"):
        gradient.sum().backward()


def test_gradcheck(generator: Generator) -> None:
    arguments = inputs(generator, batch=2, length=3, vocabulary=4, dtype=torch.float64)
    arguments |= {
        "bias": arguments["bias"].double(),
        "reference_reward": arguments["reference_reward"].double(),
    }
    names = ("hidden", "weight", "bias", "reference_reward", "policy", "ref")

    def rewards(*leaves: Tensor) -> tuple[Tensor, ...]:
        out = lk.shaped_rewards(**{**arguments, **dict(zip(names, leaves, strict=True))})
        return out.rewards, out.utility, out.scores, out.kl, out.logprobs

    assert torch.autograd.gradcheck(
        rewards, [arguments[name].requires_grad_() for name in names], fast_mode=True
    )


def test_compile(backend: str, generator: Generator) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        arguments = inputs(generator, batch=batch, length=length, vocabulary=40)
        names = ("hidden", "weight", "reference_reward", "policy", "ref", "actions", "mask", "attention_mask")
        for name in ("hidden", "weight", "policy"):
            arguments[name].requires_grad_()
        return tuple(arguments[name] for name in names)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = lk.shaped_rewards(*tensors[:7], beta=BETA, attention_mask=tensors[7])
        return out.rewards, out.kl, out.logprobs

    compile_once(run, [call(4, 5), call(4, 8), call(6, 13)])  # torch.compile takes equal sizes for one

    def from_logprobs(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"policy_logprobs": logprobs, "ref_logprobs": ref_logprobs, "beta": BETA}
        return lk.shaped_rewards(None, None, 0.0, None, None, None, None, scores=scores, **given)[:2]

    calls = []
    for length in (5, 8, 13):
        rows = -torch.rand(2, 4, length, generator=generator)
        calls.append(
            (torch.randn(4, 2, generator=generator).requires_grad_(), rows[0].requires_grad_(), rows[1])
        )
    compile_once(from_logprobs, calls)


@needs_native
def test_forward_makes_nothing_as_wide_as_the_vocabulary() -> None:
    setup = """
        lk.set_backend("native")
        def inputs(batch, length, vocabulary):
            x, actions = torch.randn(batch, length, vocabulary), torch.zeros(batch, length, dtype=torch.int64)
            hidden, weight = torch.randn(batch, 64, 128), torch.randn(3, 128)
            return hidden, weight, torch.zeros(3), x, x + 0.1, actions, torch.ones(batch, length)
        lk.shaped_rewards(*inputs(2, 3, 3000), beta=0.1)
        arguments = inputs(8, 8, 128256)
    """
    assert peak_memory(setup, "out = lk.shaped_rewards(*arguments, beta=0.1)") < 3 * 2**20
