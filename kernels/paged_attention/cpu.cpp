// Attention over pages. The context is cut at fixed positions: tiles of 64 keys, chunks of 512. Whoever computes a row,
// its tiles and chunks come in the same order: one thread after the other, or chunks at once and merged afterwards.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../cpu/ahead.h"
#include "../cpu/jobs.h"
#include "attend.h"

namespace loraplex {
namespace {

constexpr int64_t kAheadBytes = 256 << 10;  // fetched for the next task at most: they stay in the second-level cache

std::vector<Rows> row_tiles(const Attention& op) {
  std::vector<Rows> found;
  for (int64_t sequence = 0; sequence < op.num_sequences; ++sequence) {
    const int64_t start = op.query_start[sequence], end = op.query_start[sequence + 1];
    for (int64_t token = start; token < end; token += op.task_tokens())
      for (int64_t kv_head = 0; kv_head < op.num_kv_heads; ++kv_head)
        found.push_back({sequence, kv_head, token, std::min(op.task_tokens(), end - token),
                         op.context_lens[sequence] - (end - token)});
  }
  return found;
}

// The keys and values of a row tile, page by page, as far as they are to be fetched.
void foresee(const Attention& op, const Rows& rows, Ahead& ahead) {
  const int64_t element = op.page_dtype == kFloat32 ? 4 : 2;
  const int32_t* table = op.page_table + rows.sequence * op.max_pages;
  int64_t left = kAheadBytes;
  for (int64_t position = rows.first_key(op, 0), end = rows.end_key(rows.tokens - 1); position < end && left > 0;) {
    const int64_t index = position / op.page_size, slot = position - index * op.page_size;
    const int64_t slots = std::min(end - position, op.page_size - slot), bytes = slots * op.slot_stride * element;
    const uint8_t* key = static_cast<const uint8_t*>(op.pages) +
                         (table[index] * op.page_stride + slot * op.slot_stride) * element;
    ahead.add(key, bytes);
    ahead.add(key + op.value_offset * element, bytes);
    position += slots, left -= 2 * bytes;
  }
}

// Row tiles that threads take one after the other, each the next one before it begins with the last.
struct Line {
  std::vector<Rows> tiles;
  std::atomic<int64_t> next{0};
};

void attend_all(const Attention& op, std::vector<Rows> tiles, Jobs& jobs) {
  // the heads of a row tile on one thread: they lie side by side, and are fetched together
  const int64_t heads = op.num_kv_heads, count = static_cast<int64_t>(tiles.size()) / heads;
  const auto line = std::make_shared<Line>();
  line->tiles = std::move(tiles);
  jobs.add(std::min<int64_t>(count, jobs.threads), [op, heads, count, line](int64_t) {
    Workspace& work = Workspace::of(op);
    for (int64_t here = line->next++; here < count;) {
      const Rows* rows = line->tiles.data() + here * heads;
      here = line->next++;
      work.ahead.clear();
      if (here < count && line->tiles[here * heads].sequence != rows->sequence)
        foresee(op, line->tiles[here * heads], work.ahead);
      for (int64_t head = 0; head < heads; ++head) attend(op, rows[head], work);
    }
    work.ahead.clear();
  });
}

// One row tile by one chunk, and room for what comes out.
struct ChunkTask {
  const Rows* rows;
  int64_t chunk;
  std::vector<float> mixed;
  std::vector<Part> parts;

  void keep(const Attention& op, const std::vector<Part>& found) {
    mixed.resize(found.size() * op.width());
    for (size_t row = 0; row < found.size(); ++row) {
      float* to = mixed.data() + row * op.width();
      std::copy(found[row].mixed, found[row].mixed + op.width(), to);
      parts.push_back({found[row].largest, found[row].total, to});
    }
  }
};

void merge_tile(const Attention& op, const ChunkTask* begin, const ChunkTask* end, Workspace& work) {
  const Rows& rows = *begin->rows;
  for (int64_t row = 0; row < rows.tokens * op.group(); ++row) work.merged[row].clear(op.width());
  for (const ChunkTask* task = begin; task != end; ++task) merge_chunk(op, rows, task->chunk, task->parts, work.merged);
  write_out(op, rows, work.merged);
}

struct Split {
  std::vector<Rows> tiles;
  std::vector<ChunkTask> tasks;
  std::vector<int64_t> first_task;  // of each tile, and the end
};

// Chunks on all threads at once, then each row tile merges its own in order.
void attend_split(const Attention& op, std::vector<Rows> tiles, Jobs& jobs) {
  const auto split = std::make_shared<Split>();
  split->tiles = std::move(tiles);
  for (const Rows& rows : split->tiles) {
    split->first_task.push_back(split->tasks.size());
    for (int64_t chunk = first_chunk(op, rows); chunk < rows.end_key(rows.tokens - 1); chunk += kChunk)
      split->tasks.push_back({&rows, chunk, {}, {}});
  }
  split->first_task.push_back(split->tasks.size());
  jobs.add(split->tasks.size(), [op, split](int64_t index) {
    Workspace& work = Workspace::of(op);
    ChunkTask& task = split->tasks[index];
    read_query(op, *task.rows, work);
    attend_chunk(op, *task.rows, task.chunk, work);
    task.keep(op, work.parts);
  });
  jobs.new_stage();
  jobs.add(split->tiles.size(), [op, split](int64_t tile) {
    ChunkTask* tasks = split->tasks.data();
    merge_tile(op, tasks + split->first_task[tile], tasks + split->first_task[tile + 1], Workspace::of(op));
  });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_paged_attention(const Attention* op, Jobs* jobs) {
  std::vector<Rows> tiles = row_tiles(*op);
  // few tiles would leave threads idle; either way gives the same bits
  const bool few = jobs->threads > 1 && static_cast<int64_t>(tiles.size()) < 4 * jobs->threads;
  (few ? attend_split : attend_all)(*op, std::move(tiles), *jobs);
}
