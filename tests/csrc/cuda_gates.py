"""What the compiled CUDA kernels look like: registers, spills, instructions, main loop.

    python tests/csrc/cuda_gates.py build/cuda            compares with tests/csrc/cuda_gates.csv
    python tests/csrc/cuda_gates.py build/cuda --write    writes that file

Nothing here says how fast a kernel is. It says when a change, or another compiler, made a kernel
spill registers, lose its tensor core instructions or grow its loop, with no GPU at hand. The
figures hold for the nvcc release in the file's first line; for another one only LIMITS are checked.

The main loop is the one over the steps of the sum; `loop_per_8` is its length for eight weights
that a thread decodes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

GATES = Path(__file__).with_suffix(".csv")
# nvcc is where CMakeLists.txt looks for it.
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
COUNTED = ("HMMA", "LDSM", "LDGSTS", "PRMT", "LDS", "STS", "SHFL")
SPILLS = ("LDL", "STL")
COLUMNS = ("kernel", "arch", "registers", "stack", "spills", "instructions", "loop", "loop_per_8")
# Weights that a thread decodes in one turn of the main loop.
WEIGHTS_A_TURN = {"qlora_gemm": 32, "decode_kernel_1": 128, "decode_kernel_2": 128,
                  "decode_kernel_4": 32}  # fmt: skip
# A kernel's name where it stands in a mangled one, behind its length.
KERNEL = (
    r"\d(quantize|quantize_absmax_kernel|dequantize|qlora_gemm|decode_kernel|finish_kernel)[IE]"
)
# Registers of one block of 256 threads on a multiprocessor, bytes of stack, spilling instructions.
LIMITS = {"registers": 255, "stack": 0, "spills": 0}


def find_cuobjdump() -> str | None:
    """cuobjdump of Triton's package, which has nvdisasm beside it, or of a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return shutil.which("cuobjdump")


def nvcc_release() -> str | None:
    """As "13.0"; None without nvcc."""
    if not Path(NVCC).exists():
        return None
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else None


def short_name(mangled: str) -> str:
    """`qlora_gemm_ragged_fwd_64_bf16`: the kernel and its template arguments."""
    name = re.search(KERNEL, mangled)
    if name is None:
        raise ValueError(f"unknown kernel {mangled}")
    rest = mangled[name.end(1) :]
    number = re.search(r"NS0_\d+(bf16|f16)E", rest)
    kind = number[1] if number else "f32" if rest.startswith("If") else ""
    ragged = ["ragged"] if "RaggedCodes" in rest else []
    directions = [{"1": "fwd", "0": "dx"}[flag] for flag in re.findall(r"Lb(\d)E", rest)]
    numbers = re.findall(r"Li(\d+)E", rest)
    return "_".join(part for part in (name[1], *ragged, *directions, *numbers, kind) if part)


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The shortest loop with tensor core products and loads of packed bytes: a step of the sum."""
    loops = []
    for index, (_, text) in enumerate(code):
        jump = re.match(r"(?:@!?U?P\w+ )?BRA(?:\.\w+)* (?:!?U?P\w+, )?0x([0-9a-f]+)", text)
        if jump is None:
            continue
        start = next((i for i, (at, _) in enumerate(code) if at == int(jump[1], 16)), index + 1)
        if start <= index:
            body = [line for _, line in code[start : index + 1]]
            # The tile kernel copies (LDGSTS), the decode kernel loads past the cache (LDG.E.EF).
            if any("HMMA" in line for line in body) and any(
                "LDGSTS" in line or "LDG.E.EF" in line for line in body
            ):
                loops.append(body)
    return min(loops, key=len, default=[])


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0].rstrip(";")


def measure(objects: list[Path], cuobjdump: str) -> list[dict[str, str]]:
    """A row for each kernel and architecture."""
    rows = []
    for path in objects:
        usage = output([cuobjdump, "-res-usage", str(path)])
        resources, arch = {}, ""
        for line in usage.splitlines():
            if match := re.match(r"arch = (\w+)", line):
                arch = match[1]
            if match := re.match(r" Function (\w+):", line):
                function = match[1]
            if match := re.match(r"\s+REG:(\d+) STACK:(\d+)", line):
                resources[function, arch] = match.groups()
        arch, name, code = "", "", {}
        for line in output([cuobjdump, "-sass", str(path)]).splitlines():
            if match := re.match(r"\s*arch = (\w+)", line):
                arch = match[1]
            elif match := re.match(r"\s*Function : (\w+)", line):
                name = match[1]
                code[name, arch] = []
            elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
                code[name, arch].append((int(match[1], 16), match[2].strip()))
        for (function, arch), lines in code.items():
            registers, stack = resources[function, arch]
            mix = Counter(opcode(text) for _, text in lines)
            loop = main_loop(lines)
            kernel = short_name(function)
            weights = next((n for k, n in WEIGHTS_A_TURN.items() if kernel.startswith(k)), 0)
            row = dict.fromkeys(COLUMNS, "")
            row |= {"kernel": kernel, "arch": arch, "registers": registers, "stack": stack}
            row["spills"] = str(sum(mix[spill] for spill in SPILLS))
            row["instructions"] = str(sum(mix.values()) - mix["NOP"])
            if weights:
                row["loop"] = str(len(loop))
                row["loop_per_8"] = f"{len(loop) * 8 / weights:.1f}"
                in_loop = Counter(opcode(text) for text in loop)
                row |= {name: str(in_loop[name]) for name in COUNTED}
            else:
                row |= dict.fromkeys(COUNTED, "")
            rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["arch"]))))


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_gates() -> tuple[str, list[dict[str, str]]]:
    """The nvcc release that the figures hold for, and the rows."""
    with GATES.open(newline="") as file:
        release = file.readline().split()[-1]
        return release, list(csv.DictReader(file))


def faults(rows: list[dict[str, str]], release: str | None) -> list[str]:
    """What is not as it should be, one sentence each."""
    found = []
    for row in rows:
        for name, limit in LIMITS.items():
            if int(row[name]) > limit:
                found.append(f"{row['kernel']} {row['arch']}: {name} {row[name]}, limit {limit}")
    for_release, gates = read_gates()
    if release != for_release:
        return found
    wanted = {(gate["kernel"], gate["arch"]): gate for gate in gates}
    for row in rows:
        gate = wanted.pop((row["kernel"], row["arch"]), None)
        if gate is None:
            found.append(f"{row['kernel']} {row['arch']} is not in {GATES.name}")
        elif gate != row:
            changed = [f"{k} {gate[k]} -> {row[k]}" for k in row if gate.get(k) != row[k]]
            found.append(f"{row['kernel']} {row['arch']}: {', '.join(changed)}")
    found += [f"{kernel} {arch} is gone" for kernel, arch in wanted]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("cuda-gates: no cuobjdump; `pip install triton` brings one")
    rows = measure(sorted(args.folder.glob("*.o")), cuobjdump)
    if args.write:
        with GATES.open("w", newline="") as file:
            file.write(f"# nvcc {nvcc_release()}\n")
            writer = csv.DictWriter(file, COLUMNS + COUNTED, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return 0
    found = faults(rows, nvcc_release())
    print(*found, sep="\n", end="\n" if found else "")
    print(f"cuda-gates: {len(rows)} kernels, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
