// What one call multiplies: rows of x by a few rows of A. Every output element is the sum of eight lanes, each one chain
// over in_features, whatever tile it is in and whatever the vectors: its bits depend on its row of x and its row of A.
#pragma once

#include <type_traits>

#include "../cpu/vectors.h"

namespace loraplex {

constexpr int kRanks = 4;      // rows of A side by side
constexpr int kManyRanks = 8;  // the same with AVX-512, for several tokens

struct ShrinkRows {
  const float* x;               // [tokens, in_features]
  const void* const* a;         // `ranks` rows: one, kRanks or, only for shrink_many_avx512, kManyRanks
  const uint8_t* const* ahead;  // null, or as many rows that are fetched meanwhile
  float* out;                   // [tokens, out_stride], of which the first `ranks` columns
  int64_t tokens, in_features, out_stride;
  int32_t ranks, a_dtype;
};

// In a translation unit of its own, compiled for its instruction set.
void shrink_many_avx512(const ShrinkRows& rows);

}  // namespace loraplex
