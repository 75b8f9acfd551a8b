"""Plants faults in the CUDA kernels, one at a time, and tells how the emulation notices each.

    python -m tests.cuda_mutants [WORD]      a line for each fault (whose name has WORD in it)

A fault is a line of a kernel changed. The changed kernel is compiled as the emulation is and runs a
few cases in a process of its own. A fault that nothing notices would mean that the tests prove less
than they seem to: then this ends with status 1, and tests/test_cuda.py fails.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlora import ops, reference
from tests import emulated
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results, run
from tests.conftest import poisoned_memory
from tests.test_cuda import (
    LORA_TERM_ERROR,
    PLAIN_CONFLICTS,
    lora_term_errors,
    plain_conflicts,
    test_a_scale_that_is_not_finite_stays_where_it_is,
    test_infinite_fp32_operands_stay_infinite,
    test_nested_codes_change_where_the_definition_changes_them,
)
from tests.tolerance import assert_close_to_exact

CUDA = emulated.ROOT / "csrc" / "cuda"
FLAGS = "CMakeFiles/fastlora_emulated.dir"


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in `file`, becomes `new` where `unit` is compiled."""

    name: str
    file: str
    unit: str
    old: str
    new: str
    noticed: str  # words of what notices it, as benchmarks/report/cuda_report.py explains them


FWD, DX, DECODE, FINISH = "qlora_gemm_fwd", "qlora_gemm_dx", "qlora_decode", "finish"
RAGGED_FWD, RAGGED_DX = "qlora_gemm_ragged_fwd", "qlora_gemm_ragged_dx"
LOOP_BARRIER = "      block_barrier();\n      if (step + 1 < end) load_x(step + 1);\n"
LAST_WAIT = "    copy_async_wait<0>();\n    store_sums();\n"
LOOP_LOAD = "      if (step + 1 < end) load_x(step + 1);\n"


def gemm(name: str, unit: str, old: str, new: str, noticed: str) -> Fault:
    return Fault(name, "qlora_gemm.cuh", unit, old, new, noticed)


def runs(name: str, unit: str, old: str, new: str, noticed: str = "wrong") -> Fault:
    return Fault(name, "code_runs.cuh", unit, old, new, noticed)


def decode(name: str, old: str, new: str, noticed: str) -> Fault:
    return Fault(name, "qlora_decode.cu", DECODE, old, new, noticed)


def finish(name: str, old: str, new: str, noticed: str) -> Fault:
    return Fault(name, "finish.cu", FINISH, old, new, noticed)


