// Some rows of a sequence over the keys of a chunk, and over all chunks in order. A row (one query token, one head) takes
// the tiles of a chunk in order, then the chunks in order. All query heads of a KV head go together: each tile is read once.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../cpu/ahead.h"
#include "../cpu/simd.h"
#include "online.h"
#include "tile.h"

namespace loraplex {
namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kTileRows = 32;  // rows of a task: query tokens times heads of the group

struct Attention {
  const void* query;  // [num_tokens, num_heads, head_dim]
  void* out;          // the same shape and dtype
  const void* pages;  // element (page, key or value, slot, kv head, 0) of one layer by the strides below
  const int32_t* page_table;
  const int32_t* query_start;
  const int32_t* context_lens;
  int64_t num_sequences, max_pages, num_heads, num_kv_heads, head_dim, page_size;
  int64_t page_stride, value_offset, slot_stride, head_stride;
  int64_t sliding_window;
  float scale;
  int32_t query_dtype, page_dtype;

  int64_t group() const { return num_heads / num_kv_heads; }
  // head_dim in whole vectors: rows of a Workspace, zero behind head_dim
  int64_t width() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  // keys and values can be read where they lie
  bool is_direct() const { return page_dtype == kFloat32 && width() == head_dim; }
  // the query tokens that a task takes
  int64_t task_tokens() const { return std::max<int64_t>(1, kTileRows / group()); }
};

// Query tokens [token, token + tokens) of a sequence by the heads of one KV head; position is that of the first.
struct Rows {
  int64_t sequence, kv_head, token, tokens, position;

  int64_t first_key(const Attention& op, int64_t index) const {
    return op.sliding_window ? std::max<int64_t>(0, position + index + 1 - op.sliding_window) : 0;
  }
  int64_t end_key(int64_t index) const { return position + index + 1; }
};

// What a thread needs for a task; rows in the order token, head.
struct Workspace {
  std::vector<float> query, keys, values, scores, mixed;
  std::vector<Part> parts, merged;
  const float* key[kTile];
  const float* value[kTile];
  // What this thread reads after the task.
  Ahead ahead;

  // This thread's, with room for the operation.
  static Workspace& of(const Attention& op) {
    thread_local Workspace work;
    work.fit(op);
    return work;
  }

  void fit(const Attention& op) {
    const int64_t rows = op.task_tokens() * op.group(), row_floats = rows * op.width();
    if (!op.is_direct()) keys.resize(kTile * op.width()), values.resize(kTile * op.width());
    if (static_cast<int64_t>(parts.size()) == rows && static_cast<int64_t>(query.size()) == row_floats) return;
    parts.clear(), merged.clear();
    query.resize(row_floats);
    mixed.resize(2 * row_floats);
    scores.resize(rows * kTile);
    for (int64_t row = 0; row < rows; ++row) {
      parts.push_back({0, 0, mixed.data() + row * op.width()});
      merged.push_back({0, 0, mixed.data() + row_floats + row * op.width()});
    }
  }
};

template <typename T>
void widen(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kLanes) store(to + i, load_first(from + i, static_cast<int>(size - i)));
}

void read_query(const Attention& op, const Rows& rows, Workspace& work) {
  with_type(op.query_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = 0; row < rows.tokens * op.group(); ++row) {
      const int64_t head = rows.kv_head * op.group() + row % op.group();
      const T* from = static_cast<const T*>(op.query) +
                      ((rows.token + row / op.group()) * op.num_heads + head) * op.head_dim;
      widen(from, op.head_dim, work.query.data() + row * op.width());
    }
  });
}

// Points at key and value of tile position i, or at copies as float32.
template <typename T>
void read_slot(const Attention& op, const T* key, int64_t i, Workspace& work) {
  if (op.is_direct()) {
    work.key[i] = reinterpret_cast<const float*>(key);
    work.value[i] = reinterpret_cast<const float*>(key + op.value_offset);
    return;
  }
  float* keys = work.keys.data() + i * op.width();
  float* values = work.values.data() + i * op.width();
  widen(key, op.head_dim, keys);
  widen(key + op.value_offset, op.head_dim, values);
  work.key[i] = keys;
  work.value[i] = values;
}

// Keys [first, end) of a tile, page by page. Around them, what is scored with them in one vector: the nearest again.
template <typename T>
void read_tile(const Attention& op, const Rows& rows, int64_t tile, int64_t first, int64_t end, Workspace& work) {
  const int32_t* table = op.page_table + rows.sequence * op.max_pages;
  const T* head = static_cast<const T*>(op.pages) + rows.kv_head * op.head_stride;
  int64_t position = first;
  while (position < end) {
    const int64_t index = position / op.page_size, slot = position - index * op.page_size;
    const int64_t page_end = std::min(end, (index + 1) * op.page_size);
    const T* key = head + table[index] * op.page_stride + slot * op.slot_stride;
    for (; position < page_end; ++position, key += op.slot_stride) read_slot(op, key, position - tile, work);
  }
  std::fill(work.key, work.key + (first - tile), work.key[first - tile]);
  std::fill(work.key + (end - tile), work.key + kTile, work.key[end - 1 - tile]);
}

