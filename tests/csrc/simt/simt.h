// A thread block of a GPU on one thread of a CPU.
//
// Each CUDA thread is a fiber. It runs until it meets others (a barrier, a warp's collective
// instruction) and then waits; blocks run one after another in random order. What a real GPU leaves
// undefined is made to hurt: shared memory starts as NaN, warps are scheduled in random order and
// bursts, an asynchronous copy lands at once or as late as its wait allows. A detector checks that
// any two accesses of shared memory, one of them a write, are ordered by a barrier.
//
// Errors are thrown as simt::Error out of launch().
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>

namespace simt {

constexpr int kWarp = 32;

// Shared memory in KiB. Source: CUDA C++ Programming Guide, technical specifications per compute
// capability; a block takes 1 KiB more than it asks for.
struct Architecture {
  int sm;
  size_t of_block, of_multiprocessor;
};
constexpr Architecture kArchitectures[] = {
    {80, 163, 164}, {86, 99, 100}, {89, 99, 100}, {90, 227, 228}, {100, 227, 228}, {120, 99, 100},
};
constexpr size_t kKiB = 1024, kReserved = kKiB;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The GPU that is emulated, the oldest one at first: it says how many blocks run at once. A kernel
// may take no more shared memory than each GPU has that the kernels are compiled for.
void set_architecture(int sm);
const Architecture& architecture();

// Runs body() for each thread of each block. Not reentrant.
void launch(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body);

// The seed of every random choice from now on.
void seed(uint64_t value);

// ---- for the instructions, called on a fiber ---------------------------------------------------

int thread_index();
int block_index();

[[noreturn]] void fail(const char* what);

// Every thread of the block meets here.
void block_barrier();

// The 32 lanes of a warp meet in instruction `name` with their operands; the last to come runs
// `execute` on all of them.
using Execute = void (*)(void* const (&operands)[kWarp]);
void warp_collective(const char* name, void* operands, Execute execute);

// `bytes` of shared memory at `address`, a multiple of `alignment`: the place itself, after all
// checks. `lane` is the lane on whose behalf a collective instruction reads; -1: the caller.
enum class Access { read, write };
void* shared(uint32_t address, size_t bytes, Access access, int lane = -1);

// Counts a plain access, load or store, among those of its warp: banks.h.
void count_access(uint32_t address, size_t bytes, const std::source_location& where);

// Of `size` bytes, those past `bytes` zero.
void copy_async(uint32_t shared, const void* global, int bytes, int size);
void copy_async_commit();
void copy_async_wait(int left);

// What has been counted since the start of the process.
struct Counters {
  int64_t blocks, matrix_products, matrix_loads, bank_conflicts, async_copies;
  int64_t plain_turns, plain_conflicts;  // of plain loads and stores of shared memory
};
Counters& counters();

}  // namespace simt
