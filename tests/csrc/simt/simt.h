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
#include <stdexcept>

namespace simt {

constexpr int kWarp = 32;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

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

void copy_async(uint32_t shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int left);

// What has been counted since the start of the process.
struct Counters {
  int64_t blocks, matrix_products, matrix_loads, bank_conflicts, async_copies;
};
Counters& counters();

}  // namespace simt
