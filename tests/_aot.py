"""Compile what the Triton wrappers launch, for a GPU that is not there. Run as a program, without the interpreter.

    python tests/_aot.py sm_90 bfloat16

prints a line of JSON for each kernel: its name, spilled bytes and registers where the target's tools tell them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _driver
import torch
import triton
from torch import Tensor

from lsc_kernels.eager.gae import GaeOptions
from lsc_kernels.eager.group_advantages import GroupOptions
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.masked_whiten import WhitenOptions
from lsc_kernels.eager.shaped_rewards import PolicySide, RewardSide
from lsc_kernels.eager.token_rewards import RewardOptions
from lsc_kernels.formula import compile_formula
from lsc_kernels.triton import ops


def compile_and_tell(source: Any, target: Any, options: dict[str, Any]) -> Any:
    """Stands in for ``triton.compile``, of which a launch asks what is not there yet."""
    compiled = triton.compile(source, target=target, options=options)
    kernel, constants = source.fn, source.constants
    values = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    facts: dict[str, Any] = {"kernel": f"{kernel.fn.__module__.rsplit('.')[-1]}.{kernel.fn.__name__}"}
    assert not options["enable_fp_fusion"], "products and sums are contracted"
    if target.backend == "cuda":
        facts |= resources(compiled.asm["cubin"])
        # what the kernel puts aside to fit in its registers counts where it is read all the time
        if options.get("maxnreg"):
            groups = group_loops(compiled.asm["cubin"])
            facts["spilled"] = max(sum("LDL" in line or "STL" in line for line in loop) for loop in groups)
            facts["group_instructions"] = sorted(len(loop) // values["GROUP"] for loop in groups)
            facts["models"] = "one" if "ref" in values else "two, reverse" if values["REVERSE"] else "two"
        facts["contracted"] = contracted(compiled.asm["ptx"])
    print(json.dumps(facts), flush=True)
    return compiled


def report_on(cubin: bytes, *command: str) -> str:
    tool, *options = command
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        report = subprocess.run([path, *options, file.name], capture_output=True, text=True)
    return report.stdout + report.stderr


def resources(cubin: bytes) -> dict[str, int]:
    report = report_on(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert found, report
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[4])}


def group_loops(cubin: bytes) -> list[list[str]]:
    """The instructions of each loop over groups of tiles: it has all their exponentials, and no loop."""
    lines = report_on(cubin, "nvdisasm", "-c").splitlines()
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    branches = (
        (labels[found[1]], number)
        for number, line in enumerate(lines)
        if (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))
    )
    loops = [(first, last) for first, last in branches if first < last]
    found = [
        [line for line in lines[first : last + 1] if line.endswith(";")]
        for first, last in loops
        if sum("MUFU.EX2" in line for line in lines[first:last]) >= 32
        and not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
    ]
    assert found, "no loop over groups"
    return found


def contracted(ptx: str) -> int:
    """Products and sums that may be fused: PTX without a rounding mode leaves that to the assembler."""
    return len(re.findall(r"^\s*(?:@\S+ )?(?:add|sub|mul)\.(?:ftz\.)?f(?:32|64)\s", ptx, re.MULTILINE))


def launch_everything(dtype: torch.dtype, kinds: tuple[str, ...]) -> None:
    """Call every wrapper, on tensors of a realistic vocabulary and a few rows; the values do not matter."""
    modules = ops()
    batch, length, vocabulary, width, properties = 2, 3, 151936, 4096, 3
    logits = torch.empty((1, vocabulary), dtype=dtype).expand(batch * length, vocabulary)
    actions, mask = (
        torch.zeros(batch * length, dtype=torch.int64),
        torch.ones(batch * length, dtype=torch.bool),
    )
    grad, rows = torch.ones(batch * length), torch.ones(batch, length)
    for kind in kinds:
        options = KLOptions(kind)
        kl = modules["token_kl"]
        kl.SPLIT_BELOW = 1  # type: ignore[attr-defined]
        state = kl.forward(logits, logits, actions, mask, None, 1.0, options)[4]
        kl.SPLIT_BELOW = 512  # type: ignore[attr-defined]
        kl.forward(logits, logits, actions, mask, None, 1.0, options)
        for wants in ((True, False), (True, True)):
            kl.backward(
                grad, grad, None, None, logits, logits, actions, mask, None, 1.0, options, state, *wants
            )
    own = modules["token_logprobs"]
    own.backward(grad, grad, logits, actions, mask, 1.0, own.forward(logits, actions, mask, 1.0)[2])

    scores, weights = torch.zeros(batch, properties, dtype=dtype), torch.ones(properties)
    hidden = torch.empty((1, 1, width), dtype=dtype).expand(batch, length, width)
    weight, bias = torch.empty(properties, width, dtype=dtype), torch.zeros(properties, dtype=dtype)
    mask = mask.view(batch, length)
    modules["lsc_transform"].forward(scores, weights, 1.0, 0.1)
    modules["lsc_transform"].backward(scores, scores, weights, weights, 0.1, True, True)
    everything = (scores, weights, weights, 0.0, weights, False, None)
    modules["aggregate_rewards"].forward(*everything)
    modules["aggregate_rewards"].backward(scores[:, 0].float(), *everything, True, True, True)
    formula = (*everything[:-1], compile_formula("at_least(2, 0, ~1, 2)", None).program)
    modules["aggregate_rewards"].forward(*formula)
    modules["aggregate_rewards"].backward(scores[:, 0].float(), *formula, True, True, True)
    for reduction in ("none", "mean"):
        pairs = (scores, scores, weights.expand(scores.shape), 0.1, reduction)
        modules["bradley_terry_loss"].forward(*pairs)
        modules["bradley_terry_loss"].backward(scores.float(), *pairs, True, True, True)
    head = (None, mask, None, None, False)
    modules["reward_head"].forward(hidden, weight, bias, *head[1:])
    modules["reward_head"].backward(scores.float(), hidden, weight, *head[1:], True, True, True)
    placing = RewardOptions(0.1, "last")
    modules["token_rewards"].forward(scores[:, 0], rows, mask, None, rows, placing)
    modules["token_rewards"].backward(rows, scores[:, 0], rows, mask, None, rows, placing, True, True, True)
    sampled = KLOptions("k3")
    modules["kl_from_logprobs"].forward(rows.to(dtype), rows, mask, None, sampled)
    for wants in ((True, False), (True, True)):
        modules["kl_from_logprobs"].backward(rows, rows.to(dtype), rows, mask, None, sampled, *wants)
    launch_advantages(modules, rows.to(dtype), rows, mask)

    reward = RewardSide(hidden, weight, bias, mask, None, None, None, weights, 1.0, 0.0, None, False, None)
    logical = reward._replace(weights=weights, program=formula[-1])
    three = logits.view(batch, length, vocabulary)
    # with and without a program, and a program for a row or for each chunk: all four over the dtypes
    policy = PolicySide(three, three, actions.view(batch, length), mask, None, 1.0, None, None)
    for side, whole in ((reward, dtype is torch.bfloat16), (logical, dtype is not torch.bfloat16)):
        modules["token_kl"].SPLIT_BELOW = 1 if whole else 512
        modules["shaped_rewards"].forward(side, policy, sampled, placing)
    policy = PolicySide(rows.to(dtype), rows, None, mask, None, 1.0, None, None)
    for side in (reward, logical):
        modules["shaped_rewards"].forward(side, policy, sampled, placing)


def launch_advantages(modules: dict[str, Any], values: Tensor, rows: Tensor, mask: Tensor) -> None:
    bounds = torch.tensor([0, rows.numel(), rows.numel()])
    for holes, shape, cu_seqlens in (
        ("skip", (2, -1), None),
        ("zero", (-1,), bounds),
        ("cut", (-1,), bounds),
    ):
        x, v, kept, options = (
            rows.view(shape),
            values.view(shape),
            mask.view(shape),
            GaeOptions(0.9, 0.9, holes),
        )
        modules["gae"].forward(v, x, kept, values[:, 0], cu_seqlens, options)
        modules["gae"].backward(x, x, kept, cu_seqlens, values[:, 0], options)
    discounted = GaeOptions(0.9, 1.0, "skip")
    modules["discounted_returns"].forward(values, mask, None, discounted)
    modules["discounted_returns"].backward(rows, mask, None, discounted)
    ids, weights = torch.zeros(len(values), dtype=torch.int64), rows[0].double()
    grouped = (values, ids, weights, GroupOptions(True, True, True, 1e-4))
    modules["group_advantages"].forward(*grouped)
    modules["group_advantages"].backward(rows[:, 0], *grouped)
    whiten, whitening = modules["masked_whiten"], WhitenOptions(False, 1e-8, 1)
    moments, sums = whiten.moments(values, mask), whiten.sums(rows, values, mask, weights)
    whiten.forward(values, mask, moments, whitening)
    whiten.backward(rows, values, mask, moments, sums, whitening)


def main(target: str, dtype: str, *kinds: str) -> None:
    _driver.use(target)
    triton.compiler.compile = compile_and_tell
    launch_everything(getattr(torch, dtype), kinds)


if __name__ == "__main__":
    main(*sys.argv[1:])
