"""What Triton compiles for batches of fifty lengths. Run as a program, without the interpreter; nothing is compiled.

Prints the kernels, in JSON: those of the first batch, and those of the others that are asked for anew.
"""

from __future__ import annotations

import json
from typing import Any

import _driver
import torch
import triton
from _cases import normal
from _driver import Compiled
from test_triton import chain

import lsc_kernels as lk


def launch_everything(generator: torch.Generator, batch: int, length: int) -> None:
    arguments = chain(generator, batch, length, 33, dense=torch.zeros(batch, length))
    lk.shaped_rewards(**{**arguments, "policy": arguments["policy"].requires_grad_()})
    policy, ref, actions = (arguments[name].detach() for name in ("policy", "ref", "actions"))
    lk.token_kl(policy.requires_grad_(), ref, actions).kl.sum().backward()
    lk.token_logprobs(policy.requires_grad_(), actions).entropy.sum().backward()
    scores, utility = normal(generator, batch, length, 3), normal(generator, batch)
    lk.aggregate_rewards(scores, 0.0)
    lk.lsc_transform(scores, 0.0)
    lk.reward_head(arguments["hidden"], arguments["weight"], attention_mask=arguments["mask"])
    logprobs = normal(generator, batch, length)
    lk.token_rewards(utility, logprobs, arguments["mask"], beta=0.1)
    lk.kl_from_logprobs(logprobs, logprobs)
    values = logprobs.clone().requires_grad_()
    lk.gae(logprobs, values, arguments["mask"])[0].sum().backward()
    lk.masked_whiten(logprobs, arguments["mask"])
    lk.group_advantages(utility, batch)


def main() -> None:
    compiled: list[str] = []

    def compile_nothing(source: Any, **_: Any) -> Compiled:
        compiled.append(f"{source.fn.__module__.rsplit('.')[-1]}.{source.fn.__name__}: {source.signature}")
        return Compiled()

    _driver.use("sm_90")
    triton.compiler.compile = compile_nothing
    lk.triton.unavailable = lambda device: None  # which refuses CPU tensors
    lk.set_backend("triton")
    generator = torch.Generator().manual_seed(0)
    launch_everything(generator, 2, 1)
    first = len(compiled)
    for length in range(1, 51):
        launch_everything(generator, 1 + length % 4, length)
    print(json.dumps([compiled[:first], compiled[first:]]))


if __name__ == "__main__":
    main()
