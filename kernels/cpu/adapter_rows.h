// Rows of a packed adapter, read through its pages.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "jobs.h"
#include "vectors.h"

namespace loraplex {

constexpr int64_t kUnitBytes = 128;
constexpr int64_t kNumModules = 7;

// kernels.adapters.AdapterTables, field by field.
struct Adapters {
  const uint8_t* pool;
  const int32_t* page_table;
  const int32_t* start_unit;
  const int32_t* lora_rank;
  const float* scaling;
  const int32_t* dtype;
  int64_t page_bytes, max_pages, num_layers;

  int64_t place(int64_t adapter, int64_t layer, int64_t module) const {
    return (adapter * num_layers + layer) * kNumModules + module;
  }
  int64_t element_bytes(int64_t adapter) const { return dtype[adapter] == kFloat32 ? 4 : 2; }
  int64_t row_units(int64_t adapter, int64_t features) const {
    return (features * element_bytes(adapter) + kUnitBytes - 1) / kUnitBytes;
  }
  const uint8_t* unit(int64_t adapter, int64_t index) const { return units(adapter, index, 1); }
  // Where the units [first, first + count) lie, or null when they cross into another page.
  const uint8_t* units(int64_t adapter, int64_t first, int64_t count) const {
    // unit numbers are 32 bits in the tables, and a division of 32 bits is several times quicker than one of 64
    const uint32_t size = static_cast<uint32_t>(page_bytes / kUnitBytes), index = static_cast<uint32_t>(first) / size;
    const uint32_t place = static_cast<uint32_t>(first) - index * size;
    if (place + count > size) return nullptr;
    const int64_t page = page_table[adapter * max_pages + index];
    return pool + page * page_bytes + place * kUnitBytes;
  }
};

// The units [first, first + count) of an adapter, converted into `out`.
inline void copy_units(const Adapters& adapters, int64_t adapter, int64_t first, int64_t count, float* out) {
  with_type(adapters.dtype[adapter], [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t elements = kUnitBytes / static_cast<int64_t>(sizeof(T));
    for (int64_t unit = 0; unit < count; ++unit) {
      const T* from = reinterpret_cast<const T*>(adapters.unit(adapter, first + unit));
      for (int64_t i = 0; i < elements; i += kLanes) store(out + unit * elements + i, load(from + i));
    }
  });
}

// The same as float32: a pointer into the pool when that is what lies there in one piece, else a copy in `scratch`.
inline const float* read_units(const Adapters& adapters, int64_t adapter, int64_t first, int64_t count,
                               float* scratch) {
  if (adapters.dtype[adapter] == kFloat32)
    if (const uint8_t* found = adapters.units(adapter, first, count)) return reinterpret_cast<const float*>(found);
  copy_units(adapters, adapter, first, count, scratch);
  return scratch;
}

// A run of tokens with one adapter and one module of the call; what is split into tasks.
struct Piece {
  int64_t adapter, place, index, lora_rank, start, end;
};

struct Segments {
  const int32_t* starts;   // [count + 1]
  const int32_t* adapter;  // [count], -1 = none
  int64_t count;
};

// Module `modules[index]` of each segment that has tokens and the module.
inline std::vector<Piece> pieces(const Adapters& adapters, const Segments& segments, int64_t layer,
                                 const int32_t* modules, int64_t num_modules) {
  std::vector<Piece> found;
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    const int64_t adapter = segments.adapter[segment];
    const int64_t start = segments.starts[segment], end = segments.starts[segment + 1];
    for (int64_t index = 0; adapter >= 0 && start < end && index < num_modules; ++index) {
      const int64_t place = adapters.place(adapter, layer, modules[index]);
      if (const int64_t rank = adapters.lora_rank[place]) found.push_back({adapter, place, index, rank, start, end});
    }
  }
  return found;
}

// Work of one thread at a time: tokens [token, token_end) by [first, last) of the dimension that the operation splits.
struct Task {
  Piece piece;
  int64_t token, token_end, first, last;
};

inline void split(const Piece& piece, int64_t size, int64_t step, int64_t token_step, std::vector<Task>& tasks) {
  for (int64_t first = 0; first < size; first += step)
    for (int64_t token = piece.start; token < piece.end; token += token_step)
      tasks.push_back({piece, token, std::min(token + token_step, piece.end), first, std::min(first + step, size)});
}

// Tasks one after the other on one thread: while one is computed, the rows of the next come from memory.
struct Run {
  int64_t first, last;
};

// Cuts tasks into runs of nearly the same cost, several a thread: threads end together, and seldom begin anew.
template <typename F>
std::vector<Run> runs(const std::vector<Task>& tasks, int threads, F cost) {
  constexpr int64_t kRunsOfThread = 8;
  int64_t total = 0, spent = 0;
  for (const Task& task : tasks) total += cost(task);
  const int64_t least = total / (threads * kRunsOfThread);
  std::vector<Run> found;
  for (int64_t first = 0, i = 0; i < static_cast<int64_t>(tasks.size()); ++i) {
    spent += cost(tasks[i]);
    if (spent < least && i + 1 < static_cast<int64_t>(tasks.size())) continue;
    found.push_back({first, i + 1});
    first = i + 1, spent = 0;
  }
  return found;
}

}  // namespace loraplex
