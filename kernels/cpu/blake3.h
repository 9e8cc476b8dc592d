// BLAKE3 of bytes that are not in one piece: see blake3_lanes.h. Source: O'Connor, Aumasson, Neves, Wilcox-O'Hearn,
// "BLAKE3: one function, fast everywhere", sections 2 and 5.3.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kChunkBytes = 1024, kGroupChunks = 256;

// A chaining value: the root's is the digest.
struct Chained {
  uint32_t words[8];
};

// The hash of a whole tree over `count` chunks of `kChunkBytes` each, the last of `last_bytes`: `chunks[i]` points to the
// i-th, which is the `first`-th of the string. At most kGroupChunks; `root` where nothing else follows or went before.
using HashGroup = Chained (*)(const uint8_t* const* chunks, int64_t count, int64_t last_bytes, uint64_t first, bool root);
// The hash of a tree whose leaves are there; they are overwritten.
using HashParents = Chained (*)(Chained* leaves, int64_t count);

Chained hash_group_avx2(const uint8_t* const* chunks, int64_t count, int64_t last_bytes, uint64_t first, bool root);
Chained hash_group_avx512(const uint8_t* const* chunks, int64_t count, int64_t last_bytes, uint64_t first, bool root);
Chained hash_parents_avx2(Chained* leaves, int64_t count);
Chained hash_parents_avx512(Chained* leaves, int64_t count);

}  // namespace loraplex
