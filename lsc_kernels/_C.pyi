"""Native kernels of lsc_kernels: what csrc/module.cpp defines."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_flags: str
    isas: list[str]
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
    """The CUDA architectures built into this binary."""

def build_info() -> BuildInfo:
    """Compiler, flags and torch version this binary was built with."""
