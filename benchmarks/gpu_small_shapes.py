"""Every kernel once, forward and backward, on small and awkward shapes: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_small_shapes [--seconds 50]

begins no call after so many seconds of the process, and says how many it has left out. Each call is named before it
begins, so that an end by force leaves what was done until then.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

STARTED = time.monotonic()  # importing torch takes long where compute-sanitizer watches

import torch  # noqa: E402
from torch import Generator, Tensor  # noqa: E402

import lsc_kernels as lk  # noqa: E402


def calls(
    generator: Generator, dtype: torch.dtype, vocabulary: int
) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """Calls of each op on two sequences of three tokens, one token left out and one misaligned row start."""
    device = generator.device

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape[:-1] + (shape[-1] + 1,), generator=generator, device=device)
        return values.to(dtype)[..., 1:].requires_grad_()

    policy, ref = normal(2, 3, vocabulary, dtype=dtype), normal(2, 3, vocabulary, dtype=dtype)
    actions = torch.randint(vocabulary, (2, 3), generator=generator, device=device)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
    hidden, weight, reference = normal(2, 5, 37, dtype=dtype), normal(3, 37, dtype=dtype), normal(3)
    logprobs, ref_logprobs, utility = normal(2, 3), normal(2, 3), normal(2)

    yield lambda: lk.token_logprobs(policy, actions, mask=mask)
    for kl in ("k3", "full", "full_reverse"):
        yield lambda kl=kl: lk.token_kl(policy, ref, actions, kl=kl, mask=mask)
    # rows that begin on 16 bytes, of models near one another, apart by a shift, and far apart
    even = actions % (vocabulary // 8 * 8)
    aligned = 3 * torch.randn(2, 3, vocabulary // 8 * 8, generator=generator, device=device)
    noise = torch.randn(aligned.shape, generator=generator, device=device)
    yield lambda: lk.token_logprobs(aligned.to(dtype).requires_grad_(), even, mask=mask)
    for distance, shift in ((0.1, 0), (0.1, 300), (3, 0)):
        pair = [logits.to(dtype).requires_grad_() for logits in (aligned, aligned + distance * noise + shift)]
        for kl in ("k3", "full", "full_reverse"):
            yield lambda pair=pair, kl=kl: lk.token_kl(*pair, even, kl=kl, mask=mask)
    yield lambda: (lk.kl_from_logprobs(logprobs, ref_logprobs, mask=mask),)
    yield lambda: (lk.lsc_transform(normal(2, 3), reference),)
    yield lambda: (lk.aggregate_rewards(normal(2, 3), reference, formula="0 & (1 | ~2)"),)
    yield lambda: (lk.reward_head(hidden, weight),)
    yield lambda: (lk.token_rewards(utility, logprobs, mask, beta=0.1),)
    yield lambda: lk.gae(logprobs, ref_logprobs, mask, bootstrap=utility, holes="zero")
    longer, bounds = normal(9001), torch.tensor([0, 5, 5, 9001], device=device)
    yield lambda: lk.gae(longer, longer, None, cu_seqlens=bounds)  # several blocks a sequence
    yield lambda: (lk.discounted_returns(logprobs, mask, gamma=0.9),)
    yield lambda: (lk.group_advantages(longer, torch.arange(9001, device=device) % 1000),)
    yield lambda: (lk.group_advantages(normal(6, 3), 3, method="gdpo"),)
    yield lambda: (lk.masked_whiten(logprobs, mask),)
    for formula in (None, "0 & (1 | ~2)"):
        yield lambda formula=formula: lk.shaped_rewards(
            hidden, weight, reference, policy, ref, actions, mask, beta=0.1, formula=formula
        )
    yield lambda: lk.shaped_rewards(
        *(hidden, weight, reference, None, None, None, mask),
        **{"beta": 0.1, "policy_logprobs": logprobs, "ref_logprobs": ref_logprobs},
    )[:4]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_small_shapes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no call begins after them")
    deadline = STARTED + parser.parse_args(arguments).seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    served = lk.backends()[device.type]
    names = [name for name in ("native", "triton") if served[name] == "available"]
    count = left_out = failed = 0
    # the longer vocabulary is split over several blocks
    for vocabulary, dtype, name in itertools.product((1003, 70001), (torch.bfloat16, torch.float32), names):
        lk.set_backend(name)
        for call in calls(Generator(device).manual_seed(1), dtype, vocabulary):
            if time.monotonic() > deadline:
                left_out += 1
                continue
            count += 1
            print(f"call {count}: {name}, {dtype}, V = {vocabulary}; {failed} failed before", flush=True)
            try:
                outputs = call()
                sum(output.sum() for output in outputs if output.requires_grad).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()  # so that an illegal access is this call's
            except Exception:
                print(traceback.format_exc(), flush=True)
                failed += 1
    print(
        f"{count} calls on {device.type} through {', '.join(names) or 'nothing'}; {failed} failed, {left_out} left out"
    )
    return 0 if count and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
