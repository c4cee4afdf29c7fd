#!/bin/sh
# Print the test files of the ops: those that exercise the compiled kernels.
cd "$(dirname "$0")/.." || exit 1
for op in lsc_kernels/ops/[a-z]*.py; do
  echo "tests/test_$(basename "$op")"
done
