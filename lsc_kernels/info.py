"""``lsc-kernels info``: what is here, what serves which device, why the rest does not, and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import lsc_kernels

DISTRIBUTION = "lsc-kernels"

# The modules by which an installed extra is known.
EXTRA_MODULES = {
    "triton": ("triton",),
    "hf": ("transformers", "datasets", "pyarrow", "rich"),
    "trl": ("trl",),
    "plot": ("matplotlib",),
    "reference": ("pyarrow", "duckdb", "rich", "datasketches"),
    "ray": ("ray",),
    "bench": ("pytest", "pytest_benchmark"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report; always 0, for what is missing here is no mistake."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything the report says, as plain JSON data.

    Example:
        >>> facts = collect()
        >>> facts["backends"]["cpu"]["eager"]
        'available'
    """
    return {
        "versions": {
            "lsc_kernels": lsc_kernels.__version__,
            "torch": None if lsc_kernels.WITHOUT_TORCH else importlib.import_module("torch").__version__,
            "numpy": version("numpy"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "location": str(Path(lsc_kernels.__file__).parent),
        **({} if lsc_kernels.WITHOUT_TORCH else kernels()),
        "extras": {
            extra: {module: version(module) for module in modules} for extra, modules in EXTRA_MODULES.items()
        },
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("LSC_KERNELS_")
        },
        "advice": advice(),
    }


def kernels() -> dict[str, Any]:
    """What of the report only torch knows."""
    import torch

    from lsc_kernels import native

    extension: Any = importlib.import_module("lsc_kernels._C") if native.UNAVAILABLE is None else None
    return {
        "backends": lsc_kernels.backends(),
        "backend": lsc_kernels.get_backend(),
        "cpu": {
            "isa": extension.isa() if extension else None,
            "isas": extension.isas() if extension else [],
            "isas_built": extension.build_info()["isas"] if extension else [],
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "architectures": extension.cuda_architectures() if extension else [],
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "extension": {
            "available": extension is not None,
            "why_not": native.UNAVAILABLE,
            "build": extension.build_info() if extension else None,
        },
    }


def version(module: str) -> str | None:
    """The installed version of the distribution that brings ``module``; None if there is none."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def advice() -> list[str]:
    """One line for each thing that is missing, with the command that brings it."""
    lines = []
    if lsc_kernels.WITHOUT_TORCH is not None:
        lines.append(lsc_kernels.WITHOUT_TORCH)
    elif importlib.import_module("lsc_kernels.native").UNAVAILABLE is not None:
        lines.append(
            "Compiled CPU kernels: with torch installed and a C++20 compiler (Debian, Ubuntu: "
            "apt install g++ python3-dev): "
            f"LSC_KERNELS_BUILD=cpu pip install --force-reinstall --no-deps {source()}"
        )
    for extra, modules in EXTRA_MODULES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            lines.append(f"Extra {extra} ({', '.join(missing)}): pip install '{DISTRIBUTION}[{extra}]'")
    return lines


def source() -> str:
    """What to hand to pip to install this package again: its directory if it came from one, else its name."""
    try:
        direct_url = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        direct_url = None
    origin = json.loads(direct_url) if direct_url else {}
    if "dir_info" not in origin:
        return DISTRIBUTION
    folder = shlex.quote(url2pathname(urlsplit(origin["url"]).path))
    return f"-e {folder}" if origin["dir_info"].get("editable") else folder


def render(facts: dict[str, Any]) -> str:
    """The report as text."""
    versions = facts["versions"]
    rows: list[tuple[str, str]] = [
        ("lsc_kernels", f"{versions['lsc_kernels']} in {facts['location']}"),
        ("torch, numpy", f"{versions['torch'] or 'missing'}, {versions['numpy'] or 'missing'}"),
        ("Python", f"{versions['python']} on {versions['platform']}"),
        ("", ""),
        *(kernel_rows(facts) if "backends" in facts else []),
    ]
    for extra, modules in facts["extras"].items():
        rows.append(
            (
                f"extra {extra}",
                ", ".join(f"{module} {found or 'missing'}" for module, found in modules.items()),
            )
        )
    rows += [(name, value) for name, value in facts["environment"].items()]
    width = max(len(label) for label, _ in rows)
    text = [f"{label:<{width}}  {value}".rstrip() for label, value in rows]
    if facts["advice"]:
        text += ["", "How to get what is missing"] + [f"  {line}" for line in facts["advice"]]
    return "\n".join(text)


def kernel_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on backends and devices."""
    cpu, cuda = facts["cpu"], facts["cuda"]
    rows = [
        (f"{device}: {backend}", status)
        for device, served in facts["backends"].items()
        for backend, status in served.items()
    ]
    rows += [
        ("backend asked for", facts["backend"]),
        ("", ""),
        ("instruction set", instruction_sets(cpu)),
        ("threads", f"{cpu['threads']} (torch.set_num_threads changes it)"),
        ("CUDA architectures", ", ".join(cuda["architectures"]) or "none built"),
        ("CUDA devices", ", ".join(cuda["devices"]) or "none seen by torch"),
    ]
    if facts["extension"]["available"]:
        build = facts["extension"]["build"]
        built_with = f"built by {build['compiler']} with the headers of torch {build['torch_headers']}"
        rows.append(("extension", f"{built_with}, for torch >= {build['torch_minimum']}"))
    return [*rows, ("", "")]


def instruction_sets(cpu: dict[str, Any]) -> str:
    """One phrase on the instruction set in use and the others."""
    if cpu["isa"] is None:
        return "none: the CPU kernels are not built"
    idle = [name for name in cpu["isas_built"] if name not in cpu["isas"]]
    return (
        f"{cpu['isa']} (LSC_KERNELS_CPU chooses among {', '.join(cpu['isas'])}"
        + (f"; built but not for this processor: {', '.join(idle)}" if idle else "")
        + ")"
    )
