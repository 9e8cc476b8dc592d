// y = x W^T + bias with a weight in panels, for vectors of any width. Every output element is one chain of fused
// multiply-adds over k in rising order from 0, whatever tile it is in: its bits depend on its row of x, its row of W
// and its bias, on nothing else, the vector's width included.
#pragma once

#include <algorithm>

#include "../cpu/jobs.h"
#include "../cpu/simd.h"

namespace loraplex {

struct Linear {
  const float* x;      // [rows, in_features]
  const void* weight;  // [panels][in_features][16] of W
  const float* bias;   // [out_features] or null
  float* out;          // [rows, out_features]
  int64_t rows, in_features, out_features;
  int32_t weight_dtype;  // kFloat32 or kBFloat16
  int32_t lanes;         // 8, or 16 where the CPU has AVX-512
};

// Each in a translation unit of its own, compiled for its instruction set.
void linear_avx2(const Linear& op, Jobs& jobs);
void linear_avx512(const Linear& op, Jobs& jobs);

// Unnamed: what is compiled for AVX-512 must not stand in for the same template elsewhere.
namespace {

constexpr int kPanel = 16;
constexpr int64_t kBlockK = 192;       // three panels' blocks are 36 KiB of float32: they stay in the first-level cache
constexpr int64_t kBlockBytes = 1 << 20;  // of x, at most: it stays in the second-level cache
constexpr int64_t kLine = 64;          // bytes

// Of the 16 columns of a panel those that exist.
inline int panel_width(const Linear& op, int64_t panel) {
  return static_cast<int>(std::min<int64_t>(kPanel, op.out_features - panel * kPanel));
}

// What a tile fetches for the block after its own while it computes: one line at each step of k, `step` bytes apart.
struct Ahead {
  const char* line = nullptr;
  int64_t step = 0;
};

// R rows by P panels. Goes on with what `out` holds when k0 > 0, adds the bias at the end. V is a panel's 16 floats.
template <typename V, int R, int P, typename W>
void tile(const Linear& op, int64_t row, int64_t panel, int64_t k0, int64_t k1, Ahead ahead) {
  V sums[R][P];
  float* out = op.out + row * op.out_features + panel * kPanel;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
      sums[r][p] = k0 ? V::load_first(out + r * op.out_features + p * kPanel, panel_width(op, panel + p)) : V::zero();
  const float* x = op.x + row * op.in_features;
  const W* weight = static_cast<const W*>(op.weight) + panel * op.in_features * kPanel;
  const auto add_products = [&](int64_t k) {
    V w[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) w[p] = V::load(weight + (p * op.in_features + k) * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto value = V::broadcast(x + r * op.in_features + k);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sums[r][p].add_product(value, w[p]);
    }
  };
  if (ahead.line)
    for (int64_t k = k0; k < k1; ++k, ahead.line += ahead.step) {
      __builtin_prefetch(ahead.line, 0, 2);
      add_products(k);
    }
  else
    for (int64_t k = k0; k < k1; ++k) add_products(k);
  const bool add_bias = op.bias && k1 == op.in_features;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const int width = panel_width(op, panel + p);
      if (add_bias) sums[r][p].add(V::load_first(op.bias + (panel + p) * kPanel, width));
      sums[r][p].store_first(out + r * op.out_features + p * kPanel, width);
    }
}

// P panels by `count` <= R rows, by the tile of exactly that many.
template <typename V, int P, typename W, int R = V::kRows>
void some_rows(const Linear& op, int64_t count, int64_t row, int64_t panel, int64_t k0, int64_t k1, Ahead ahead) {
  if constexpr (R > 1)
    if (count < R) return some_rows<V, P, W, R - 1>(op, count, row, panel, k0, k1, ahead);
  tile<V, R, P, W>(op, row, panel, k0, k1, ahead);
}

// The `count` rows of a single tile, which read the weights at the speed of the memory. Fewer rows take more panels at
// once, so that enough chains and streams are in flight.
template <typename V, typename W, int R = V::kRows>
void one_tile(const Linear& op, int64_t count, int64_t row, int64_t panel, int64_t end) {
  if constexpr (R > 1)
    if (count < R) return one_tile<V, W, R - 1>(op, count, row, panel, end);
  constexpr int panels = std::clamp(V::kAccumulators / R, 1, 4);
  for (; panel + panels <= end; panel += panels) tile<V, R, panels, W>(op, row, panel, 0, op.in_features, {});
  for (; panel < end; ++panel) tile<V, R, 1, W>(op, row, panel, 0, op.in_features, {});
}

// P panels by rows [row0, row1), in tiles of nearly the same height. While they are computed, the next block of the
// weights comes into the second-level cache, evenly spread over the tiles.
template <typename V, int P, typename W>
void strip(const Linear& op, int64_t row0, int64_t row1, int64_t panel, int64_t end) {
  const int64_t rows = row1 - row0, tiles = (rows + V::kRows - 1) / V::kRows;
  const int64_t panel_bytes = op.in_features * kPanel * sizeof(W), k_bytes = kPanel * sizeof(W);
  const char* weight = static_cast<const char*>(op.weight);
  for (int64_t k0 = 0; k0 < op.in_features; k0 += kBlockK) {
    const int64_t k1 = std::min(k0 + kBlockK, op.in_features);
    const char* next = nullptr;
    if (k1 < op.in_features) next = weight + panel * panel_bytes + k1 * k_bytes;
    else if (panel + 2 * P <= end) next = weight + (panel + P) * panel_bytes;
    for (int64_t t = 0; t < tiles; ++t) {
      Ahead ahead;
      if (next) {
        // tiles t, t + P, .. share the block of panel t % P
        const int64_t sharing = (tiles - t % P + P - 1) / P, bytes = kBlockK * k_bytes / sharing;
        ahead = {next + t % P * panel_bytes + t / P * bytes, std::min(kLine, (bytes + kBlockK - 1) / kBlockK)};
      }
      const int64_t first = row0 + rows * t / tiles, last = row0 + rows * (t + 1) / tiles;
      some_rows<V, P, W>(op, last - first, first, panel, k0, k1, ahead);
    }
  }
}

template <typename V, typename W>
void block(const Linear& op, int64_t row0, int64_t row1, int64_t panel, int64_t end) {
  if (row1 - row0 <= V::kRows) return one_tile<V, W>(op, row1 - row0, row0, panel, end);
  for (; panel + V::kPanels <= end; panel += V::kPanels) strip<V, V::kPanels, W>(op, row0, row1, panel, end);
  for (; panel < end; ++panel) strip<V, 1, W>(op, row0, row1, panel, end);
}

template <typename V, typename W>
void add(const Linear& op, Jobs& jobs) {
  const int64_t panels = (op.out_features + kPanel - 1) / kPanel;
  // of a task: few enough that threads end together, many enough that fetching ahead seldom ends
  const int64_t group = panels >= 16 * V::kPanels ? 2 * V::kPanels : V::kPanels;
  const int64_t most = kBlockBytes / (op.in_features * static_cast<int64_t>(sizeof(float))) / V::kRows * V::kRows;
  const int64_t block_rows = std::clamp<int64_t>(most, 4 * V::kRows, 24 * V::kRows);
  const int64_t groups = (panels + group - 1) / group;
  const int64_t tasks = groups * ((op.rows + block_rows - 1) / block_rows);
  jobs.add(tasks, [=](int64_t task) {
    const int64_t row = task / groups * block_rows, panel = task % groups * group;
    block<V, W>(op, row, std::min(row + block_rows, op.rows), panel, std::min(panel + group, panels));
  });
}

template <typename V>
void add(const Linear& op, Jobs& jobs) {
  if (op.weight_dtype == kFloat32) return add<V, float>(op, jobs);
  add<V, BFloat16>(op, jobs);
}

}  // namespace
}  // namespace loraplex
