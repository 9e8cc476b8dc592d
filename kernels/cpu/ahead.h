// What a thread is going to read, so that it can be fetched while something else is computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace loraplex {

class Ahead {
 public:
  void clear() { blocks_.clear(), next_ = 0; }
  void add(const uint8_t* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kBlockBytes) blocks_.push_back(from + at);
  }
  // The next block into the second-level cache, if there is one.
  void fetch() {
    if (next_ == blocks_.size()) return;
    const uint8_t* block = blocks_[next_++];
#pragma GCC unroll 16
    for (int64_t at = 0; at < kBlockBytes; at += 64) __builtin_prefetch(block + at, 0, 2);
  }

 private:
  static constexpr int64_t kBlockBytes = 1024;

  std::vector<const uint8_t*> blocks_;
  size_t next_ = 0;
};

}  // namespace loraplex
