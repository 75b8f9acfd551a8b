#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "banks.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#error "the switch of fibers is written for x86-64"
#endif

// Saves the registers that a call keeps, and goes on where the other stack was left.
extern "C" void simt_switch(void** save_stack, void* to_stack);
asm(R"(
  .text
  .local simt_switch
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostThreads = 1024;

enum class State { running, at_warp, at_barrier, done };

struct Copy {
  uint32_t to;
  const void* from;
  int bytes, size;  // from memory, and in all
  bool landed;
};

struct Thread {
  State state;
  const char* waits_in;
  void* operands;
  void* stack_pointer;
  std::unique_ptr<std::byte, void (*)(std::byte*)> stack{
      nullptr, [](std::byte* stack) { munmap(stack, kStackBytes); }};
  std::vector<std::vector<Copy>> copies;  // groups of cp.async; the last one is open
};

struct Machine {
  std::vector<Thread> threads{kMostThreads};
  int count = 0;  // threads of a block
  int64_t block = 0;
  int current = -1;  // the thread that runs; -1: the scheduler
  std::byte* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  void* scheduler_stack = nullptr;
  std::mt19937_64 random{1};
  Races races;
  Banks banks;
  Counters counters{};
  const Architecture* architecture = kArchitectures;
#if defined(__SANITIZE_ADDRESS__)
  const void* outer_stack = nullptr;
  size_t outer_bytes = 0;
  void* outer_fake = nullptr;
#endif
};

Machine& machine() {
  static Machine machine;
  return machine;
}

Thread& self() { return machine().threads[static_cast<size_t>(machine().current)]; }
int warp_of(int thread) { return thread / kWarp; }

// Of the architectures that CMake compiles for, listed as "80,90a", the one with the least shared
// memory for a block.
const Architecture& smallest() {
  const Architecture* least = nullptr;
  const std::string compiled = "," FASTLORA_CUDA_ARCHS ",";
  for (const Architecture& a : kArchitectures) {
    const std::string name = "," + std::to_string(a.sm);
    const bool listed = compiled.find(name + ",") != std::string::npos ||
                        compiled.find(name + "a,") != std::string::npos;
    if (listed && (least == nullptr || a.of_block < least->of_block)) least = &a;
  }
  if (least == nullptr) throw Error("none of the architectures " FASTLORA_CUDA_ARCHS " is known");
  return *least;
}

// ---- fibers ------------------------------------------------------------------------------------

void to_scheduler() {
  Machine& m = machine();
  Thread& thread = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(thread.state == State::done ? nullptr : &fake, m.outer_stack,
                                 m.outer_bytes);
  simt_switch(&thread.stack_pointer, m.scheduler_stack);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  simt_switch(&thread.stack_pointer, m.scheduler_stack);
#endif
}

void to_thread(int index) {
  Machine& m = machine();
  m.current = index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.outer_fake, self().stack.get(), kStackBytes);
  simt_switch(&m.scheduler_stack, self().stack_pointer);
  __sanitizer_finish_switch_fiber(m.outer_fake, nullptr, nullptr);
#else
  simt_switch(&m.scheduler_stack, self().stack_pointer);
#endif
  m.current = -1;
}

void fiber() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.outer_stack, &m.outer_bytes);
#endif
  try {
    (*m.body)();
    for (const auto& group : self().copies) {
      if (!group.empty()) fail("a thread ends before a cp.async of its own");
    }
  } catch (...) {
    m.error = std::current_exception();
  }
  self().state = State::done;
  to_scheduler();
}

void prepare(Thread& thread) {
  if (!thread.stack) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw Error("no memory for a fiber's stack");
    thread.stack.reset(static_cast<std::byte*>(stack));
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack.get(), kStackBytes);
#endif
  // Six registers, then the address that simt_switch returns to; a function expects its stack
  // pointer 8 bytes past a multiple of 16.
  void** top = reinterpret_cast<void**>(thread.stack.get() + kStackBytes) - 2;
  top[0] = reinterpret_cast<void*>(&fiber);
  thread.stack_pointer = top - 6;
  thread.state = State::running;
  thread.copies.assign(1, {});
}

