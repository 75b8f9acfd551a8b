// Counts how often lanes of a warp meet in a bank of shared memory.
//
// Memory has 32 banks of four bytes. Lanes that read or write 4 bytes are served together, of 8 bytes
// sixteen at a time, of 16 bytes eight: each such phase takes one turn, and one more for every
// further word that a bank is asked for.
//
// Threads of the emulation run one after another. Lanes that come to one place in the source for the
// same time since the last barrier are taken to execute one instruction.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <source_location>
#include <tuple>
#include <vector>

namespace simt {

class Banks {
 public:
  void access(int thread, uint32_t address, size_t bytes, const std::source_location& where) {
    const auto warp = static_cast<size_t>(thread / kLanes),
               lane = static_cast<size_t>(thread % kLanes);
    if (warps_.size() <= warp) warps_.resize(warp + 1);
    Place& place = warps_[warp][{where.file_name(), where.line(), where.column()}];
    const size_t time = place.times[lane]++;
    if (place.instructions.size() <= time) place.instructions.resize(time + 1);
    Instruction& instruction = place.instructions[time];
    instruction.bytes = bytes;
    instruction.address[lane] = address;
    instruction.active |= 1u << lane;
  }

  // At a barrier: adds what was executed since the last one to the turns that it would take without
  // conflicts and to those that come on top.
  void settle(int64_t& turns, int64_t& conflicts) {
    for (auto& places : warps_) {
      for (const auto& [where, place] : places) {
        for (const Instruction& instruction : place.instructions) {
          const size_t lanes = kLanes / std::max<size_t>(1, instruction.bytes / kWord);
          for (size_t first = 0; first < kLanes; first += lanes) {
            const int64_t taken = turns_of(instruction, first, lanes);
            turns += taken > 0;
            conflicts += std::max<int64_t>(0, taken - 1);
          }
        }
      }
      places.clear();
    }
  }

 private:
  static constexpr size_t kLanes = 32, kBanks = 32, kWord = 4;
  struct Instruction {
    size_t bytes = 0;
    uint32_t active = 0;
    std::array<uint32_t, kLanes> address{};
  };
  struct Place {
    std::array<size_t, kLanes> times{};
    std::vector<Instruction> instructions;
  };

  static int64_t turns_of(const Instruction& instruction, size_t first, size_t lanes) {
    std::array<std::vector<uint32_t>, kBanks> asked;
    size_t most = 0;
    for (size_t lane = first; lane < first + lanes; lane++) {
      if (!(instruction.active >> lane & 1)) continue;
      for (size_t word = instruction.address[lane] / kWord;
           word < (instruction.address[lane] + instruction.bytes) / kWord; word++) {
        auto& words = asked[word % kBanks];
        const auto value = static_cast<uint32_t>(word);
        if (std::find(words.begin(), words.end(), value) == words.end()) words.push_back(value);
        most = std::max(most, words.size());
      }
    }
    return static_cast<int64_t>(most);
  }

  std::vector<std::map<std::tuple<const char*, uint32_t, uint32_t>, Place>> warps_;
};

}  // namespace simt
