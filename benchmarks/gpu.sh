#!/bin/bash
# Everything that needs a GPU, in one command, under nine minutes and without a network:
#
#     benchmarks/gpu.sh [OUT]
#
# builds the CUDA kernels for the GPU that is there, runs the ops' tests on it (Triton, CUDA C++ and eager against fp64),
# compute-sanitizer on small shapes, and then the benchmarks. It needs Python with torch >= 2.11 for CUDA, triton, numpy,
# and nvcc, cmake, ninja and pybind11; for the tests pytest, hypothesis and mpmath, better with pytest-xdist and pytest-timeout.
# PYTHON names another interpreter than python3, PYTHONPATH what it lacks, LSC_COMMIT the commit where there is no git.
# Results go to OUT, benchmarks/results by default, as they come: gpu-NAME.json and a log of each step, six files. A step that
# fails, or that its time does not suffice for, keeps none of the others from running; what failed is said at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
# cmake and ninja may be Python's, and the CUDA tools on no path
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 LSC_KERNELS_BACKEND=auto
unset TRITON_INTERPRET
SECONDS_IN_ALL=530
failed=() times=()

if ! capability=$("$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
print("%d%d" % torch.cuda.get_device_capability())'); then
  echo "benchmarks/gpu.sh is for a machine with a GPU; PYTHON=... names another interpreter" >&2
  exit 2
fi

# A step of so many seconds at most.
step() {
  local name=$1 limit=$2 log=$OUT/gpu-$1.log begin=$SECONDS
  shift 2
  echo "=== $name"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || failed+=("$name (exit $?, see $log)")
  tail -n "${LINES_SHOWN:-4}" "$log"
  times+=("$(printf '%4d s  %s' $((SECONDS - begin)) "$name")")
}

# A command with its name before each line, since it shares the log with others.
named() {
  local name=$1
  shift
  "$@" 2>&1 | sed -u "s/^/$name: /"
}

# Whether Python loads the kernels that were just built. The import hook of an editable install comes before PYTHONPATH.
loaded() {
  "$PYTHON" -c 'import os, sys
from lsc_kernels import native
if native.UNAVAILABLE: sys.exit(native.UNAVAILABLE)
from lsc_kernels import _C
if not os.path.samefile(os.path.dirname(_C.__file__), "lsc_kernels"):
    sys.exit(f"{sys.executable} loads {_C.__file__} instead of what was built here:"
             " take another PYTHON, or uninstall lsc-kernels from this one")
sys.exit(native.unavailable("cuda"))'
}

# The kernels, and beside them what later steps would wait for: Triton's and torch.compile's own compilers fill their caches.
build() {
  named triton timeout 90 "$PYTHON" -m benchmarks.gpu_small_shapes --seconds 80 &
  named torch.compile timeout 100 "$PYTHON" -m benchmarks.gpu --only-compile &
  export LSC_KERNELS_BUILD=cuda
  cmake -S csrc -B build/gpu -G Ninja -DLSC_INPLACE=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DLSC_CUDA_ARCHITECTURES="$1-real" && cmake --build build/gpu && loaded
  local result=$? took=$SECONDS
  wait
  echo "build: exit $result after $took s"
  return $result
}

# Of 170 seconds: what begins in the last of its 85 may take 75, and a process that is put in its place 10. Nearly all of it
# is Triton's compiler, on one core of each process.
tests() {
  local options=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && options+=(-n auto --maxprocesses 16)
  "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout 75 --timeout-method thread)
  # shellcheck disable=SC2046
  "$PYTHON" -m pytest -v --tb=short "${options[@]}" --seconds 85 -k "(cuda or gpu) and not emulat" \
    tests/test_gpu.py $(scripts/kernel_tests.sh)
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  local tool running=() result=0
  for tool in memcheck racecheck; do
    # torch's own pool would hide a write beyond a tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 named "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.gpu_small_shapes --seconds 50 &
    running+=($!)
  done
  for tool in "${running[@]}"; do wait "$tool" || result=1; done
  return $result
}

# Again without what has ended the CUDA context, as long as there is time for it.
benchmarks() {
  local result resume=()
  while (($1 > SECONDS + 15)); do
    "$PYTHON" -m benchmarks.gpu --out "$OUT" --seconds $(($1 - SECONDS - 15)) "${resume[@]}"
    result=$?
    ((result == 75)) || return $result
    resume=(--resume)
  done
  return 75
}

export -f named loaded build tests sanitizer benchmarks
export PYTHON OUT
# the second column: seconds at most; the benchmarks have what the others leave
LINES_SHOWN=12 step info 20 "$PYTHON" -m lsc_kernels.cli info
LINES_SHOWN=8 step build 150 bash -o pipefail -c 'build "$0"' "$capability"
LINES_SHOWN=25 step tests 170 bash -o pipefail -c tests
LINES_SHOWN=8 step sanitizer 90 bash -o pipefail -c sanitizer
left=$((SECONDS_IN_ALL - SECONDS))
LINES_SHOWN=60 step benchmarks "$left" bash -o pipefail -c 'benchmarks "$0"' "$left"

echo "=== summary"
printf '%s\n' "${times[@]}"
((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}"
exit $((${#failed[@]} > 0))
