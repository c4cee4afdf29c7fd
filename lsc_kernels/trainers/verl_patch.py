"""Imported, it puts our functions in the place of verl's.

``VERL_USE_EXTERNAL_MODULES=lsc_kernels.trainers.verl_patch`` does so in every process of verl. Unlike a plugin's, the
failures of the modules named there are told.
"""

from __future__ import annotations

from lsc_kernels.trainers.verl import patch

patch()
