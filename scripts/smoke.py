"""Does an installed wheel work? Run by check_wheel.sh in a clean environment, outside the source tree."""

from pathlib import Path

import torch

import lsc_kernels as lk

package = Path(lk.__file__).resolve().parent
assert "site-packages" in package.parts, f"imported {package}, not the installed wheel"
assert (package / "py.typed").is_file()
assert lk.backends()["cpu"]["native"] == "available", lk.backends()

torch.manual_seed(0)
policy = torch.randn(5, 1000, requires_grad=True)
ref = policy.detach() + 0.1 * torch.randn(5, 1000)
actions = torch.randint(1000, (5,))
results = {}
for backend in ("native", "eager"):
    lk.set_backend(backend)
    out = lk.token_kl(policy, ref, actions, kl="full")
    (gradient,) = torch.autograd.grad(out.kl.sum() + out.logprobs.sum(), policy)
    results[backend] = (*out, gradient)
for native, eager in zip(results["native"], results["eager"], strict=True):
    torch.testing.assert_close(native, eager)
print(f"lsc_kernels {lk.__version__} in {package} works on torch {torch.__version__}")
