// out += scaling * shrunk B: who computes what. How is in tile.h.
#include "../cpu/adapter_rows.h"
#include "tile.h"

namespace loraplex {
namespace {

constexpr int64_t kTaskColumns = 256, kTaskTokens = 64;
// One token by itself: the columns of its sums, and what lies between what is read and what is fetched.
constexpr int64_t kTokenColumns = 1024, kAheadBytes = 8192;

struct Expand {
  const float* shrunk;  // [modules, num_tokens, max_lora_rank]
  void* out;            // [num_tokens, out_stride]
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  const int64_t* first_column;  // of each module in out, and the end
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank, out_stride;
  int32_t out_dtype;
  int32_t lanes;  // 8, or 16 where the CPU has AVX-512

  const float* narrow(const Task& task) const {
    return shrunk + (task.piece.index * num_tokens + task.token) * max_lora_rank;
  }
  template <typename T>
  T* wide(const Task& task) const {
    return static_cast<T*>(out) + task.token * out_stride + first_column[task.piece.index] + task.first;
  }
};

struct Scratch {
  std::vector<float> rows;
  std::vector<const float*> b;
};

// The part of B^T that a task reads: row j, the columns of the task.
struct Rows {
  int64_t adapter, first_unit, row_units, units, count;

  Rows(const Expand& op, const Task& task) : adapter(task.piece.adapter), count(task.piece.lora_rank) {
    const Adapters& adapters = *op.adapters;
    const Piece& piece = task.piece;
    const int64_t unit_columns = adapters.dtype[adapter] == kFloat32 ? 32 : 64;
    row_units = adapters.row_units(adapter, op.first_column[piece.index + 1] - op.first_column[piece.index]);
    units = (task.last - task.first + unit_columns - 1) / unit_columns;
    first_unit = adapters.start_unit[piece.place] + count * adapters.row_units(adapter, op.in_features) +
                 task.first / unit_columns;
  }

  const uint8_t* whole(const Adapters& adapters, int64_t j) const {
    return adapters.units(adapter, first_unit + j * row_units, units);
  }
  // Row j as float32.
  void copy(const Adapters& adapters, int64_t j, float* to) const {
    copy_units(adapters, adapter, first_unit + j * row_units, units, to);
  }
  const uint8_t* address(const Adapters& adapters, int64_t j) const {
    return adapters.unit(adapter, first_unit + std::min(j, count - 1) * row_units);
  }
  // of the rows that lie between what is read and what is fetched
  int64_t distance() const {
    const int64_t step_bytes = kStreams * units * kUnitBytes;
    return (kAheadBytes + step_bytes - 1) / step_bytes * kStreams;
  }
};

// `count` rows from j on, where they lie, or all of them as float32 in `scratch` when one crosses into another page.
struct Read {
  const void* rows[kStreams];
  int32_t dtype;

  Read(const Adapters& adapters, const Rows& part, int64_t j, int64_t count, Scratch& scratch)
      : dtype(adapters.dtype[part.adapter]) {
    bool is_whole = true;
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = part.whole(adapters, j + r);
      is_whole = is_whole && rows[r];
    }
    if (is_whole) return;
    scratch.rows.resize(std::max<int64_t>(scratch.rows.size(), kStreams * kTokenColumns));
    for (int64_t r = 0; r < count; ++r) {
      float* room = scratch.rows.data() + r * kTokenColumns;
      part.copy(adapters, j + r, room);
      rows[r] = room;
    }
    dtype = kFloat32;
  }
};

// One token: the sums of all its columns wait in the first-level cache while B^T streams through, row after row.
// `later`: the task that comes after it on this thread, or null.
template <typename T>
void run_token(const Expand& op, const Adapters& adapters, const Task& task, const Task* later, Scratch& scratch) {
  const int64_t columns = task.last - task.first;
  const Rows rows(op, task), next(op, later ? *later : task);
  const int64_t distance = rows.distance();
  const float* shrunk = op.narrow(task);
  const auto add = op.lanes == 16 ? add_token_avx512 : add_token_avx2;
  alignas(64) float sums[kTokenColumns];
  std::fill(sums, sums + (columns + kColumns - 1) / kColumns * kColumns, 0.0f);
  for (int64_t j = 0; j < rows.count; j += kStreams) {
    // a row that is not there adds nothing, not even a zero: the chain is as long as the rank
    const int64_t here = std::min<int64_t>(kStreams, rows.count - j);
    const Read read(adapters, rows, j, here, scratch);
    const uint8_t* ahead[kStreams];
    for (int64_t r = 0; r < kStreams; ++r) {
      const int64_t row = j + r + distance;
      ahead[r] = row < rows.count ? rows.address(adapters, row) : next.address(adapters, row - rows.count);
    }
    add({shrunk + j, read.rows, ahead, sums, columns, static_cast<int32_t>(here), read.dtype});
  }
  T* out = op.wide<T>(task);
  const __m256 scaling = _mm256_set1_ps(adapters.scaling[task.piece.place]);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int lanes = static_cast<int>(columns - c);
    store_first(out + c, fma(scaling, load(sums + c), load_first(out + c, lanes)), lanes);
  }
}

