// y = x W^T + bias with a weight in panels. Every output element is one chain of fused multiply-adds over k in rising
// order from 0, whatever tile it is in: its bits depend on its row of x, its row of W and its bias, on nothing else.
#include <algorithm>
#include <type_traits>

#include "../cpu/simd.h"

namespace loraplex {
namespace {

constexpr int kPanel = 16;          // columns of a panel: two vectors
constexpr int kRows = 6;            // 6 x 2 accumulators + 2 of the weight + 1 of x = 15 of 16 registers
constexpr int64_t kGroup = 4;       // panels of a task
constexpr int64_t kBlockK = 256;    // a panel's block is 16 KiB of float32: it stays in the first-level cache
constexpr int64_t kBlockRows = 192; // x's block is 192 KiB: it stays in the second-level cache

template <typename W>
struct Linear {
  const float* x;       // [rows, in_features], rows x_stride apart
  const W* weight;      // [panels][in_features][16]
  const float* bias;    // [out_features] or null
  float* out;           // [rows, out_features]
  int64_t rows, x_stride, in_features, out_features;

  int64_t panels() const { return (out_features + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return std::min<int64_t>(kPanel, out_features - panel * kPanel); }
};

// Rows [row, row + R) by panels [panel, panel + P): goes on with what `out` holds when k0 > 0, adds the bias at the end.
template <int R, int P, typename W>
void tile(const Linear<W>& op, int64_t row, int64_t panel, int64_t k0, int64_t k1) {
  __m256 sums[R][2 * P];
  float* out = op.out + row * op.out_features + panel * kPanel;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) {
      const int lanes = static_cast<int>(op.width(panel + v / 2)) - v % 2 * kLanes;
      sums[r][v] = k0 == 0 || lanes <= 0 ? _mm256_setzero_ps() : load_first(out + r * op.out_features + v * kLanes, lanes);
    }
  const float* x = op.x + row * op.x_stride;
  const W* weight = op.weight + panel * op.in_features * kPanel;
  for (int64_t k = k0; k < k1; ++k) {
    __m256 w[2 * P];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) w[v] = load(weight + (v / 2 * op.in_features + k) * kPanel + v % 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_broadcast_ss(x + r * op.x_stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < 2 * P; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
    }
  }
  const bool add_bias = op.bias && k1 == op.in_features;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) {
      const int lanes = static_cast<int>(op.width(panel + v / 2)) - v % 2 * kLanes;
      if (lanes <= 0) continue;
      __m256 y = sums[r][v];
      if (add_bias) y = _mm256_add_ps(y, load_first(op.bias + panel * kPanel + v * kLanes, lanes));
      store_first(out + r * op.out_features + v * kLanes, y, lanes);
    }
}

template <int R, int P, typename W>
void panels_of_rows(const Linear<W>& op, int64_t row, int64_t begin, int64_t end, int64_t k0, int64_t k1) {
  int64_t panel = begin;
  for (; panel + P <= end; panel += P) tile<R, P>(op, row, panel, k0, k1);
  for (; panel < end; ++panel) tile<R, 1>(op, row, panel, k0, k1);
}

// Fewer rows take more panels at once, so that enough chains are in flight.
template <typename W>
void few_rows(const Linear<W>& op, int64_t row, int64_t count, int64_t begin, int64_t end, int64_t k0, int64_t k1) {
  switch (count) {
    case 1: return panels_of_rows<1, 4>(op, row, begin, end, k0, k1);
    case 2: return panels_of_rows<2, 2>(op, row, begin, end, k0, k1);
    case 3: return panels_of_rows<3, 2>(op, row, begin, end, k0, k1);
    case 4: return panels_of_rows<4, 1>(op, row, begin, end, k0, k1);
    case 5: return panels_of_rows<5, 1>(op, row, begin, end, k0, k1);
    default: return panels_of_rows<6, 1>(op, row, begin, end, k0, k1);
  }
}

template <typename W>
void block(const Linear<W>& op, int64_t row0, int64_t row1, int64_t begin, int64_t end) {
  if (row1 - row0 <= kRows) return few_rows(op, row0, row1 - row0, begin, end, 0, op.in_features);
  for (int64_t k0 = 0; k0 < op.in_features; k0 += kBlockK) {
    const int64_t k1 = std::min(k0 + kBlockK, op.in_features);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t row = row0; row < row1; row += kRows)
        few_rows(op, row, std::min<int64_t>(kRows, row1 - row), panel, panel + 1, k0, k1);
  }
}

template <typename W>
void linear(const Linear<W>& op, int threads) {
  const int64_t groups = (op.panels() + kGroup - 1) / kGroup;
  const int64_t tasks = groups * ((op.rows + kBlockRows - 1) / kBlockRows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / groups * kBlockRows, panel = task % groups * kGroup;
    block(op, row, std::min(row + kBlockRows, op.rows), panel, std::min(panel + kGroup, op.panels()));
  }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_linear(const float* x, const void* weight, int32_t weight_dtype, const float* bias, float* out,
                                int64_t rows, int64_t x_stride, int64_t in_features, int64_t out_features, int threads) {
  with_type(weight_dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    linear(Linear<W>{x, static_cast<const W*>(weight), bias, out, rows, x_stride, in_features, out_features}, threads);
  });
}
