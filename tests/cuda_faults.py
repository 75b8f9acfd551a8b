"""The faults that `tests/cuda_mutants.py` plants in the CUDA kernels, and what must notice each."""

from __future__ import annotations

from dataclasses import dataclass


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
