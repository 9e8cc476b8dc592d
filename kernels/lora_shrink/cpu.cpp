// x A^T by dot products along in_features, where both rows are contiguous: who computes what. How is in tile.h.
#include "../cpu/adapter_rows.h"
#include "tile.h"

namespace loraplex {
namespace {

constexpr int64_t kTaskRanks = 8, kTaskTokens = 64;
constexpr int64_t kAheadBytes = 8192;  // between what is read and what is fetched
// kWideRanks rows pay when they stay in the first-level cache and serve several tiles.
constexpr int64_t kManyTokens = 12, kMostFeatures = 1024;

struct Shrink {
  const float* x;  // [num_tokens, in_features]
  float* out;      // [modules, num_tokens, max_lora_rank], zero
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank;
  int64_t lanes;  // 8, or 16 where the CPU has AVX-512

  // How many of `ranks` rows of A go together.
  int64_t side_by_side(const Task& task, int64_t ranks) const {
    const bool many = task.token_end - task.token >= kManyTokens && in_features <= kMostFeatures;
    if (lanes == 16 && many && ranks >= kWideRanks) return kWideRanks;
    return std::min<int64_t>(kRanks, ranks);
  }
};

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
  const void* rows[kWideRanks];
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
  const uint8_t* ahead[kWideRanks];
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
  const auto multiply = op.lanes == 16 ? shrink_avx512 : shrink_avx2;
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

// 3 x 4 sums + 3 of x + 1 of A = 16 registers
void shrink_avx2(const ShrinkRows& rows) {
  (rows.ranks == kRanks ? shrink<Vector8, 3, kRanks> : shrink<Vector8, 3, 1>)(rows);
}

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
