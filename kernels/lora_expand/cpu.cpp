// out += scaling * shrunk B. A row of B^T is contiguous along out_features, so tiles are tokens by columns. Every
// element is one chain of fused multiply-adds over the rank in rising order from 0, then one with scaling and out: its
// bits depend on its row of shrunk, its column of B and what out held.
#include "../cpu/adapter_rows.h"

namespace loraplex {
namespace {

constexpr int64_t kColumns = 64;  // of a tile: one unit of 16-bit elements, two of float32
constexpr int64_t kTaskColumns = 256, kTaskTokens = 64;
constexpr int kRows = 6;
// One token by itself: rows of B^T read side by side, the columns of its sums, what lies between what is read and what
// is fetched.
constexpr int kStreams = 4;
constexpr int64_t kTokenColumns = 1024, kAheadBytes = 8192;

struct Expand {
  const float* shrunk;  // [modules, num_tokens, max_lora_rank]
  void* out;            // [num_tokens, out_stride]
  const Adapters* adapters;
  Segments segments;
  const int32_t* modules;
  const int64_t* first_column;  // of each module in out, and the end
  int64_t num_modules, layer, num_tokens, in_features, max_lora_rank, out_stride, out_dtype;
};

// R tokens by V vectors of columns. `fetches`: the columns after the kColumns of the tile meanwhile.
template <int R, int V, typename T>
void tile(const float* shrunk, int64_t shrunk_stride, const float* const* b, int64_t lora_rank, int64_t column,
          bool fetches, float scaling, T* out, int64_t out_stride, int64_t columns) {
  __m256 sums[R][V] = {};
  for (int64_t j = 0; j < lora_rank; ++j) {
    if (fetches)
#pragma GCC unroll 4
      for (int v = 0; v < V; v += 2) fetch(reinterpret_cast<const uint8_t*>(b[j] + column + kColumns + v * kLanes));
    __m256 row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b[j] + column + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_broadcast_ss(shrunk + r * shrunk_stride + j);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = fma(value, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int lanes = static_cast<int>(columns - column) - v * kLanes;
      if (lanes <= 0) continue;
      T* at = out + r * out_stride + column + v * kLanes;
      store_first(at, fma(_mm256_set1_ps(scaling), sums[r][v], load_first(at, lanes)), lanes);
    }
}

template <int R, int V, typename T>
void columns_of_rows(const float* shrunk, int64_t shrunk_stride, const float* const* b, int64_t lora_rank,
                     bool fetches, float scaling, T* out, int64_t out_stride, int64_t columns) {
  for (int64_t column = 0; column < columns; column += V * kLanes)
    tile<R, V>(shrunk, shrunk_stride, b, lora_rank, column, fetches, scaling, out, out_stride, columns);
}

template <typename T>
void few_rows(int64_t count, const float* shrunk, int64_t shrunk_stride, const float* const* b, int64_t lora_rank,
              bool fetches, float scaling, T* out, int64_t out_stride, int64_t columns) {
  const auto with = [&](auto run) {
    run(shrunk, shrunk_stride, b, lora_rank, fetches, scaling, out, out_stride, columns);
  };
  switch (count) {
    case 1: return with(columns_of_rows<1, 8, T>);
    case 2: return with(columns_of_rows<2, 4, T>);
    case 3: return with(columns_of_rows<3, 4, T>);
    case 4: return with(columns_of_rows<4, 2, T>);
    case 5: return with(columns_of_rows<5, 2, T>);
    default: return with(columns_of_rows<6, 2, T>);
  }
}

struct Scratch {
  std::vector<float> rows;
  std::vector<const float*> b;
};

// Points scratch.b[j] at columns [column, column + kColumns) of row j of B^T, whose first unit is first_unit.
void read_b(const Adapters& adapters, const Piece& piece, int64_t first_unit, int64_t features, int64_t column,
            Scratch& scratch) {
  const int64_t units = adapters.row_units(piece.adapter, features);
  const int64_t unit_columns = adapters.dtype[piece.adapter] == kFloat32 ? 32 : 64;
  const int64_t unit = column / unit_columns, count = std::min(kColumns / unit_columns, units - unit);
  for (int64_t j = 0; j < piece.lora_rank; ++j) {
    const int64_t first = first_unit + j * units + unit;
    float* room = scratch.rows.data() + j * kColumns;
    scratch.b[j] = room;
    // tiles read kColumns: what lies behind the row's last unit may not even be memory
    if (count * unit_columns < kColumns)
      copy_units(adapters, piece.adapter, first, count, room);
    else
      scratch.b[j] = read_units(adapters, piece.adapter, first, count, room);
  }
}

// The part of B^T that one token's task reads: row j, the columns of the task.
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

  const float* read(const Adapters& adapters, int64_t j, float* scratch) const {
    return read_units(adapters, adapter, first_unit + j * row_units, units, scratch);
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

// sums += value[r] * b[r], the rows in rising order. `ahead`: kStreams rows that are fetched meanwhile.
template <int R>
void add_rows(const __m256* value, const float* const* b, const uint8_t* const* ahead, int64_t columns, float* sums) {
  for (int64_t c = 0; c < columns; c += 2 * kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kStreams; ++r) fetch(ahead[r] + c * sizeof(float));
    __m256 low = load(sums + c), high = load(sums + c + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      low = fma(value[r], load(b[r] + c), low);
      high = fma(value[r], load(b[r] + c + kLanes), high);
    }
    store(sums + c, low);
    store(sums + c + kLanes, high);
  }
}

// One token: the sums of all its columns wait in the first-level cache while B^T streams through, row after row.
// `later`: the task that comes after it on this thread, or null.
template <typename T>
void run_token(const Expand& op, const Adapters& adapters, const Task& task, const Task* later, Scratch& scratch) {
  const Piece& piece = task.piece;
  const int64_t columns = task.last - task.first;
  const Rows rows(op, task), next(op, later ? *later : task);
  const int64_t distance = rows.distance();
  const float* shrunk = op.shrunk + (piece.index * op.num_tokens + task.token) * op.max_lora_rank;
  scratch.rows.resize(std::max<int64_t>(scratch.rows.size(), kStreams * kTokenColumns));
  alignas(32) float sums[kTokenColumns];
  std::fill(sums, sums + (columns + kColumns - 1) / kColumns * kColumns, 0.0f);
  for (int64_t j = 0; j < rows.count; j += kStreams) {
    const float* b[kStreams];
    const uint8_t* ahead[kStreams];
    __m256 value[kStreams];
    // a row that is not there adds nothing, not even a zero: the chain is as long as the rank
    const int64_t here = std::min<int64_t>(kStreams, rows.count - j);
    for (int64_t r = 0; r < here; ++r) {
      b[r] = rows.read(adapters, j + r, scratch.rows.data() + r * kTokenColumns);
      value[r] = _mm256_broadcast_ss(shrunk + j + r);
    }
    for (int64_t r = 0; r < kStreams; ++r) {
      const int64_t row = j + r + distance;
      ahead[r] = row < rows.count ? rows.address(adapters, row) : next.address(adapters, row - rows.count);
    }
    switch (here) {
      case 1: add_rows<1>(value, b, ahead, columns, sums); break;
      case 2: add_rows<2>(value, b, ahead, columns, sums); break;
      case 3: add_rows<3>(value, b, ahead, columns, sums); break;
      default: add_rows<4>(value, b, ahead, columns, sums);
    }
  }
  T* out = static_cast<T*>(op.out) + task.token * op.out_stride + op.first_column[piece.index] + task.first;
  const __m256 scaling = _mm256_set1_ps(adapters.scaling[piece.place]);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int lanes = static_cast<int>(columns - c);
    store_first(out + c, fma(scaling, load(sums + c), load_first(out + c, lanes)), lanes);
  }
}

template <typename T>
void run(const Expand& op, const Adapters& adapters, const Task& task, Scratch& scratch) {
  const Piece& piece = task.piece;
  const int64_t features = op.first_column[piece.index + 1] - op.first_column[piece.index];
  const int64_t a_units = piece.lora_rank * adapters.row_units(piece.adapter, op.in_features);
  scratch.rows.resize(piece.lora_rank * kColumns);
  scratch.b.resize(piece.lora_rank);
  for (int64_t column = task.first; column < task.last; column += kColumns) {
    read_b(adapters, piece, adapters.start_unit[piece.place] + a_units, features, column, scratch);
    const bool has_more = column + kColumns < task.last && adapters.dtype[piece.adapter] == kFloat32;
    for (int64_t token = task.token; token < task.token_end; token += kRows) {
      const float* shrunk = op.shrunk + (piece.index * op.num_tokens + token) * op.max_lora_rank;
      T* out = static_cast<T*>(op.out) + token * op.out_stride + op.first_column[piece.index] + column;
      few_rows<T>(std::min<int64_t>(kRows, task.token_end - token), shrunk, op.max_lora_rank, scratch.b.data(),
                  piece.lora_rank, has_more && token == task.token, adapters.scaling[piece.place], out, op.out_stride,
                  std::min(kColumns, task.last - column));
    }
  }
}

template <typename T>
void run(const Expand& op, const Task* begin, const Task* end) {
  thread_local Scratch scratch;
  const auto one_token = [](const Task& task) { return task.token_end - task.token == 1; };
  for (const Task* task = begin; task != end; ++task) {
    const bool goes_on = task + 1 != end && one_token(task[1]);
    if (one_token(*task)) run_token<T>(op, *op.adapters, *task, goes_on ? task + 1 : nullptr, scratch);
    else run<T>(op, *op.adapters, *task, scratch);
  }
}

}  // namespace
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
  with_type(static_cast<int32_t>(op.out_dtype), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    jobs->add(count, [op, tasks = std::move(tasks), parts = std::move(parts)](int64_t part) {
      run<T>(op, tasks.data() + parts[part].first, tasks.data() + parts[part].last);
    });
  });
}
