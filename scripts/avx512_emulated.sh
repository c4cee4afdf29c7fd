#!/bin/bash
# Run the native tests on the AVX-512 kernels where the processor has no AVX-512: compiled with SIMDe (Debian, Ubuntu:
# libsimde-dev; elsewhere CMAKE_INCLUDE_PATH says where), which does in AVX2 what the instructions would.
#
#     scripts/avx512_emulated.sh [PYTHON] [PYTEST_ARGUMENTS...]
#
# PYTHON (default .venv/bin/python) has torch and what the tests need; nothing is installed into it. Everything is done on
# a copy of the files that git knows, in build/avx512.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
export PATH="$(dirname "$python"):$PATH" LSC_KERNELS_BUILD=cpu

rm -rf build/avx512/{tree,venv}
mkdir -p build/avx512/tree
git ls-files -z | xargs -0 cp --parents --preserve=timestamps -t build/avx512/tree
cmake -S build/avx512/tree/csrc -B build/avx512/cmake -G Ninja -DLSC_INPLACE=ON -DLSC_AVX512_EMULATED=ON -DPython_EXECUTABLE="$python"
cmake --build build/avx512/cmake

# PYTHON's packages without what its .pth files do: an editable install would bring its own kernels.
"$python" -m venv --without-pip build/avx512/venv
packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'
"$python" -c "$packages" >"$(build/avx512/venv/bin/python -c "$packages")/main.pth"
cd build/avx512/tree
LSC_KERNELS_CPU=avx512 ../venv/bin/python -m pytest -q -k native $(scripts/kernel_tests.sh) "${@:2}"
