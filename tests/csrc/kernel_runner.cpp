// Runs the CPU kernels, without torch, on calls that a test has written to a file.
//
//     kernel_runner CALLS RESULTS [emulated-amx]
//
// prints the instruction set, which FASTLORA_CPU_ISA chooses; emulated-amx takes amx_emulated.cpp's.
//
// A call is an int64 that names the kernel, then the fields of its struct in the order in which they
// are read below: int64, float64, or an array as int64 bytes and its data (0 bytes: null). A result is
// an array written in the same way. tests/kernel_calls.py writes the one and reads the other.
//
// Each array ends where the next page may not be touched, so that reading or writing past it is a
// fault, and outputs start as NaN. Tiles run one by one and backwards: none may count on an earlier one.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "cpu/linear/experts.h"
#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"

namespace fastlora {

#if defined(__x86_64__)
namespace amx_emulated {
void multiply(const TileProduct<uint32_t>& product);
}
#endif

namespace {

Level level;  // what runs
TileSizes tiles;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "kernel_runner: %s\n", what);
  std::exit(2);
}

class Array {
  char* pages_ = nullptr;
  size_t mapped_ = 0, bytes_ = 0;
  char* data_ = nullptr;

 public:
  explicit Array(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes + page - 1) / page * page;
    mapped_ = used + page;
    void* memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    pages_ = static_cast<char*>(memory);
    if (mprotect(pages_ + used, page, PROT_NONE) != 0) fail("mprotect");
    data_ = pages_ + used - bytes;
    std::memset(data_, 0xff, bytes);
  }
  Array(Array&& other) noexcept
      : pages_(std::exchange(other.pages_, nullptr)),
        mapped_(other.mapped_),
        bytes_(other.bytes_),
        data_(other.data_) {}
  ~Array() {
    if (pages_) munmap(pages_, mapped_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
};

// The call that is being read, and the memory that it needs.
class Call {
  std::FILE* calls_;
  std::FILE* results_;
  std::vector<Array> inputs_, outputs_;

  void read(void* to, size_t bytes) {
    if (bytes && std::fread(to, bytes, 1, calls_) != 1) fail("the calls end too early");
  }

 public:
  Call(std::FILE* calls, std::FILE* results) : calls_(calls), results_(results) {}

  int64_t integer() {
    int64_t value;
    read(&value, sizeof value);
    return value;
  }
  float real() {
    double value;
    read(&value, sizeof value);
    return static_cast<float>(value);
  }
  DType dtype() { return static_cast<DType>(integer()); }
  template <class T>
  const T* array() {
    inputs_.emplace_back(static_cast<size_t>(integer()));
    read(inputs_.back().data(), inputs_.back().bytes());
    return static_cast<const T*>(inputs_.back().data());
  }
  // Null if the call does not ask for it.
  template <class T>
  T* output(int64_t elements, int64_t size) {
    outputs_.emplace_back(integer() ? static_cast<size_t>(elements * size) : 0);
    return static_cast<T*>(outputs_.back().data());
  }
  void write() {
    for (const Array& array : outputs_) {
      const int64_t bytes = static_cast<int64_t>(array.bytes());
      std::fwrite(&bytes, sizeof bytes, 1, results_);
      if (bytes) std::fwrite(array.data(), array.bytes(), 1, results_);
    }
  }
};

const ParallelFor kBackwards = {
    [](int64_t tiles, int64_t, void (*body)(const void*, int64_t, int64_t), const void* context) {
      for (int64_t i = tiles; i-- > 0;) body(context, i, i + 1);
    }};

Quant4bit read_quant(Call& call) {
  Quant4bit q{};
  q.packed = call.array<uint8_t>();
  q.code = call.array<float>();
  q.blocksize = call.integer();
  q.absmax = call.array<float>();
  q.absmax_8bit = call.array<uint8_t>();
  q.nested_code = call.array<float>();
  q.nested_absmax = call.array<float>();
  q.nested_offset = call.array<float>();
  return q;
}

Weight read_weight(Call& call) {
  Weight weight{};
  weight.N = call.integer();
  weight.K = call.integer();
  weight.dense = call.array<void>();
  weight.transposed = call.integer() != 0;
  weight.quant = read_quant(call);
  weight.compute_dtype = call.dtype();
  return weight;
}

Dropout read_dropout(Call& call) {
  Dropout dropout{};
  dropout.threshold = static_cast<uint32_t>(call.integer());
  dropout.scale = call.real();
  dropout.key = call.array<uint32_t>();
  return dropout;
}

// A layer, or a stack of experts, whose arrays hold one expert after the other.
LoraLinearFwd read_forward(Call& call) {
  LoraLinearFwd p{};
  p.tiles = tiles;
  p.M = call.integer();
  p.R = call.integer();
  p.weight = read_weight(call);
  p.x_dtype = call.dtype();
  p.adapter_dtype = call.dtype();
  p.bias_dtype = p.x_dtype;
  p.x = call.array<void>();
  p.ldx = call.integer();
  p.bias = call.array<void>();
  p.lora_A = call.array<void>();
  p.lora_B = call.array<void>();
  p.scaling = call.real();
  p.dropout = read_dropout(call);
  p.y = call.output<void>(p.M * p.weight.N, size_of(p.x_dtype));
  p.S = call.output<float>(p.M * p.R, sizeof(float));
  return p;
}

LoraLinearBwd read_backward(Call& call, int64_t experts) {
  LoraLinearBwd p{};
  p.tiles = tiles;
  p.M = call.integer();
  p.R = call.integer();
  p.weight = read_weight(call);
  p.x_dtype = call.dtype();
  p.adapter_dtype = call.dtype();
  p.dy = call.array<void>();
  p.lddy = call.integer();
  p.x = call.array<void>();
  p.ldx = call.integer();
  p.lora_A = call.array<void>();
  p.lora_B = call.array<void>();
  p.S = call.array<float>();
  p.scaling = call.real();
  p.dropout = read_dropout(call);
  p.dx = call.output<void>(p.M * p.weight.K, size_of(p.x_dtype));
  p.dA = call.output<float>(experts * p.R * p.weight.K, sizeof(float));
  p.dB = call.output<float>(experts * p.weight.N * p.R, sizeof(float));
  p.dbias = call.output<float>(p.weight.N, sizeof(float));
  return p;
}

void lora_linear_fwd(Call& call) {
  const LoraLinearFwd p = read_forward(call);
  level.lora_linear_fwd({&p, 1}, kBackwards);
}

void lora_linear_bwd(Call& call) {
  const LoraLinearBwd p = read_backward(call, 1);
  level.lora_linear_bwd({&p, 1}, kBackwards);
}

// Two threads, for the schedule: the longest experts get both, the others one each.
const Threads kThreads = {2, kBackwards, kBackwards};

Segments read_segments(Call& call) {
  const int64_t experts = call.integer();
  return segments_of(call.array<int64_t>(), experts);
}

void grouped_lora_linear_fwd(Call& call) {
  const Segments segments = read_segments(call);
  each_expert_fwd(level, read_forward(call), segments, kThreads);
}

void grouped_lora_linear_bwd(Call& call) {
  const Segments segments = read_segments(call);
  const int64_t experts = static_cast<int64_t>(segments.list.size());
  each_expert_bwd(level, read_backward(call, experts), segments, kThreads);
}

void lora_embedding_fwd(Call& call) {
  LoraEmbeddingFwd p{};
  p.M = call.integer();
  p.N = call.integer();
  p.R = call.integer();
  p.V = call.integer();
  p.dtype = call.dtype();
  p.adapter_dtype = call.dtype();
  p.ids = call.array<int64_t>();
  p.weight = call.array<void>();
  p.lora_A = call.array<void>();
  p.lora_B = call.array<void>();
  p.weight_scale = call.real();
  p.scaling = call.real();
  p.y = call.output<void>(p.M * p.N, size_of(p.dtype));
  level.lora_embedding_fwd(p, kBackwards);
}

void lora_embedding_bwd(Call& call) {
  LoraEmbeddingBwd p{};
  p.M = call.integer();
  p.N = call.integer();
  p.R = call.integer();
  p.V = call.integer();
  p.dtype = call.dtype();
  p.adapter_dtype = call.dtype();
  p.dy = call.array<void>();
  p.lddy = call.integer();
  p.ids = call.array<int64_t>();
  p.lora_A = call.array<void>();
  p.lora_B = call.array<void>();
  p.scaling = call.real();
  p.padding_idx = call.integer();
  p.dA = call.output<float>(p.R * p.V, sizeof(float));
  p.dB = call.output<float>(p.N * p.R, sizeof(float));
  level.lora_embedding_bwd(p, kBackwards);
}

void quantize_4bit(Call& call) {
  Quantize4bit p{};
  p.elements = call.integer();
  p.blocksize = call.integer();
  p.dtype = call.dtype();
  p.weight = call.array<void>();
  p.bounds = call.array<float>();
  p.order = call.array<uint8_t>();
  p.packed = call.output<uint8_t>((p.elements + 1) / 2, 1);
  p.absmax = call.output<float>((p.elements + p.blocksize - 1) / p.blocksize, sizeof(float));
  level.quantize_4bit(p, kBackwards);
}

void dequantize_4bit(Call& call) {
  Dequantize4bit p{};
  p.elements = call.integer();
  p.quant = read_quant(call);
  p.dtype = call.dtype();
  p.out = call.output<void>(p.elements, size_of(p.dtype));
  level.dequantize_4bit(p, kBackwards);
}

void dora_norm(Call& call) {
  DoraNorm p{};
  p.R = call.integer();
  p.weight = read_weight(call);
  p.adapter_dtype = call.dtype();
  p.lora_A = call.array<void>();
  p.lora_B = call.array<void>();
  p.scaling = call.real();
  p.norms = call.output<float>(p.weight.N, sizeof(float));
  level.dora_norm(p, kBackwards);
}

void dora_magnitude_fwd(Call& call) {
  DoraMagnitudeFwd p{};
  p.M = call.integer();
  p.N = call.integer();
  p.dtype = call.dtype();
  p.rest_dtype = call.dtype();
  p.z = call.array<void>();
  p.ldz = call.integer();
  p.factor = call.array<float>();
  p.rest = call.array<void>();
  p.ldrest = call.integer();
  p.y = call.output<void>(p.M * p.N, size_of(p.dtype));
  level.dora_magnitude_fwd(p, kBackwards);
}

void dora_magnitude_bwd(Call& call) {
  DoraMagnitudeBwd p{};
  p.M = call.integer();
  p.N = call.integer();
  p.dtype = call.dtype();
  p.dy = call.array<void>();
  p.lddy = call.integer();
  p.z = call.array<void>();
  p.ldz = call.integer();
  p.factor = call.array<float>();
  p.dz = call.output<void>(p.M * p.N, size_of(p.dtype));
  p.dfactor = call.output<float>(p.N, sizeof(float));
  p.drest = call.output<float>(p.N, sizeof(float));
  level.dora_magnitude_bwd(p, kBackwards);
}

void dora_dropout_fwd(Call& call) {
  DoraDropoutFwd p{};
  p.M = call.integer();
  p.K = call.integer();
  p.dtype = call.dtype();
  p.x = call.array<void>();
  p.ldx = call.integer();
  p.dropout = read_dropout(call);
  p.kept = call.output<void>(p.M * p.K, size_of(p.dtype));
  p.rest = call.output<void>(p.M * p.K, size_of(p.dtype));
  level.dora_dropout_fwd(p, kBackwards);
}

void dora_dropout_bwd(Call& call) {
  DoraDropoutBwd p{};
  p.M = call.integer();
  p.K = call.integer();
  p.dtype = call.dtype();
  p.dkept = call.array<void>();
  p.lddkept = call.integer();
  p.drest = call.array<void>();
  p.lddrest = call.integer();
  p.dropout = read_dropout(call);
  p.dx = call.output<void>(p.M * p.K, size_of(p.dtype));
  level.dora_dropout_bwd(p, kBackwards);
}

void (*const kRun[])(Call&) = {
#define FASTLORA_KERNEL(name, Params) name,
    FASTLORA_KERNELS(FASTLORA_KERNEL)
#undef FASTLORA_KERNEL
        grouped_lora_linear_fwd,
    grouped_lora_linear_bwd};

void choose([[maybe_unused]] bool emulated_amx) {
  level = kernels();
  if (emulated_amx) {
#if defined(__x86_64__)
    level = *level_named("amx");
    level.pair_product = amx_emulated::multiply;
#else
    fail("AMX is emulated on x86-64 only");
#endif
  }
  tiles = default_tile_sizes(level.isa, cache_sizes());
}

int run(const char* calls_path, const char* results_path) {
  std::FILE* calls = std::fopen(calls_path, "rb");
  std::FILE* results = std::fopen(results_path, "wb");
  if (!calls || !results) fail("CALLS can't be read or RESULTS can't be written");
  for (int64_t kernel; std::fread(&kernel, sizeof kernel, 1, calls) == 1;) {
    if (kernel < 0 || kernel >= static_cast<int64_t>(std::size(kRun))) fail("no such kernel");
    Call call(calls, results);
    kRun[kernel](call);
    call.write();
  }
  std::fclose(calls);
  if (std::fclose(results) != 0) fail("RESULTS can't be written");
  std::puts(level.isa);
  return 0;
}

}  // namespace
}  // namespace fastlora

int main(int argc, char** argv) {
  const bool emulated_amx = argc == 4 && std::strcmp(argv[3], "emulated-amx") == 0;
  if (argc != 3 && !emulated_amx) {
    std::fprintf(stderr, "usage: kernel_runner CALLS RESULTS [emulated-amx]\n");
    return 2;
  }
  fastlora::choose(emulated_amx);
  return fastlora::run(argv[1], argv[2]);
}
