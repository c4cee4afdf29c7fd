"""What rewards ask of a policy, from samples of the base policy: before any training is paid for."""

from lsc_kernels.analysis.diagnose import Dependence, Diagnosis, GroupEffect, PropertyDiagnosis, diagnose
from lsc_kernels.analysis.frontier import Frontier, FrontierPoint, frontier
from lsc_kernels.analysis.tilt import BestOf, Tilt, best_of_n, gamma_for_kl, tilt

__all__ = [
    "BestOf",
    "Dependence",
    "Diagnosis",
    "Frontier",
    "FrontierPoint",
    "GroupEffect",
    "PropertyDiagnosis",
    "Tilt",
    "best_of_n",
    "diagnose",
    "frontier",
    "gamma_for_kl",
    "tilt",
]
