// BLAKE3 in vectors: each lane compresses a chunk, or a parent, of its own. Included once for each width of vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "blake3.h"

namespace loraplex {
namespace {

constexpr uint32_t kChunkStart = 1, kChunkEnd = 2, kParent = 4, kRoot = 8;

constexpr uint32_t kInitial[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                  0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
constexpr int kRounds = 7, kBlockBytes = 64;
// The words of a block in the order in which each round takes them: every row is the one before, permuted.
constexpr uint8_t kOrder[kRounds][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13}};

template <int kLanes>
struct Lanes;
template <>
struct Lanes<8> {
  typedef uint32_t Words __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
  typedef uint32_t Words __attribute__((vector_size(64)));
};

template <int kLanes>
struct Blake3 {
  using Words = typename Lanes<kLanes>::Words;

  static Words all(uint32_t x) { return Words{} + x; }
  template <int kBits>
  static Words rotated(Words x) {
    return (x >> kBits) | (x << (32 - kBits));
  }

  static void mix(Words (&v)[16], int a, int b, int c, int d, Words x, Words y) {
    v[a] += v[b] + x;
    v[d] = rotated<16>(v[d] ^ v[a]);
    v[c] += v[d];
    v[b] = rotated<12>(v[b] ^ v[c]);
    v[a] += v[b] + y;
    v[d] = rotated<8>(v[d] ^ v[a]);
    v[c] += v[d];
    v[b] = rotated<7>(v[b] ^ v[c]);
  }

  // `length` of the block in bytes, `flags` the same for every lane.
  static void compress(Words (&chained)[8], const Words (&block)[16], Words low, Words high, uint32_t length,
                       uint32_t flags) {
    Words v[16];
    for (int i = 0; i < 8; ++i) v[i] = chained[i];
    for (int i = 0; i < 4; ++i) v[8 + i] = all(kInitial[i]);
    v[12] = low, v[13] = high, v[14] = all(length), v[15] = all(flags);
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; ++round) {
      const uint8_t* m = kOrder[round];
      mix(v, 0, 4, 8, 12, block[m[0]], block[m[1]]);
      mix(v, 1, 5, 9, 13, block[m[2]], block[m[3]]);
      mix(v, 2, 6, 10, 14, block[m[4]], block[m[5]]);
      mix(v, 3, 7, 11, 15, block[m[6]], block[m[7]]);
      mix(v, 0, 5, 10, 15, block[m[8]], block[m[9]]);
      mix(v, 1, 6, 11, 12, block[m[10]], block[m[11]]);
      mix(v, 2, 7, 8, 13, block[m[12]], block[m[13]]);
      mix(v, 3, 4, 9, 14, block[m[14]], block[m[15]]);
    }
    for (int i = 0; i < 8; ++i) chained[i] = v[i] ^ v[i + 8];
  }

  // Lanes of a, and behind them those of b.
  template <int... kLane>
  static Words lanes_of(Words a, Words b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, kLane...);
#else
    return __builtin_shuffle(a, b, Words{kLane...});
#endif
  }

  // Exchanges bit kStride of the row with that of the column in a square of rows.
  template <int kStride, int... kLane>
  static void exchange(Words* rows, std::integer_sequence<int, kLane...>) {
    for (int i = 0; i < kLanes; ++i)
      if (!(i & kStride)) {
        const Words a = rows[i], b = rows[i | kStride];
        rows[i] = lanes_of<(kLane & kStride ? kLanes + kLane - kStride : kLane)...>(a, b);
        rows[i | kStride] = lanes_of<(kLane & kStride ? kLanes + kLane : kLane + kStride)...>(a, b);
      }
  }
  static void transpose(Words* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    exchange<1>(rows, lanes);
    exchange<2>(rows, lanes);
    exchange<4>(rows, lanes);
    if constexpr (kLanes > 8) exchange<8>(rows, lanes);
  }

