"""Native kernels of lsc_kernels: what csrc/module.cpp defines."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_flags: str
    isas: list[str]
    cuda_compiler: str
    torch_headers: str
    torch_minimum: str
    pybind11: str

def isa() -> str:
    """The instruction set the CPU kernels use."""

def isas() -> list[str]:
    """The instruction sets built into this binary that run here, slowest first."""

def set_isa(name: str) -> None:
    """Use another instruction set from now on: 'auto' or one of isas()."""

def cuda_architectures() -> list[str]:
    """The CUDA architectures built into this binary, the one it has PTX of (compute_...) last."""

def cuda_skipped() -> str:
    """Why this binary has no CUDA kernels; empty when it has."""

def cuda_launches() -> int:
    """CUDA kernels launched by this process so far."""

def build_info() -> BuildInfo:
    """Compiler, flags and torch version this binary was built with."""
