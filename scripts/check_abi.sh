#!/bin/bash
# One binary for several versions of torch: build the wheel against A, run the ops' tests on B, and the other
# way round.
#
#     scripts/check_abi.sh [A [B]]            default: torch==2.11.0 torch==2.13.0
#
# A and B are what pip takes for torch (a version, a wheel file), or a Python that has torch and what the tests
# import (pytest, hypothesis, mpmath). For the former, environments are made in build/abi and kept; on Linux
# PyPI's torch brings gigabytes of CUDA, which PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids with
# torch==2.13.0+cpu and the like. PYTEST_ARGS goes to pytest; emulated CUDA kernels are none of the wheel's.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra pytest_args <<<"${PYTEST_ARGS:-}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The Python of the environment for $1, made if it is not there.
environment() {
  if [ -x "$1" ] && [ ! -d "$1" ]; then
    realpath -s "$1"
    return
  fi
  local venv="$PWD/build/abi/$(basename "$1")"
  if [ ! -e "$venv/.complete" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # the interpreter of Triton 3.6, which torch 2.11 brings, does not work with a newer numpy
    "$venv/bin/python" -m pip install --quiet "$1" 'numpy<2.4' pytest hypothesis mpmath >&2
    touch "$venv/.complete"
  fi
  echo "$venv/bin/python"
}

torch_version() { "$1" -c 'import torch; print(torch.__version__)'; }

# Build with $1, test with $2. The wheel and the tests are copied away from the source tree, which would
# otherwise be imported in the wheel's place.
check() {
  local built_on tested_on place
  built_on=$(torch_version "$1") tested_on=$(torch_version "$2")
  place="$work/$built_on-$tested_on"
  mkdir -p "$place"
  LSC_KERNELS_BUILD=cpu "$1" -m pip wheel --quiet --no-deps --wheel-dir "$place" . || return
  "$2" -m pip install --quiet --no-deps --target "$place/site" "$place"/*.whl || return
  cp -r tests pyproject.toml "$place"
  echo "== built on torch $built_on, run on torch $tested_on"
  (
    cd "$place"
    export PYTHONPATH="$place/site"
    "$2" - <<'PYTHON' || exit
import os
import torch
import lsc_kernels
from lsc_kernels import _C
assert _C.__file__.startswith(os.environ["PYTHONPATH"]), f"use an environment without {_C.__file__}"
assert lsc_kernels.backends()["cpu"]["native"] == "available", lsc_kernels.backends()
print("built with the headers of torch", _C.build_info()["torch_headers"], "- loaded into torch", torch.__version__)
PYTHON
    "$2" -m pytest -q -k "not emulated" "${pytest_args[@]}" $kernel_tests
  )
}

kernel_tests=$(scripts/kernel_tests.sh)
a=$(environment "${1:-torch==2.11.0}")
b=$(environment "${2:-torch==2.13.0}")
failed=0
check "$a" "$b" || failed=1
check "$b" "$a" || failed=1
exit $failed
