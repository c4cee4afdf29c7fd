#!/bin/bash
# Build the sdist and, from it, the wheel; look into both; use the wheel in a new environment.
#
#     scripts/check_wheel.sh [PYTHON]
#
# PYTHON (default .venv/bin/python) has torch and `build`. The new environment is filled by `make torch`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Not optimised, which takes a fifth of the time: the wheel is looked into and tried, and thrown away.
LSC_KERNELS_BUILD=cpu SKBUILD_CMAKE_DEFINE=LSC_OPTIMIZATION=-O0 "$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls -l "$work/dist"

# What git keeps is what the sdist holds, and no product of a build in the tree slips into either.
tar tzf "$work"/dist/*.tar.gz | sed 's,^[^/]*/,,' | grep -vx PKG-INFO | sort >"$work/in-sdist"
if git rev-parse --git-dir >/dev/null 2>&1; then
  git ls-files --cached --others --exclude-standard | sort | diff - "$work/in-sdist" \
    || { echo "the sdist (>) and the files of the repository (<) differ"; exit 1; }
fi
"$python" - "$work"/dist/*.whl <<'PYTHON'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
stray = [name for name in names if not name.startswith(("lsc_kernels/", "lsc_kernels-"))]
modules = [name for name in names if name.startswith("lsc_kernels/_C.") and not name.endswith(".pyi")]
assert not stray, f"outside the package: {stray}"
assert len(modules) == 1, f"wanted one compiled module, got {modules}"
assert {"lsc_kernels/py.typed", "lsc_kernels/_build_info.py"} <= set(names)
PYTHON

make --no-print-directory torch VENV="$work/venv" PYTHON="$python"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$work"/dist/*.whl
cp scripts/smoke.py "$work"
cd "$work"
venv/bin/python smoke.py
venv/bin/lsc-kernels info
venv/bin/python -m pip check