void wait(State state, const char* where) {
  self().state = state;
  self().waits_in = where;
  to_scheduler();
}

// ---- asynchronous copies -----------------------------------------------------------------------

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::byte* to = machine().shared + copy.to;
  std::memcpy(to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(to + copy.bytes, 0, static_cast<size_t>(copy.size - copy.bytes));
}

// ---- scheduler ---------------------------------------------------------------------------------

std::string deadlock() {
  const Machine& m = machine();
  std::string text = "deadlock:";
  for (int i = 0; i < m.count; i++) {
    const Thread& thread = m.threads[static_cast<size_t>(i)];
    const char* where = thread.state == State::done ? "its end" : thread.waits_in;
    const bool news = i == 0 || where != (m.threads[static_cast<size_t>(i - 1)].state == State::done
                                              ? "its end"
                                              : m.threads[static_cast<size_t>(i - 1)].waits_in);
    if (news && text.size() < 400) text += " thread " + std::to_string(i) + " is in " + where + ";";
  }
  return text;
}

// Lets every warp go on as far as it can, or for a few steps, in an order of this block's own.
bool run_warps(bool backwards, bool shuffled, bool in_bursts) {
  Machine& m = machine();
  const int warps = (m.count + kWarp - 1) / kWarp;
  std::vector<int> order(static_cast<size_t>(warps));
  for (int w = 0; w < warps; w++) order[static_cast<size_t>(w)] = backwards ? warps - 1 - w : w;
  if (shuffled) std::shuffle(order.begin(), order.end(), m.random);
  bool progress = false;
  for (int warp : order) {
    int steps = in_bursts ? 1 + static_cast<int>(m.random() % 8) : 1 << 30;
    for (bool moved = true; moved && steps-- > 0;) {
      moved = false;
      for (int i = 0; i < kWarp; i++) {
        const int thread = warp * kWarp + (backwards ? kWarp - 1 - i : i);
        if (thread >= m.count) continue;
        if (m.threads[static_cast<size_t>(thread)].state != State::running) continue;
        to_thread(thread);
        if (m.error) std::rethrow_exception(m.error);
        moved = progress = true;
      }
    }
  }
  return progress;
}

void settle_banks() {
  Counters& counters = machine().counters;
  machine().banks.settle(counters.plain_turns, counters.plain_conflicts);
}

void run_block() {
  Machine& m = machine();
  m.counters.blocks++;
  std::memset(m.shared, 0xff, m.shared_bytes);  // NaN in every format
  m.races.reset(m.shared_bytes);
  for (int i = 0; i < m.count; i++) prepare(m.threads[static_cast<size_t>(i)]);
  const uint64_t mode = m.random() % 4;
  for (;;) {
    if (run_warps(mode == 1, mode >= 2, mode == 3)) continue;
    const auto in = [&](State state) {
      return std::count_if(m.threads.begin(), m.threads.begin() + m.count,
                           [&](const Thread& thread) { return thread.state == state; });
    };
    if (in(State::done) == m.count) break;
    if (in(State::at_barrier) != m.count) throw Error(deadlock());
    m.races.block_barrier();
    settle_banks();
    for (int i = 0; i < m.count; i++) m.threads[static_cast<size_t>(i)].state = State::running;
  }
  settle_banks();
}

}  // namespace

