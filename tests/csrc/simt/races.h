// Finds accesses of shared memory that no barrier orders.
//
// Between two block barriers, threads may come in any order: a word that one thread writes may not
// be read or written by another in the same interval. A cp.async is a write under way until its
// thread has waited for it. Warp-wide instructions order no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

struct Accessor {
  int warp, lane;
};

class Races {
 public:
  void reset(size_t shared_bytes) { words_.assign((shared_bytes + 3) / 4, {}), interval_ = 1; }
  void block_barrier() { interval_++; }

  // Null, or what is wrong.
  const char* read(uint32_t address, size_t bytes, Accessor who) {
    const int thread = id(who);
    for (size_t i = address / 4; i < (address + bytes + 3) / 4; i++) {
      Word& word = words_[i];
      if (word.copying) return "race: a read while cp.async is under way";
      if (word.write_interval == interval_ && word.writer != thread) {
        return "race: a read with no barrier after another thread's write";
      }
      const bool again = word.read_interval == interval_;
      word.reader = again && word.reader != thread ? kMany : thread;
      word.read_interval = interval_;
    }
    return nullptr;
  }

  const char* write(uint32_t address, size_t bytes, Accessor who) {
    const int thread = id(who);
    for (size_t i = address / 4; i < (address + bytes + 3) / 4; i++) {
      Word& word = words_[i];
      if (word.copying) return "race: a write while cp.async is under way";
      if (word.write_interval == interval_ && word.writer != thread) {
        return "race: a write with no barrier after another thread's write";
      }
      if (word.read_interval == interval_ && word.reader != thread) {
        return "race: a write with no barrier after another thread's read";
      }
      word.writer = thread;
      word.write_interval = interval_;
    }
    return nullptr;
  }

  // After write(): the `bytes` at `address` are under way.
  void begin_copy(uint32_t address, size_t bytes) {
    for (size_t i = address / 4; i < (address + bytes) / 4; i++) words_[i].copying = true;
  }
  // They have arrived for `thread`, and for others after the next barrier.
  void end_copy(uint32_t address, size_t bytes, int thread) {
    for (size_t i = address / 4; i < (address + bytes) / 4; i++) {
      words_[i].copying = false;
      words_[i].writer = thread;
      words_[i].write_interval = interval_;
    }
  }

 private:
  static constexpr int kMany = -1;
  struct Word {
    uint32_t write_interval = 0, read_interval = 0;
    int writer = 0, reader = 0;
    bool copying = false;
  };
  static int id(Accessor who) { return who.warp * 32 + who.lane; }

  std::vector<Word> words_;
  uint32_t interval_ = 1;
};

}  // namespace simt
