"""The build backend: scikit-build-core, and one thing it cannot know.

`python -m build` compiles in an empty environment of its own, but runs this process on a file of the
environment it was called from. That is where torch is; find_torch.py, which CMake runs, looks there.
"""

import os
import sys

from scikit_build_core.build import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

os.environ.setdefault("LSC_KERNELS_BUILD_FRONTEND", os.path.abspath(sys.argv[0]))
