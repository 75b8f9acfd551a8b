"""`fastlora info`: versions, kernels and the machine, ready to paste into an issue."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__

# In the order of the report.
_PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "numpy")
# The flags by which kernels here and in oneDNN are chosen.
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_BUILD_FACTS = {
    "cpu_isas": "instruction sets compiled",
    "cpu_isa": "instruction set chosen",
    "torch_abi": "torch ABI",
}
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        help="versions and kernels here, to paste into an issue",
        description="Prints versions, instruction sets and the kernels that run here.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    sections = collect()
    if args.json:
        print(json.dumps(sections, indent=2))
        return 0
    print("Copy and paste the text below into your issue.\n")
    for title, facts in sections.items():
        print(f"- {title}")
        for name, value in facts.items():
            print(f"  - {name}: {_shown(value)}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """The report: section, then fact, then value."""
    return {
        "fastlora": _fastlora(),
        "machine": _machine(),
        "torch": _torch(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "bitsandbytes on this CPU": _repacking(),
    }


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _fastlora() -> dict[str, Any]:
    from ..backends import BACKENDS, native
    from ..backends.contract import Request
    from ..backends.machine import cpu

    facts: dict[str, Any] = {"version": __version__}
    build = native.build_info()
    if build is None:
        facts["native library"] = native.unavailable_reason()
    else:
        facts["native library"] = "loaded"
        facts |= {_BUILD_FACTS.get(name, name): value for name, value in build.items()}
        facts["tile sizes"] = "tuned" if cpu.tuned(build["cpu_isa"]) else "defaults"
    facts["library for cuda"] = native.cuda.unavailable_reason() or "loaded"
    request = Request("lora_linear_fwd", "cpu")
    facts["backends on cpu"] = [
        name for name, backend in BACKENDS.items() if backend.unsupported(request) is None
    ]
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTLORA_")}
    facts["environment"] = [f"{name}={value}" for name, value in settings.items()]
    return facts


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
    }
    from ..backends.machine.cpu import cpuinfo

    if facts_of_cpu := cpuinfo():
        facts["cpu"] = facts_of_cpu.get("model name", facts["cpu"])
        present = set((facts_of_cpu.get("flags") or facts_of_cpu.get("Features") or "").split())
        facts["cpu flags"] = [flag for flag in _CPU_FLAGS if flag in present]
    facts["cpus for this process"] = _cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["memory"] = f"{memory / 2**30:.1f} GiB"
    facts["allocator"] = _allocator()
    return facts


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _allocator() -> str:
    """The malloc in use. With glibc's defaults, large temporaries cause page faults."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = os.environ.get("LD_PRELOAD", "")
    for name in _ALLOCATORS:
        if name in maps:
            return name
    if any(os.environ.get(f"MALLOC_{name}_THRESHOLD_") for name in ("MMAP", "TRIM")):
        return "the system's, with MALLOC_ thresholds set"
    return "the system's; tcmalloc in LD_PRELOAD spares page faults of large temporaries"


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "built for cuda": torch.version.cuda,
        "cuda": torch.cuda.is_available(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [
            f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return facts


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _repacking() -> dict[str, Any]:
    """Whether an evaluation here would rewrite 4-bit weights; see integrations/bitsandbytes.py."""
    if version_of("bitsandbytes") == "not installed":
        return {"repacks weights in eval mode": "bitsandbytes is not installed"}
    # It would warn about kernels that it can't fetch, in the middle of the report.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes as bnb
    except Exception as error:
        # A broken installation can raise anything, and this report has to show it.
        return {
            "repacks weights in eval mode": f"can't be imported ({type(error).__name__}: {error})"
        }
    layer = bnb.nn.Linear4bit(32, 32, device="meta")
    repacks = bool(getattr(layer, "support_avx512bf16_for_cpu", False))
    facts: dict[str, Any] = {"repacks weights in eval mode": repacks}
    if repacks:
        facts["cure"] = (
            "fastlora.accelerate(model) switches it off; without it, gradients through frozen "
            "weights vanish after an evaluation"
        )
    return facts
