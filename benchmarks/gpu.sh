#!/bin/bash
# Everything that needs a GPU, in one command, under nine minutes and without a network:
#
#     benchmarks/gpu.sh [OUT]
#
# builds the CUDA kernels for the GPU that is there, runs every test on it (Triton, CUDA C++ and eager against fp64),
# compute-sanitizer on small shapes, and then the benchmarks. It needs Python with torch >= 2.11 for CUDA, triton, numpy,
# pytest and hypothesis, and nvcc, cmake, ninja and pybind11; PYTHON names another interpreter than python3. Results and logs go
# to OUT, benchmarks/results by default. It runs to the end and then says what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 LSC_KERNELS_BACKEND=auto
unset TRITON_INTERPRET
failed=() times=()

step() {
  local name=$1 limit=$2 log=$OUT/gpu-$1.log begin=$SECONDS
  shift 2
  echo "=== $name"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || failed+=("$name (exit $?, see $log)")
  tail -n "${LINES_SHOWN:-4}" "$log"
  times+=("$(printf '%4d s  %s' $((SECONDS - begin)) "$name")")
}

build() {
  local capability
  capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  cmake -S csrc -B build/gpu -G Ninja -DLSC_INPLACE=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DCMAKE_CUDA_ARCHITECTURES="$capability-real" && cmake --build build/gpu
}

tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  "$PYTHON" -m pytest -q "${workers[@]}" -k "(cuda or gpu) and not emulated" tests
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  local tool
  for tool in memcheck racecheck; do
    echo "--- $tool"
    # torch's own pool would hide a write beyond a tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_small_shapes || return 1
  done
}

export -f build tests sanitizer
export PYTHON
# the second column: seconds, 530 in all
LINES_SHOWN=12 step info 20 "$PYTHON" -m lsc_kernels.cli info
step build 110 bash -c build
step tests 160 bash -c tests
step sanitizer 95 bash -c sanitizer
LINES_SHOWN=60 step benchmarks 145 "$PYTHON" -m benchmarks.gpu --seconds 110 --out "$OUT"

echo "=== summary"
printf '%s\n' "${times[@]}"
((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}"
exit $((${#failed[@]} > 0))
