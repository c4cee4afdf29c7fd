"""Reference rewards: how good is good enough, per prompt and property."""

from lsc_kernels.reference.cluster import fit_ray
from lsc_kernels.reference.quantile import leave_one_out_quantile, quantile_reference
from lsc_kernels.reference.rows import prompt_keys
from lsc_kernels.reference.streaming import StreamingQuantile
from lsc_kernels.reference.table import FallbackWarning, Provenance, ReferenceTable

__all__ = [
    "FallbackWarning",
    "Provenance",
    "ReferenceTable",
    "StreamingQuantile",
    "fit_ray",
    "leave_one_out_quantile",
    "prompt_keys",
    "quantile_reference",
]
