"""Plants faults in the CUDA kernels, one at a time, and tells how the emulation notices each.

    python -m tests.cuda_mutants [WORD]      a line for each fault (whose name has WORD in it)

A fault is a line of a kernel changed; `tests/cuda_faults.py` lists them. The changed kernel is
compiled as the emulation is and runs a few cases in a process of its own. A fault that nothing
notices would mean that the tests prove less than they seem to: then this ends with status 1, and
tests/test_cuda_faults.py fails.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastlora import ops, reference
from tests import emulated
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results, run
from tests.conftest import poisoned_memory
from tests.cuda_checks import (
    LORA_TERM_ERROR,
    PLAIN_CONFLICTS,
    check_infinite_operands,
    check_nested_codes,
    check_scale_that_is_not_finite,
    lora_term_errors,
    plain_conflicts,
)
from tests.cuda_faults import CONTROL, DECODE, DX, FAULTS, FINISH, FWD, RAGGED_DX, RAGGED_FWD, Fault
from tests.tolerance import assert_close_to_exact

CUDA = emulated.ROOT / "csrc" / "cuda"
FLAGS = "CMakeFiles/fastlora_emulated.dir"


CASES = {
    FINISH: (
        Case("", 9, 33, 2112, 5),
        Case("", 70, 64, 1056, 5),
        Case("", 3, 20, 64, 130),  # more ranks than are in shared memory at once
    ),
    FWD: (Case("", 130, 137, 224, 40), Case("", 70, 64, 1056, 5)),
    DX: (Case("", 130, 136, 224, 40, dropout_p=0.3),),
    RAGGED_FWD: (Case("", 130, 137, 221, 40), Case("", 70, 64, 1059, 5)),
    RAGGED_DX: (Case("", 130, 139, 221, 40, dropout_p=0.3),),
    DECODE: (Case("", 9, 33, 2112, 5, dropout_p=0.3),),
}


def check(unit: str, library: Path) -> None:
    """Raises if the emulation or the result shows a fault in `unit`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # what notices a fault today does so tomorrow
    controls = emulated.load_library(library)
    base = Base("nf4", 64, nested=True)
    with emulated.as_backend() as backend:
        for case in CASES.get(unit, ()):
            inputs = make_inputs(case, base, DTYPES["fp16, fp32 adapter"])
            exact, plain = exact_results(case, inputs), plain_results(case, inputs)
            with poisoned_memory():
                got = run(case, inputs, backend)
            for name in ("y", "dx", "dA", "dB"):
                results = (getattr(which, name) for which in (got, exact, plain))
                assert_close_to_exact(*results, what=name)
        ragged = unit in (RAGGED_FWD, RAGGED_DX)
        if unit in (FWD, DX) or ragged:
            K = 145 if ragged else 160
            check_scale_that_is_not_finite(3, 70, K, torch.nan, backend)
            check_infinite_operands(3, backend)
            assert max(lora_term_errors(backend)) < LORA_TERM_ERROR, "LoRA term"
        if unit == "quantize_absmax":
            check_nested_codes()
        for blocksize in (64, 2048):
            weight = torch.randn(300, 131)
            want, state = reference.quantize_4bit(weight, blocksize, compress_statistics=True)
            packed, again = ops.quantize_4bit(weight, blocksize, "nf4", True, backend=backend)
            assert torch.equal(packed, want) and torch.equal(again.absmax, state.absmax)
            out = ops.dequantize_4bit(packed, state, torch.float32, backend=backend)
            assert torch.equal(out, reference.dequantize_4bit(want, state, torch.float32))
        for kernel, (conflicts, turns) in plain_conflicts(
            controls, K=499 if ragged else 512
        ).items():
            if conflicts > PLAIN_CONFLICTS[kernel] * turns:
                raise RuntimeError(f"banks: {conflicts} turns more than {turns}")
    if controls.simt_counters().bank_conflicts:
        raise RuntimeError("banks are met twice")


def compile_fault(fault: Fault, folder: Path) -> Path:
    """The emulated library with the fault in it."""
    copy = folder / "cuda"
    shutil.copytree(CUDA, copy, dirs_exist_ok=True)
    text = (CUDA / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} must have this once: {fault.old!r}")
    (copy / fault.file).write_text(text.replace(fault.old, fault.new))
    source = str(CUDA / f"{fault.unit}.cu")
    commands = json.loads((emulated.BUILD / "compile_commands.json").read_text())
    command = next(
        entry["command"]
        for entry in commands
        if entry["file"] == source and FLAGS in entry["output"]
    )
    arguments = shlex.split(command)
    arguments = arguments[: arguments.index("-o")]
    # Behind the emulation's headers, before the real ones.
    place = next(i for i, word in enumerate(arguments) if word == f"-I{emulated.ROOT / 'csrc'}")
    arguments.insert(place, f"-I{folder}")
    changed = folder / f"{fault.unit}.o"
    arguments += ["-O1", "-w", "-o", str(changed), "-c", str(copy / f"{fault.unit}.cu")]
    subprocess.run(arguments, check=True)
    objects = (emulated.BUILD / FLAGS).rglob("*.o")
    others = [str(path) for path in objects if path.name != f"{fault.unit}.cu.o"]
    library = folder / "mutant.so"
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    link = ["g++", "-shared", *others, str(changed), str(torch_library), "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def noticed(fault: Fault) -> str:
    """What a process that runs the fault says of it; "nothing" if it finds no fault."""
    with tempfile.TemporaryDirectory() as name:
        library = compile_fault(fault, Path(name))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                check(fault.unit, library)
                verdict = "nothing"
            except AssertionError as error:
                verdict = f"wrong result: {error}"
            except RuntimeError as error:
                verdict = str(error)
            except BaseException as error:
                verdict = f"broken: {error!r}"
            finally:
                os.write(writer, verdict.splitlines()[0].encode())
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        return said or f"wrong result: ended with status {status}"


def main() -> int:
    emulated.build()
    missed = 0
    for fault in (*CONTROL, *FAULTS):
        if len(sys.argv) > 1 and sys.argv[1] not in fault.name:
            continue
        said = noticed(fault)
        ok = fault.noticed in said
        missed += not ok
        print(f"{'ok' if ok else 'MISSED'}  {fault.unit}, {fault.name}: {said[:150]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
