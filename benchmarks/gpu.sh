#!/bin/bash
# Everything that needs a GPU, in one command, under nine minutes and without a network:
#
#     benchmarks/gpu.sh [OUT]
#
# builds the CUDA kernels for the GPU that is there, runs the ops' tests on it (Triton, CUDA C++ and eager against fp64),
# compute-sanitizer on small shapes, and then the benchmarks. It needs Python with torch >= 2.11 for CUDA, triton, numpy,
# and nvcc, cmake, ninja and pybind11; for the tests pytest, hypothesis and mpmath, better with pytest-xdist. PYTHON names
# another interpreter than python3. Results and logs go to OUT, benchmarks/results by default. A step that fails, or that its
# time does not suffice for, keeps none of the others from running; what failed is said at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 LSC_KERNELS_BACKEND=auto
unset TRITON_INTERPRET
SECONDS_IN_ALL=530
failed=() times=()

if ! capability=$("$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
print("%d%d" % torch.cuda.get_device_capability())'); then
  echo "benchmarks/gpu.sh is for a machine with a GPU; PYTHON=... names another interpreter" >&2
  exit 2
fi

step() {
  local name=$1 limit=$2 log=$OUT/gpu-$1.log begin=$SECONDS
  shift 2
  echo "=== $name"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || failed+=("$name (exit $?, see $log)")
  tail -n "${LINES_SHOWN:-4}" "$log"
  times+=("$(printf '%4d s  %s' $((SECONDS - begin)) "$name")")
}

# The kernels, and beside them what later steps would wait for: Triton's and torch.compile's own compilers fill their caches.
build() {
  "$PYTHON" -m benchmarks.gpu_small_shapes --seconds 80 >"$OUT/gpu-warm-triton.log" 2>&1 &
  timeout 100 "$PYTHON" -m benchmarks.gpu --only-compile >"$OUT/gpu-warm-compile.log" 2>&1 &
  export LSC_KERNELS_BUILD=cuda
  cmake -S csrc -B build/gpu -G Ninja -DLSC_INPLACE=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DLSC_CUDA_ARCHITECTURES="$1-real" && cmake --build build/gpu
  local result=$?
  wait
  return $result
}

tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  # shellcheck disable=SC2046
  "$PYTHON" -m pytest -q --tb=short "${workers[@]}" --seconds 120 -k "(cuda or gpu) and not emulat" \
    tests/test_gpu.py $(scripts/kernel_tests.sh)
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  local tool running=() result=0
  for tool in memcheck racecheck; do
    # torch's own pool would hide a write beyond a tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.gpu_small_shapes --seconds 45 >"$OUT/gpu-$tool.log" 2>&1 &
    running+=($!)
  done
  wait "${running[0]}" || result=1
  wait "${running[1]}" || result=1
  for tool in memcheck racecheck; do echo "--- $tool"; tail -n 3 "$OUT/gpu-$tool.log"; done
  return $result
}

export -f build tests sanitizer
export PYTHON OUT
# the second column: seconds at most; the benchmarks have what the others leave
LINES_SHOWN=12 step info 20 "$PYTHON" -m lsc_kernels.cli info
step build 120 bash -c "build $capability"
step tests 150 bash -c tests
LINES_SHOWN=8 step sanitizer 90 bash -c sanitizer
left=$((SECONDS_IN_ALL - SECONDS))
LINES_SHOWN=60 step benchmarks "$left" "$PYTHON" -m benchmarks.gpu --seconds $((left - 15)) --out "$OUT"

echo "=== summary"
printf '%s\n' "${times[@]}"
((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}"
exit $((${#failed[@]} > 0))
