"""What Triton's compiler makes of the launches of the tests, of which the interpreter takes more than it does.

    PYTHONPATH=tests python -m pytest -p _front_end -q --tb=no -r N -k "triton and not emulat" [--seconds 60] FILES

runs tests with a driver that starts nothing, so most of them fail: they only say what is launched. Each kernel goes
through the compiler's front end once for all that it is specialised on. The exit status is 0 where it took them all.
"""

from __future__ import annotations

import os
from typing import Any

import _driver
import pytest
import triton
from _driver import Compiled
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

refused: list[str] = []
taken = 0


def front_end(source: Any, target: Any, options: dict[str, Any]) -> Compiled:
    """Stands in for ``triton.compile``."""
    global taken
    backend, context = make_backend(target), ir.context()
    parsed = backend.parse_options(dict(options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(parsed)
    try:
        source.make_ir(target, parsed, implementation, backend.get_module_map(), context)
    except triton.CompilationError as error:
        refused.append(f"{source.fn.__module__}.{source.fn.__name__} {source.constants}\n{error}")
        raise
    taken += 1
    return Compiled()


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # conftest.py has it on where there is no GPU
    _driver.use("sm_90")
    triton.compiler.compile = front_end
    import lsc_kernels as lk

    lk.triton.unavailable = lambda device: None  # which refuses CPU tensors


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    print(*refused, f"Triton's front end took {taken} kernels and refused {len(refused)}", sep="\n")
    session.exitstatus = int(bool(refused) or not taken)