# Must be noticed by nothing: the check itself is right.
CONTROL = (
    gemm("no fault", FWD, LOOP_BARRIER, LOOP_BARRIER, "nothing"),
    decode("no fault", "namespace fastlora::cuda {", "namespace fastlora::cuda {", "nothing"),
)
FAULTS = (
    gemm(
        "the last copies are not waited for", FWD, LAST_WAIT, "    store_sums();\n", "ends before"
    ),
    gemm("no barrier between steps", FWD, LOOP_BARRIER, LOOP_LOAD, "race"),
    gemm(
        "a barrier for half of the warps",
        FWD,
        LOOP_BARRIER,
        "      if (warp < 4) block_barrier();\n" + LOOP_LOAD,
        "race",
    ),
    gemm(
        "no barrier before the LoRA product",
        FWD,
        "      store_adapter(rank0);\n      block_barrier();\n",
        "      store_adapter(rank0);\n",
        "race",
    ),
    gemm(
        "no barrier after the LoRA product",
        DX,
        "      }\n      block_barrier();\n    }\n  }\n",
        "      }\n    }\n  }\n",
        "race",
    ),
    gemm(
        "no barrier after the dropout mask",
        DX,
        "    }\n    block_barrier();\n#pragma unroll\n    for (int i = 0; i < kRowTiles; i++) {",
        "    }\n#pragma unroll\n    for (int i = 0; i < kRowTiles; i++) {",
        "race",
    ),
    gemm(
        "a wait that leaves one copy under way",
        FWD,
        "      copy_async_wait<0>();\n",
        "      copy_async_wait<1>();\n",
        "race",
    ),
    gemm(
        "copies that are never committed",
        DX,
        "      next = load_codes(step + 2);\n      copy_async_commit();\n",
        "      next = load_codes(step + 2);\n",
        "race",
    ),
    gemm(
        "one tile of x instead of two",
        FWD,
        "Memory::kXAt + static_cast<uint32_t>(i & 1)",
        "Memory::kXAt + static_cast<uint32_t>(i & 0)",
        "race",
    ),
    gemm(
        "shared memory too small for the mask",
        DX,
        "kBytes = kKeepAt + (kForward ? 0 : kTokens * sizeof(Words4))",
        "kBytes = kKeepAt",
        "end",
    ),
    gemm(
        "more shared memory than sm_86 has",
        FWD,
        "kBytes = kKeepAt +",
        "kBytes = 100 * 1024 +",
        "a block asks for",
    ),
    gemm("no swizzle", FWD, "(chunk ^ (row & 7))", "(chunk)", "banks"),
    gemm(
        "a swizzle that the reader does not share",
        DX,
        "moved(w_tile(step) + w_write, 0, quarter)",
        "moved(w_tile(step) + w_write, 0, 3 - quarter)",
        "wrong",
    ),
    gemm(
        "fragment registers swapped",
        FWD,
        "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
        "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]",
        "wrong",
    ),
    gemm("dx without transposing", DX, "load_matrices_transposed(b", "load_matrices(b", "wrong"),
    gemm(
        "one output too many", FWD, "if (output >= p.outputs)", "if (output > p.outputs)", "wrong"
    ),
    gemm("x past its last column", FWD, "smaller(larger(left, 0), 8)", "8", "wrong"),
    gemm(
        "a fragment's rows 4 apart",
        DX,
        "16 * i + 8 * h + at.lane",
        "16 * i + 4 * h + at.lane",
        "wrong",
    ),
    gemm(
        "the absmax of the first step for all",
        FWD,
        "decoder_of(step + 1, next)",
        "decoder_of(step + 1, first)",
        "wrong",
    ),
    gemm(
        "no lower parts of S",
        FWD,
        "        multiply_part<bf16>(x_tile(0), kLow + part, w_tile(0), part);\n",
        "",
        "wrong",
    ),
    gemm(
        "parts of the sum in one place",
        FWD,
        "p.partial + split *",
        "p.partial + 0 * split *",
        "wrong",
    ),
    gemm("mask: even and odd swapped", DX, "permute(even, odd,", "permute(odd, even,", "wrong"),
    gemm("dx without the mask", DX, "drop_out();\n    }\n", ";\n    }\n", "wrong"),
    Fault("nibbles swapped", "weights.cuh", DX, "0x4051", "0x5140", "wrong"),
    Fault("codes above 7 as below", "weights.cuh", FWD, "& 0x44444444u", "& 0x44444440u", "wrong"),
    Fault(
        "a nested absmax rounded once",
        "weights.cuh",
        "dequantize_4bit",
        "add(multiply(code, a.scale), offset)",
        "__builtin_fmaf(code, a.scale, offset)",
        "wrong",
    ),
    Fault(
        "halves of the seed swapped",
        "dropout.cuh",
        DX,
        "k0 = dropout.key[0], k1 = dropout.key[1]",
        "k0 = dropout.key[1], k1 = dropout.key[0]",
        "wrong",
    ),
    decode(
        "no barrier before the table is overwritten",
        "  block_barrier();\n#pragma unroll\n  for (int tile = 0; tile < kTokenTiles; tile++) {\n",
        "#pragma unroll\n  for (int tile = 0; tile < kTokenTiles; tile++) {\n",
        "race",
    ),
    decode(
        "no barrier before S is added", "sums[0]);\n  block_barrier();\n", "sums[0]);\n", "race"
    ),
    decode("x of another lane's codes", "+ 16 * t;", "+ 16 * (t ^ 1);", "wrong"),
    decode(
        "a product for half of the lanes",
        "          multiply_add<T>(sum,",
        "          if (lane < 16) multiply_add<T>(sum,",
        "deadlock",
    ),
    decode(
        "one absmax for two rows", "sums[tile][2] += scale1", "sums[tile][2] += scale0", "wrong"
    ),
    decode(
        "sums given to the wrong lane",
        "upper ? sums[i] : sums[i + apart]",
        "upper ? sums[i + apart] : sums[i]",
        "wrong",
    ),
    decode("the last group of columns left out", "group0 < end;", "group0 < end - 1;", "wrong"),
    decode(
        "no barrier before the tables are read",
        "copy_tables(tables, quant, thread, kThreads);\n  block_barrier();\n",
        "copy_tables(tables, quant, thread, kThreads);\n",
        "race",
    ),
    decode("mask of S: even and odd swapped", "(keeps_even(", "(keeps_odd(", "wrong"),
    decode(
        "S without dropout's scale",
        "op.dropout.threshold == 0 ? 1.0f : op.dropout.scale",
        "1.0f",
        "wrong",
    ),
    decode(
        "one counter's bits for all tokens",
        "random_words(token0 + m,",
        "random_words(token0,",
        "wrong",
    ),
    decode("sums that meet in a bank", "kStride = kRows + 4", "kStride = kRows", "banks"),
    gemm(
        "no barrier before the tables are read",
        FWD,
        "    block_barrier();\n    if (split == 0) {\n",
        "    if (split == 0) {\n",
        "race",
    ),
    runs(
        "dx past W's last row in another block",
        DX,
        "inside || !kForward ? first_ : 0",
        "inside ? first_ : 0",
    ),
    runs("codes that are not shifted", RAGGED_FWD, "shift_left(word_, next, bits_)", "word_"),
    runs(
        "a shift by bytes alone",
        RAGGED_DX,
        "4 * static_cast<int>(run.first %",
        "8 * static_cast<int>(run.first / 2 %",
    ),
    runs("words as they lie", RAGGED_FWD, "return permute(word, 0, 0x0123);", "return word;"),
    runs(
        "the last word of a run left out",
        RAGGED_FWD,
        "static_cast<uint32_t>(i + 1)));",
        "static_cast<uint32_t>(smaller(i + 1, 3))));",
    ),
    runs("one absmax for a ragged run", RAGGED_DX, "from_code(change_ -", "from_code(2 -"),
    runs(
        "a change of absmax one code late",
        RAGGED_FWD,
        "const int change = blocksize -",
        "const int change = 1 + blocksize -",
    ),
    runs("a scale for runs past the row's end", RAGGED_FWD, "if (run.codes == 0)", "if (false)"),
    runs("codes past W's last row", RAGGED_DX, "row >= weight_.N || column", "column"),
    runs(
        "the run of the step before",
        RAGGED_DX,
        "run_of(int step) const {",
        "run_of(int step) const {\n    step--;",
    ),
    runs(
        "copies of ragged codes over each other",
        RAGGED_FWD,
        "copy_async_word(to + i,",
        "copy_async_word(to,",
        "race",
    ),
    gemm(
        "infinite values in both parts",
        FWD,
        "upper.w[i] = finite(pack<bf16>(v[2 * i], v[2 * i + 1]));",
        "upper.w[i] = pack<bf16>(v[2 * i], v[2 * i + 1]);",
        "wrong",
    ),
    Fault(
        "no barrier before the tables are read",
        "dequantize_4bit.cu",
        "dequantize_4bit",
        "kThreads);\n  block_barrier();\n",
        "kThreads);\n",
        "race",
    ),
    finish(
        "no barrier before S is overwritten",
        "    block_barrier();\n    for (int i = thread_index()",
        "    for (int i = thread_index()",
        "race",
    ),
    finish(
        "no barrier before S is read",
        "    block_barrier();\n    const int ranks",
        "    const int ranks",
        "race",
    ),
    finish("the last part left out", "s < p.splits; s++", "s < p.splits - 1; s++", "wrong"),
    finish("parts of S in one place", "p.S_partial[s * p.M", "p.S_partial[0 * p.M", "wrong"),
    finish("no S for the backward", "block < token_tiles;", "false;", "wrong"),
    finish("the LoRA term without its factor", "p.factor * lora[m]", "lora[m]", "wrong"),
    finish("one output too many", "output < p.outputs,", "output <= p.outputs,", "wrong"),
    Fault(
        "maxima of half a block",
        "quantize_4bit.cu",
        "quantize_4bit",
        "i < threads && i < kWarp",
        "2 * i < threads && i < kWarp",
        "wrong",
    ),
    Fault(
        "no barrier before the maxima are read",
        "quantize_4bit.cu",
        "quantize_4bit",
        "  block_barrier();\n  if (threads > kWarp)",
        "  if (threads > kWarp)",
        "race",
    ),
    Fault(
        "scaled absmax not rounded to the grid",
        "quantize_absmax.cu",
        "quantize_absmax",
        "static_cast<float>(static_cast<int>(point))",
        "point",
        "wrong",
    ),
    Fault(
        "no barrier before the maxima of absmax are read",
        "quantize_absmax.cu",
        "quantize_absmax",
        "largest);\n  block_barrier();\n",
        "largest);\n",
        "race",
    ),
)

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
            test_a_scale_that_is_not_finite_stays_where_it_is(3, 70, K, torch.nan, backend)
            test_infinite_fp32_operands_stay_infinite(3, backend)
            assert max(lora_term_errors(backend)) < LORA_TERM_ERROR, "LoRA term"
        if unit == "quantize_absmax":
            test_nested_codes_change_where_the_definition_changes_them(backend)
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
