// Residual addition and normalisation of a row: it stays in the first-level cache between the sum of squares and the
// scaling. Four running vectors, whatever the number of rows: the order of the sum follows from `hidden`.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../cpu/jobs.h"
#include "../cpu/simd.h"

namespace loraplex {
namespace {

constexpr int kChains = 4;

// Writes x + residual, rounded, to `total`, and returns the sum of its squares.
template <typename T>
float add_and_square(const T* x, const T* residual, T* total, int64_t hidden) {
  __m256 squares[kChains] = {};
  int chain = 0;
  for (int64_t i = 0; i < hidden; i += kLanes, chain = (chain + 1) % kChains) {
    const int lanes = static_cast<int>(hidden - i < kLanes ? hidden - i : kLanes);
    __m256 value = load_first(x + i, lanes);
    if (residual) {
      value = rounded<T>(_mm256_add_ps(value, load_first(residual + i, lanes)));
      store_first(total + i, value, lanes);
    }
    squares[chain] = fma(value, value, squares[chain]);
  }
  return sum(_mm256_add_ps(_mm256_add_ps(squares[0], squares[1]), _mm256_add_ps(squares[2], squares[3])));
}

template <typename T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t hidden, float eps) {
  const float squares = add_and_square(x, residual, total, hidden);
  const __m256 inverse = _mm256_set1_ps(1.0f / std::sqrt(squares / static_cast<float>(hidden) + eps));
  const T* row = residual ? total : x;
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const int lanes = static_cast<int>(hidden - i < kLanes ? hidden - i : kLanes);
    const __m256 normed = rounded<T>(_mm256_mul_ps(load_first(row + i, lanes), inverse));
    store_first(out + i, _mm256_mul_ps(load_first(weight + i, lanes), normed), lanes);
  }
}

struct RmsNorm {
  const void* x;         // [rows, hidden]
  const void* residual;  // [rows, hidden], null together with total
  const void* weight;    // [hidden]
  void* out;             // [rows, hidden]
  void* total;           // [rows, hidden]
  int64_t rows, hidden;
  float eps;
  int32_t dtype;
};

// of a task: what takes a few microseconds
constexpr int64_t kTaskElements = 8192;

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_rms_norm(const RmsNorm* arguments, Jobs* jobs) {
  const RmsNorm op = *arguments;
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / op.hidden);
  with_type(op.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    jobs->add((op.rows + task_rows - 1) / task_rows, [=](int64_t task) {
      for (int64_t row = task * task_rows; row < std::min((task + 1) * task_rows, op.rows); ++row) {
        const int64_t at = row * op.hidden;
        norm_row(static_cast<const T*>(op.x) + at, op.residual ? static_cast<const T*>(op.residual) + at : nullptr,
                 static_cast<const T*>(op.weight), static_cast<T*>(op.out) + at, static_cast<T*>(op.total) + at,
                 op.hidden, op.eps);
      }
    });
  });
}