  // Word i of the block of every lane.
  static void gather(Words (&block)[16], const uint8_t* const* lanes, int64_t offset) {
    for (int first = 0; first < 16; first += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(&block[first + lane], lanes[lane] + offset + 4 * first, sizeof(Words));
      transpose(block + first);
    }
  }

  static void scatter(const Words (&chained)[8], Chained* out, int count) {
    for (int lane = 0; lane < count; ++lane)
      for (int i = 0; i < 8; ++i) out[lane].words[i] = chained[i][lane];
  }

  static void start(Words (&chained)[8]) {
    for (int i = 0; i < 8; ++i) chained[i] = all(kInitial[i]);
  }

  // Up to kLanes whole chunks; a lane without one does the work of the first again.
  static void chunks(const uint8_t* const* of, int count, uint64_t first, uint32_t root, Chained* out) {
    const uint8_t* lanes[kLanes];
    Words chained[8], block[16], low = all(0), high = all(0);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int own = lane < count ? lane : 0;
      lanes[lane] = of[own];
      low[lane] = static_cast<uint32_t>(first + own), high[lane] = static_cast<uint32_t>((first + own) >> 32);
    }
    start(chained);
    for (int64_t offset = 0; offset < kChunkBytes; offset += kBlockBytes) {
      const bool ends = offset + kBlockBytes == kChunkBytes;
      gather(block, lanes, offset);
      compress(chained, block, low, high, kBlockBytes, (offset ? 0 : kChunkStart) | (ends ? kChunkEnd | root : 0));
    }
    scatter(chained, out, count);
  }

  // One chunk that may be short, or empty.
  static Chained last_chunk(const uint8_t* bytes, int64_t num_bytes, uint64_t number, uint32_t root) {
    Words chained[8], words[16];
    start(chained);
    for (int64_t offset = 0; offset == 0 || offset < num_bytes; offset += kBlockBytes) {
      const int64_t length = std::min<int64_t>(kBlockBytes, num_bytes - offset);
      uint32_t block[16] = {};
      std::memcpy(block, bytes + offset, length);
      for (int i = 0; i < 16; ++i) words[i] = all(block[i]);
      const bool ends = offset + kBlockBytes >= num_bytes;
      compress(chained, words, all(static_cast<uint32_t>(number)), all(static_cast<uint32_t>(number >> 32)), length,
               (offset ? 0 : kChunkStart) | (ends ? kChunkEnd | root : 0));
    }
    Chained out;
    scatter(chained, &out, 1);
    return out;
  }

  // Level by level, two by two; one that is left over goes up as it is. That is the tree of the paper.
  static Chained parents(Chained* nodes, int64_t count, bool root) {
    for (; count > 1; count = (count + 1) / 2) {
      const int64_t pairs = count / 2;
      for (int64_t first = 0; first < pairs; first += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(kLanes, pairs - first));
        const uint8_t* lanes[kLanes];
        Words chained[8], block[16];
        for (int lane = 0; lane < kLanes; ++lane)
          lanes[lane] = reinterpret_cast<const uint8_t*>(nodes + 2 * (first + (lane < width ? lane : 0)));
        start(chained);
        gather(block, lanes, 0);
        compress(chained, block, all(0), all(0), kBlockBytes, kParent | (root && count == 2 ? kRoot : 0));
        scatter(chained, nodes + first, width);
      }
      if (count % 2) nodes[pairs] = nodes[count - 1];
    }
    return nodes[0];
  }

  static Chained group(const uint8_t* const* of, int64_t count, int64_t last_bytes, uint64_t first, bool root) {
    Chained nodes[kGroupChunks];
    const int64_t whole = last_bytes == kChunkBytes ? count : count - 1;
    const uint32_t alone = root && count == 1 ? kRoot : 0;
    for (int64_t done = 0; done < whole; done += kLanes)
      chunks(of + done, static_cast<int>(std::min<int64_t>(kLanes, whole - done)), first + done, alone, nodes + done);
    if (whole < count) nodes[whole] = last_chunk(of[whole], last_bytes, first + whole, alone);
    return parents(nodes, count, root);
  }
};

}  // namespace
}  // namespace loraplex
