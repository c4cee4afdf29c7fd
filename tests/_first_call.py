"""A process whose first call of the library is compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lsc_kernels as lk


def check(device: str, backend: str) -> None:
    """What is asked and imported at a first call is no part of the graph, nor of what torch.compile warns about."""
    done = subprocess.run(
        [sys.executable, __file__, device],
        capture_output=True,
        text=True,
        env={**os.environ, "LSC_KERNELS_BACKEND": backend},
    )
    assert done.returncode == 0 and "Dynamo detected" not in done.stderr, done.stderr


def main(device: str) -> None:
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(lambda *x: lk.token_logprobs(*x).logprobs, fullgraph=True, backend=counter)
    x = torch.randn(2, 5, device=device), torch.tensor([1, 2], device=device)
    call(*x)
    assert torch.equal(call(*x), lk.token_logprobs(*x).logprobs)
    assert counter.frame_count == 1, "compiled twice"
    lk.set_backend("eager" if lk.get_backend() != "eager" else "auto")
    call(*x)
    assert counter.frame_count == 2, "a choice of another backend was not followed"


if __name__ == "__main__":
    main(*sys.argv[1:])
