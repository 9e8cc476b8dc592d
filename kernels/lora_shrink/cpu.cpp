// x A^T by dot products along in_features, where both rows are contiguous. Every output element is the sum of eight
// lanes, each one chain over in_features, whatever tile it is in: its bits depend on its row of x and its row of A.
#include "../cpu/adapter_rows.h"

namespace loraplex {
namespace {

constexpr int kTokens = 3, kRanks = 4;  // 3 x 4 accumulators + 3 of x + 1 of A = 16 registers
constexpr int64_t kTaskRanks = 8, kTaskTokens = 64;

struct Shrink {
  const float* x;  // [num_tokens, in_features]
  float* out;      // [modules, num_tokens, max_lora_rank], zero
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank;
};

template <int T, int R>
void tile(const float* x, int64_t x_stride, const float* const* a, int64_t in_features, float* out,
          int64_t out_stride) {
  __m256 sums[T][R] = {};
  const auto step = [&](int64_t i, auto read) {
    // A's rows follow each other: the next ones, and after the last of them B
    if (i % 16 == 0)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(a[r] + i + R * in_features);
    __m256 rows[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) rows[t] = read(x + t * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 value = read(a[r] + i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t][r] = fma(rows[t], value, sums[t][r]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= in_features; i += kLanes) step(i, [](const float* p) { return load(p); });
  if (i < in_features) {  // the rest of A's last unit may hold anything
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(in_features - i)), lane);
    step(i, [&](const float* p) { return _mm256_maskload_ps(p, mask); });
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[t * out_stride + r] = sum(sums[t][r]);
}

template <int R>
void ranks_of_tokens(const Shrink& op, const Task& task, const float* const* a, float* out) {
  int64_t token = task.token;
  const auto x = [&] { return op.x + token * op.in_features; };
  const auto y = [&] { return out + token * op.max_lora_rank; };
  for (; token + kTokens <= task.token_end; token += kTokens)
    tile<kTokens, R>(x(), op.in_features, a, op.in_features, y(), op.max_lora_rank);
  for (; token < task.token_end; ++token)
    tile<1, R>(x(), op.in_features, a, op.in_features, y(), op.max_lora_rank);
}

void run(const Shrink& op, const Adapters& adapters, const Task& task, std::vector<float>& scratch) {
  const Piece& piece = task.piece;
  const int64_t units = adapters.row_units(piece.adapter, op.in_features), width = units * (kUnitBytes / 2);
  scratch.resize(kTaskRanks * width);
  const float* a[kTaskRanks];
  for (int64_t r = task.first; r < task.last; ++r) {
    const int64_t unit = adapters.start_unit[piece.place] + r * units, row = r - task.first;
    a[row] = read_units(adapters, piece.adapter, unit, units, scratch.data() + row * width);
  }
  float* out = op.out + piece.index * op.num_tokens * op.max_lora_rank + task.first;
  int64_t row = 0;
  for (; row + kRanks <= task.last - task.first; row += kRanks) ranks_of_tokens<kRanks>(op, task, a + row, out + row);
  for (; row < task.last - task.first; ++row) ranks_of_tokens<1>(op, task, a + row, out + row);
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_lora_shrink(const Shrink* arguments, Jobs* jobs) {
  const Shrink op = *arguments;
  std::vector<Task> tasks;
  for (const Piece& piece : pieces(*op.adapters, op.segments, op.layer, op.modules, op.num_modules))
    split(piece, piece.lora_rank, kTaskRanks, kTaskTokens, tasks);
  const int64_t count = static_cast<int64_t>(tasks.size());
  jobs->add(count, [op, tasks = std::move(tasks)](int64_t task) {
    thread_local std::vector<float> scratch;
    run(op, *op.adapters, tasks[task], scratch);
  });
}