// Points scratch.b[j] at the task's columns of row j of B^T, as float32.
void read_b(const Adapters& adapters, const Rows& rows, int64_t columns, Scratch& scratch) {
  const int64_t width = (columns + kColumns - 1) / kColumns * kColumns;
  const bool is_float = adapters.dtype[rows.adapter] == kFloat32;
  // tiles read whole kColumns: what lies behind the row's last unit may not even be memory
  const bool is_whole = is_float && rows.units * kUnitBytes == width * static_cast<int64_t>(sizeof(float));
  scratch.rows.resize(std::max<int64_t>(scratch.rows.size(), rows.count * width));
  scratch.b.resize(rows.count);
  for (int64_t j = 0; j < rows.count; ++j) {
    const uint8_t* found = is_whole ? rows.whole(adapters, j) : nullptr;
    float* room = scratch.rows.data() + j * width;
    if (!found) rows.copy(adapters, j, room);
    scratch.b[j] = found ? reinterpret_cast<const float*>(found) : room;
  }
}

template <typename T>
void run_tokens(const Expand& op, const Adapters& adapters, const Task& task, Scratch& scratch) {
  const Rows rows(op, task);
  read_b(adapters, rows, task.last - task.first, scratch);
  (op.lanes == 16 ? add_tile_avx512 : add_tile_avx2)(
      {op.narrow(task), scratch.b.data(), op.wide<T>(task), task.token_end - task.token, op.max_lora_rank, op.out_stride,
       rows.count, task.last - task.first, adapters.scaling[task.piece.place], op.out_dtype,
       adapters.dtype[rows.adapter] == kFloat32});
}

template <typename T>
void run(const Expand& op, const Task* begin, const Task* end) {
  thread_local Scratch scratch;
  const auto one_token = [](const Task& task) { return task.token_end - task.token == 1; };
  for (const Task* task = begin; task != end; ++task) {
    const bool goes_on = task + 1 != end && one_token(task[1]);
    if (one_token(*task)) run_token<T>(op, *op.adapters, *task, goes_on ? task + 1 : nullptr, scratch);
    else run_tokens<T>(op, *op.adapters, *task, scratch);
  }
}

}  // namespace

void add_token_avx2(const TokenRows& rows) { add_token<Vector8>(rows); }

void add_tile_avx2(const TileRows& rows) { add_tile<Vector8>(rows); }

}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_lora_expand(const Expand* arguments, Jobs* jobs) {
  const Expand op = *arguments;
  const std::vector<Piece> found = pieces(*op.adapters, op.segments, op.layer, op.modules, op.num_modules);
  // few rows are cut, so that every thread has some
  const bool few = static_cast<int64_t>(found.size()) < 8 * jobs->threads;
  std::vector<Task> tasks;
  for (const Piece& piece : found) {
    const bool whole = !few && piece.end - piece.start == 1;
    const int64_t columns = op.first_column[piece.index + 1] - op.first_column[piece.index];
    split(piece, columns, whole ? kTokenColumns : kTaskColumns, kTaskTokens, tasks);
  }
  std::vector<Run> parts = runs(tasks, jobs->threads, [](const Task& task) {
    return task.piece.lora_rank * (task.last - task.first) * (1 + (task.token_end - task.token) / 4);
  });
  const int64_t count = static_cast<int64_t>(parts.size());
  with_type(op.out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    jobs->add(count, [op, tasks = std::move(tasks), parts = std::move(parts)](int64_t part) {
      run<T>(op, tasks.data() + parts[part].first, tasks.data() + parts[part].last);
    });
  });
}