// R rows of one query token over keys [low, high) of a tile.
template <int R>
void attend_rows(const Attention& op, Workspace& work, int64_t row, int64_t low, int64_t high) {
  const int64_t width = op.width(), step = kLanes / R;
  const float* query = work.query.data() + row * width;
  float* scores = work.scores.data() + row * kTile;
  float* mixed = work.parts[row].mixed;
  for (int64_t i = low / kLanes * kLanes; i < high; i += step) {
    work.ahead.fetch();
    score<R>(query, work.key + i, width, scores + i);
  }
  for (int r = 0; r < R; ++r) weigh(scores + r * kTile, low, high, op.scale, work.parts[row + r], width);
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) mix<R, 4>(scores, work.value, low, high, d, width, mixed);
  for (; d < width; d += kLanes) mix<R, 1>(scores, work.value, low, high, d, width, mixed);
}

// The part of each row over the keys of one chunk, into work.parts. A row that sees none keeps an empty part.
void attend_chunk(const Attention& op, const Rows& rows, int64_t chunk, Workspace& work) {
  const int64_t group = op.group(), last = rows.tokens - 1;
  for (int64_t row = 0; row < rows.tokens * group; ++row) work.parts[row].clear(op.width());
  const int64_t first = std::max(chunk, rows.first_key(op, 0)), end = std::min(chunk + kChunk, rows.end_key(last));
  for (int64_t tile = first / kTile * kTile; tile < end; tile += kTile) {
    const int64_t tile_first = std::max(tile, first), tile_end = std::min(tile + kTile, end);
    if (op.page_dtype == kFloat32) read_tile<float>(op, rows, tile, tile_first, tile_end, work);
    if (op.page_dtype == kBFloat16) read_tile<BFloat16>(op, rows, tile, tile_first, tile_end, work);
    if (op.page_dtype == kFloat16) read_tile<Float16>(op, rows, tile, tile_first, tile_end, work);
    for (int64_t index = 0; index < rows.tokens; ++index) {
      const int64_t low = std::max(tile, rows.first_key(op, index)) - tile;
      const int64_t high = std::min(tile + kTile, rows.end_key(index)) - tile;
      if (low >= high) continue;
      int64_t row = index * group;
      for (; row + 2 <= (index + 1) * group; row += 2) attend_rows<2>(op, work, row, low, high);
      if (row < (index + 1) * group) attend_rows<1>(op, work, row, low, high);
    }
  }
}

void write_out(const Attention& op, const Rows& rows, const std::vector<Part>& parts) {
  with_type(op.query_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = 0; row < rows.tokens * op.group(); ++row) {
      const int64_t token = rows.token + row / op.group(), head = rows.kv_head * op.group() + row % op.group();
      T* out = static_cast<T*>(op.out) + (token * op.num_heads + head) * op.head_dim;
      const __m256 total = _mm256_set1_ps(parts[row].total);
      for (int64_t d = 0; d < op.head_dim; d += kLanes)
        store_first(out + d, _mm256_div_ps(load(parts[row].mixed + d), total), static_cast<int>(op.head_dim - d));
    }
  });
}

// Merges the chunk's part of each row that sees some of it.
void merge_chunk(const Attention& op, const Rows& rows, int64_t chunk, const std::vector<Part>& parts,
                 std::vector<Part>& merged) {
  for (int64_t row = 0; row < rows.tokens * op.group(); ++row) {
    const int64_t index = row / op.group();
    if (rows.first_key(op, index) < chunk + kChunk && chunk < rows.end_key(index))
      merged[row].merge(parts[row], op.width());
  }
}

int64_t first_chunk(const Attention& op, const Rows& rows) { return rows.first_key(op, 0) / kChunk * kChunk; }

// One thread takes the chunks in order.
void attend(const Attention& op, const Rows& rows, Workspace& work) {
  read_query(op, rows, work);
  for (int64_t row = 0; row < rows.tokens * op.group(); ++row) work.merged[row].clear(op.width());
  for (int64_t chunk = first_chunk(op, rows); chunk < rows.end_key(rows.tokens - 1); chunk += kChunk) {
    attend_chunk(op, rows, chunk, work);
    merge_chunk(op, rows, chunk, work.parts, work.merged);
  }
  write_out(op, rows, work.merged);
}

}  // namespace
}  // namespace loraplex