void launch(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  if (threads < 1 || threads > kMostThreads || threads % kWarp != 0) {
    throw Error("a block must have 32 to 1024 threads, in whole warps");
  }
  if (blocks < 1 || blocks > 0x7fffffff) throw Error("a grid must have 1 to 2^31 - 1 blocks");
  if (const Architecture& a = smallest(); shared_bytes > a.of_block * kKiB) {
    throw Error("a block asks for " + std::to_string(shared_bytes) +
                " bytes of shared memory, sm_" + std::to_string(a.sm) + " has " +
                std::to_string(a.of_block * kKiB));
  }
  const std::unique_ptr<std::byte, void (*)(void*)> shared{
      static_cast<std::byte*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024)),
      std::free};
  m.shared = shared.get();
  m.shared_bytes = shared_bytes;
  m.count = threads;
  m.body = &body;
  m.error = nullptr;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (int64_t i = 0; i < blocks; i++) order[static_cast<size_t>(i)] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (int64_t block : order) {
    m.block = block;
    run_block();
  }
}

void seed(uint64_t value) { machine().random.seed(value); }

void set_architecture(int sm) {
  for (const Architecture& a : kArchitectures) {
    if (a.sm == sm) machine().architecture = &a;
  }
}
const Architecture& architecture() { return *machine().architecture; }

int thread_index() { return machine().current; }
int block_index() { return static_cast<int>(machine().block); }
Counters& counters() { return machine().counters; }

void fail(const char* what) {
  throw Error("block " + std::to_string(machine().block) + ", thread " +
              std::to_string(machine().current) + ": " + what);
}

void block_barrier() { wait(State::at_barrier, "a block barrier"); }

void warp_collective(const char* name, void* operands, Execute execute) {
  Machine& m = machine();
  const int first = warp_of(m.current) * kWarp;
  self().operands = operands;
  void* all[kWarp];
  bool complete = true;
  for (int lane = 0; lane < kWarp; lane++) {
    const Thread& other = m.threads[static_cast<size_t>(first + lane)];
    const bool here = first + lane == m.current || other.state == State::at_warp;
    if (here && first + lane != m.current && std::strcmp(other.waits_in, name) != 0) {
      fail("lanes of one warp meet in different instructions");
    }
    complete = complete && here;
    all[lane] = other.operands;
  }
  if (!complete) return wait(State::at_warp, name);
  execute(all);
  for (int lane = 0; lane < kWarp; lane++) {
    m.threads[static_cast<size_t>(first + lane)].state = State::running;
  }
}

void* shared(uint32_t address, size_t bytes, Access access, int lane) {
  Machine& m = machine();
  if (address % bytes != 0) fail("shared memory: the address is no multiple of the size");
  if (address + bytes > m.shared_bytes) fail("shared memory: past its end");
  const int thread = lane < 0 ? m.current : warp_of(m.current) * kWarp + lane;
  const Accessor who{warp_of(thread), thread % kWarp};
  if (const char* fault = access == Access::write ? m.races.write(address, bytes, who)
                                                  : m.races.read(address, bytes, who)) {
    fail(fault);
  }
  return m.shared + address;
}

void count_access(uint32_t address, size_t bytes, const std::source_location& where) {
  machine().banks.access(machine().current, address, bytes, where);
}

void copy_async(uint32_t to, const void* from, int bytes, int size) {
  Machine& m = machine();
  if (bytes < 0 || bytes > size) fail("cp.async: more bytes than it copies");
  if (reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(size) != 0) {
    fail("cp.async: the source is not aligned");
  }
  shared(to, static_cast<size_t>(size), Access::write);
  m.races.begin_copy(to, static_cast<size_t>(size));
  m.counters.async_copies++;
  self().copies.back().push_back({to, from, bytes, size, false});
  if (m.random() % 2 == 0) land(self().copies.back().back());
}

void copy_async_commit() { self().copies.emplace_back(); }

void copy_async_wait(int left) {
  auto& groups = self().copies;
  while (groups.size() - 1 > static_cast<size_t>(left)) {
    for (Copy& copy : groups.front()) {
      land(copy);
      machine().races.end_copy(copy.to, static_cast<size_t>(copy.size), machine().current);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simt
