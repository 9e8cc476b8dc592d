// The narrow product with vectors of sixteen. Only called where the CPU has AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "../cpu/vectors512.h"
#include "tile.h"

namespace loraplex {

void shrink_avx512(const ShrinkRows& rows) {
  // sums + x + 1 of A: 28 or 31 of 32 registers. The tile of few tokens reads less of x, which the first-level cache
  // does not hold, and more of A, which it does.
  if (rows.ranks == kWideRanks) return shrink<Vector16, 3, kWideRanks>(rows);
  if (rows.ranks == kRanks) return shrink<Vector16, 6, kRanks>(rows);
  shrink<Vector16, 6, 1>(rows);
}

}  // namespace loraplex
