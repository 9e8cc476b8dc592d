// BLAKE3 with vectors of sixteen. Only called where the CPU has AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "blake3_lanes.h"

namespace loraplex {

Chained hash_group_avx512(const uint8_t* const* chunks, int64_t count, int64_t last_bytes, uint64_t first, bool root) {
  return Blake3<16>::group(chunks, count, last_bytes, first, root);
}
Chained hash_parents_avx512(Chained* leaves, int64_t count) { return Blake3<16>::parents(leaves, count, true); }

}  // namespace loraplex
