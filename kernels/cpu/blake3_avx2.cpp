// BLAKE3 with vectors of eight.
#include "blake3_lanes.h"

namespace loraplex {

Chained hash_group_avx2(const uint8_t* const* chunks, int64_t count, int64_t last_bytes, uint64_t first, bool root) {
  return Blake3<8>::group(chunks, count, last_bytes, first, root);
}
Chained hash_parents_avx2(Chained* leaves, int64_t count) { return Blake3<8>::parents(leaves, count, true); }

}  // namespace loraplex
