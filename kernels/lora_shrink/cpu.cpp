// x A^T by dot products along in_features, where both rows are contiguous.
#include "../cpu/adapter_rows.h"
#include "tile.h"

namespace loraplex {
namespace {

constexpr int kTokens = 3;  // 3 x 4 sums + 3 of x + 1 of A = 16 registers
constexpr int64_t kTaskRanks = 8, kTaskTokens = 64;
constexpr int64_t kAheadBytes = 8192;  // between what is read and what is fetched

struct Shrink {
  const float* x;  // [num_tokens, in_features]
  float* out;      // [modules, num_tokens, max_lora_rank], zero
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank;
  int64_t lanes;  // 8, or 16 where the CPU has AVX-512

  // How many of `ranks` rows of A go together. One token waits for the memory, with vectors of any width.
  int64_t side_by_side(const Task& task, int64_t ranks) const {
    if (lanes == 16 && task.token_end - task.token > 1 && ranks >= kManyRanks) return kManyRanks;
    return std::min<int64_t>(kRanks, ranks);
  }
};

template <int T, int R, typename A>
void tile(const ShrinkRows& op, int64_t token, const uint8_t* const* ahead) {
  constexpr int64_t line = kLineBytes / sizeof(A);
  const float* x = op.x + token * op.in_features;
  const A* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = static_cast<const A*>(op.a[r]);
  __m256 sums[T][R] = {};
  const auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
    __m256 rows[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) rows[t] = read(x + t * op.in_features + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 value = read(a[r] + i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t][r] = fma(rows[t], value, sums[t][r]);
    }
  };
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return load(p); };
  int64_t i = 0;
  if (ahead)
    for (; i + line <= op.in_features; i += line) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(ahead[r] + i * static_cast<int64_t>(sizeof(A)));
#pragma GCC unroll 8
      for (int64_t part = 0; part < line; part += kLanes) step(i + part, whole);
    }
  for (; i + kLanes <= op.in_features; i += kLanes) step(i, whole);
  if (const int left = static_cast<int>(op.in_features - i))  // the rest of A's last unit may hold anything
    step(i, [left](const auto* p) __attribute__((always_inline)) { return load_first(p, left); });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) op.out[(token + t) * op.out_stride + r] = sum(sums[t][r]);
}

template <int R, typename A>
void all_tokens(const ShrinkRows& op) {
  const uint8_t* const* ahead = op.ahead;
  int64_t token = 0;
  for (; token + kTokens <= op.tokens; token += kTokens, ahead = nullptr) tile<kTokens, R, A>(op, token, ahead);
  for (; token < op.tokens; ++token, ahead = nullptr) tile<1, R, A>(op, token, ahead);
}

void multiply(const ShrinkRows& op) {
  if (op.ranks == kManyRanks) return shrink_many_avx512(op);
  with_type(op.a_dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    (op.ranks == kRanks ? all_tokens<kRanks, A> : all_tokens<1, A>)(op);
  });
}

// Rows [rank, rank + count) of a task's module.
struct Group {
  const Task* task;
  int64_t rank, count;

  int64_t first_unit(const Adapters& adapters, int64_t units, int64_t row) const {
    return adapters.start_unit[task->piece.place] + (rank + row) * units;
  }
};

// Rows of A where they lie, or all of them as float32 in `scratch` when one crosses into another page.
struct Read {
  const void* rows[kManyRanks];
  int32_t dtype;

  Read(const Adapters& adapters, const Group& group, int64_t units, std::vector<float>& scratch)
      : dtype(adapters.dtype[group.task->piece.adapter]) {
    const int64_t adapter = group.task->piece.adapter, width = units * kUnitBytes / adapters.element_bytes(adapter);
    bool is_whole = true;
    for (int64_t r = 0; r < group.count; ++r) {
      rows[r] = adapters.units(adapter, group.first_unit(adapters, units, r), units);
      is_whole = is_whole && rows[r];
    }
    if (is_whole) return;
    scratch.resize(std::max<int64_t>(scratch.size(), group.count * width));
    for (int64_t r = 0; r < group.count; ++r) {
      float* room = scratch.data() + r * width;
      copy_units(adapters, adapter, group.first_unit(adapters, units, r), units, room);
      rows[r] = room;
    }
    dtype = kFloat32;
  }
};

// `later`: null, or the rows that are fetched meanwhile.
void run(const Shrink& op, const Adapters& adapters, const Group& group, const Group* later,
         std::vector<float>& scratch) {
  const Task& task = *group.task;
  const Read read(adapters, group, adapters.row_units(task.piece.adapter, op.in_features), scratch);
  const uint8_t* ahead[kManyRanks];
  if (later) {
    const int64_t adapter = later->task->piece.adapter, units = adapters.row_units(adapter, op.in_features);
    if (adapters.dtype[adapter] != read.dtype) later = nullptr;
    for (int64_t r = 0; later && r < group.count; ++r)
      ahead[r] = adapters.unit(adapter, later->first_unit(adapters, units, std::min(r, later->count - 1)));
  }
  ShrinkRows rows{op.x + task.token * op.in_features, read.rows, later ? ahead : nullptr, nullptr,
                  task.token_end - task.token, op.in_features, op.max_lora_rank, static_cast<int32_t>(group.count),
                  read.dtype};
  rows.out = op.out + (task.piece.index * op.num_tokens + task.token) * op.max_lora_rank + group.rank;
  if (group.count >= kRanks) return multiply(rows);
  rows.ranks = 1;
  for (int64_t r = 0; r < group.count; ++r, ++rows.a, ++rows.out) {
    multiply(rows);
    if (rows.ahead) ++rows.ahead;
  }
}

void run(const Shrink& op, const Task* begin, const Task* end, std::vector<float>& scratch) {
  thread_local std::vector<Group> groups;
  groups.clear();
  for (const Task* task = begin; task != end; ++task)
    for (int64_t rank = task->first, size; rank < task->last; rank += size) {
      size = op.side_by_side(*task, task->last - rank);
      groups.push_back({task, rank, size});
    }
  const int64_t group_bytes = kRanks * op.in_features * op.adapters->element_bytes(begin->piece.adapter);
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
