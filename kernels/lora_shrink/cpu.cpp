// x A^T by dot products along in_features, where both rows are contiguous. Every output element is the sum of eight
// lanes, each one chain over in_features, whatever tile it is in: its bits depend on its row of x and its row of A.
#include "../cpu/adapter_rows.h"

namespace loraplex {
namespace {

constexpr int kTokens = 3, kRanks = 4;  // 3 x 4 accumulators + 3 of x + 1 of A = 16 registers
constexpr int64_t kTaskRanks = 8, kTaskTokens = 64;
constexpr int64_t kAheadBytes = 8192;  // between what is read and what is fetched

struct Shrink {
  const float* x;  // [num_tokens, in_features]
  float* out;      // [modules, num_tokens, max_lora_rank], zero
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank;
};

// Rows [rank, rank + count) of a task's module.
struct Group {
  const Task* task;
  int64_t rank, count;

  int64_t first_unit(const Adapters& adapters, int64_t units, int64_t row) const {
    return adapters.start_unit[task->piece.place] + (rank + row) * units;
  }
};

// `ahead`: null, or R rows that are fetched meanwhile.
template <int T, int R>
void tile(const float* x, int64_t x_stride, const float* const* a, int64_t in_features, const uint8_t* const* ahead,
          float* out, int64_t out_stride) {
  __m256 sums[T][R] = {};
  const auto step = [&](int64_t i, auto read) {
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
  const auto plain = [](const float* p) { return load(p); };
  int64_t i = 0;
  if (ahead)
    for (; i + 2 * kLanes <= in_features; i += 2 * kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(ahead[r] + i * sizeof(float));
      step(i, plain);
      step(i + kLanes, plain);
    }
  for (; i + kLanes <= in_features; i += kLanes) step(i, plain);
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
void ranks_of_tokens(const Shrink& op, const Task& task, const float* const* a, const uint8_t* const* ahead,
                     float* out) {
  int64_t token = task.token;
  const auto x = [&] { return op.x + token * op.in_features; };
  const auto y = [&] { return out + token * op.max_lora_rank; };
  for (; token + kTokens <= task.token_end; token += kTokens, ahead = nullptr)
    tile<kTokens, R>(x(), op.in_features, a, op.in_features, ahead, y(), op.max_lora_rank);
  for (; token < task.token_end; ++token, ahead = nullptr)
    tile<1, R>(x(), op.in_features, a, op.in_features, ahead, y(), op.max_lora_rank);
}

void run(const Shrink& op, const Adapters& adapters, const Group& group, const Group* later,
         std::vector<float>& scratch) {
  const Task& task = *group.task;
  const int64_t units = adapters.row_units(task.piece.adapter, op.in_features), width = units * (kUnitBytes / 2);
  scratch.resize(kRanks * width);
  const float* a[kRanks];
  for (int64_t r = 0; r < group.count; ++r)
    a[r] = read_units(adapters, task.piece.adapter, group.first_unit(adapters, units, r), units,
                      scratch.data() + r * width);
  const uint8_t* ahead[kRanks];
  if (later) {
    const int64_t adapter = later->task->piece.adapter, later_units = adapters.row_units(adapter, op.in_features);
    if (adapters.dtype[adapter] != kFloat32) later = nullptr;
    for (int64_t r = 0; later && r < kRanks; ++r)
      ahead[r] = adapters.unit(adapter, later->first_unit(adapters, later_units, std::min(r, later->count - 1)));
  }
  const uint8_t* const* fetched = later ? ahead : nullptr;
  float* out = op.out + task.piece.index * op.num_tokens * op.max_lora_rank + group.rank;
  if (group.count == kRanks) return ranks_of_tokens<kRanks>(op, task, a, fetched, out);
  for (int64_t r = 0; r < group.count; ++r) ranks_of_tokens<1>(op, task, a + r, later ? ahead + r : nullptr, out + r);
}

void run(const Shrink& op, const Task* begin, const Task* end, std::vector<float>& scratch) {
  thread_local std::vector<Group> groups;
  groups.clear();
  for (const Task* task = begin; task != end; ++task)
    for (int64_t rank = task->first; rank < task->last; rank += kRanks)
      groups.push_back({task, rank, std::min<int64_t>(kRanks, task->last - rank)});
  const int64_t group_bytes = kRanks * op.in_features * static_cast<int64_t>(sizeof(float));
  const int64_t count = static_cast<int64_t>(groups.size()), distance = (kAheadBytes + group_bytes - 1) / group_bytes;
  for (int64_t i = 0; i < count; ++i)
    run(op, *op.adapters, groups[i], i + distance < count ? &groups[i + distance] : nullptr, scratch);
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_lora_shrink(const Shrink* arguments, Jobs* jobs) {
  const Shrink op = *arguments;
  std::vector<Task> tasks;
  for (const Piece& piece : pieces(*op.adapters, op.segments, op.layer, op.modules, op.num_modules))
    split(piece, piece.lora_rank, kTaskRanks, kTaskTokens, tasks);
  const auto cost = [](const Task& task) { return (task.last - task.first) * (1 + (task.token_end - task.token) / 4); };
  std::vector<Run> parts = runs(tasks, jobs->threads, cost);
  const int64_t count = static_cast<int64_t>(parts.size());
  jobs->add(count, [op, tasks = std::move(tasks), parts = std::move(parts)](int64_t part) {
    thread_local std::vector<float> scratch;
    run(op, tasks.data() + parts[part].first, tasks.data() + parts[part].last, scratch);
  });
}
