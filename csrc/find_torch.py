"""Print the directory of the torch package whose headers the extension is compiled against.

Importing torch takes seconds, and is not possible at all inside the isolated environment that pip and
build make for a build: torch is not installed there. It need not be, only its files are wanted, and
they lie in the environment that the build was started from. The first of these places that has them:

1. LSC_KERNELS_TORCH_INCLUDE, if set: torch's `include` directory, or one that contains it;
2. the import path of this interpreter;
3. its site-packages: pip runs the environment's own interpreter, with site-packages taken off the path;
4. the site-packages that the build frontend was started from: `python -m build` runs an interpreter of
   a new, empty environment, but on a file of its own.

Exit status 1 and the reason on stderr if there is none.
"""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HEADER = Path("include/torch/csrc/stable/library.h")


def places() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        yield Path(sysconfig.get_paths()[scheme]) / "torch"
    frontend = os.environ.get("LSC_KERNELS_BUILD_FRONTEND")
    for parent in Path(frontend).parents if frontend else ():
        yield parent / "torch"


def find_torch() -> Path:
    given = os.environ.get("LSC_KERNELS_TORCH_INCLUDE")
    if given:
        for root in (Path(given).parent, Path(given), Path(given) / "torch"):
            if (root / HEADER).is_file():
                return root
        sys.exit(f"LSC_KERNELS_TORCH_INCLUDE={given}: no {HEADER.relative_to('include')} there")
    for root in places():
        if (root / HEADER).is_file():
            return root
    sys.exit(
        f"no torch >= 2.11 was found beside {sys.executable} when it was installed; "
        "install torch first, or name its include directory in LSC_KERNELS_TORCH_INCLUDE"
    )


if __name__ == "__main__":
    print(find_torch())
