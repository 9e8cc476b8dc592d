// A byte string copied into pages and hashed where it lies then, in one go: nobody else's turn is asked for meanwhile.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "blake3.h"

using namespace loraplex;

// kernels.cpu.pages: what another thread sees of a copy.
struct Watch {
  Chained expected;
  int64_t ended;  // nanoseconds of the monotonic clock; 0 = not yet, or with other bytes
};

// The words of the call.
struct Copy {
  uint8_t* pool;
  int64_t page_bytes;
  const int64_t* pages;
  const uint8_t* data;
  int64_t num_bytes, lanes;
  Watch* watch;  // or null
  Chained digest;
};

namespace {

// Calls f(in the pages, offset, bytes) for each piece of [offset, offset + num_bytes) that lies in one page.
template <typename F>
void pieces(const Copy& copy, int64_t offset, int64_t num_bytes, F f) {
  for (int64_t end = offset + num_bytes; offset < end;) {
    const int64_t inside = offset % copy.page_bytes, length = std::min(copy.page_bytes - inside, end - offset);
    f(copy.pool + copy.pages[offset / copy.page_bytes] * copy.page_bytes + inside, offset, length);
    offset += length;
  }
}

}  // namespace

// Fills the pages; the tail of the last one is left as it is. `digest` is that of what the pages hold then.
extern "C" void loraplex_copy_hashed(Copy* copy) {
  const bool wide = copy->lanes == 16;
  const HashGroup hash_group = wide ? hash_group_avx512 : hash_group_avx2;
  const HashParents hash_parents = wide ? hash_parents_avx512 : hash_parents_avx2;
  const int64_t num_chunks = std::max<int64_t>(1, (copy->num_bytes + kChunkBytes - 1) / kChunkBytes);
  const bool cut = copy->page_bytes % kChunkBytes != 0;
  // Chunks that begin in one page and end in another, put together.
  std::vector<uint8_t> mended(cut ? kGroupChunks * kChunkBytes : 0);
  std::vector<Chained> groups;
  for (int64_t first = 0; first < num_chunks; first += kGroupChunks) {
    const int64_t count = std::min(kGroupChunks, num_chunks - first), begin = first * kChunkBytes;
    const int64_t length = std::min(count * kChunkBytes, copy->num_bytes - begin);
    pieces(*copy, begin, length, [&](uint8_t* held, int64_t offset, int64_t size) {
      std::memcpy(held, copy->data + offset, size);
    });
    const uint8_t* chunks[kGroupChunks];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = i * kChunkBytes, size = std::min(kChunkBytes, length - start);
      chunks[i] = mended.data() + start;
      pieces(*copy, begin + start, size, [&](uint8_t* held, int64_t offset, int64_t part) {
        if (part == size)
          chunks[i] = held;
        else
          std::memcpy(mended.data() + (offset - begin), held, part);
      });
    }
    const int64_t last_bytes = length - (count - 1) * kChunkBytes;
    groups.push_back(hash_group(chunks, count, last_bytes, first, num_chunks <= kGroupChunks));
  }
  copy->digest = groups.size() > 1 ? hash_parents(groups.data(), groups.size()) : groups[0];
  Watch* watch = copy->watch;
  if (watch && !std::memcmp(&watch->expected, &copy->digest, sizeof(Chained))) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    // Last: who sees it may take the pages.
    __atomic_store_n(&watch->ended, std::chrono::nanoseconds(now).count(), __ATOMIC_RELEASE);
  }
}
