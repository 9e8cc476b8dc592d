// silu(gate) * up, eight elements at a time.
#include <algorithm>
#include <type_traits>

#include "../cpu/jobs.h"
#include "../cpu/simd.h"

namespace loraplex {
namespace {

template <typename T>
void gate_row(const T* gate, const T* up, T* out, int64_t intermediate) {
  const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  for (int64_t i = 0; i < intermediate; i += kLanes) {
    const int lanes = static_cast<int>(intermediate - i < kLanes ? intermediate - i : kLanes);
    const __m256 g = load_first(gate + i, lanes);
    const __m256 silu = rounded<T>(_mm256_div_ps(g, _mm256_add_ps(one, exp(_mm256_xor_ps(g, sign)))));
    store_first(out + i, _mm256_mul_ps(silu, load_first(up + i, lanes)), lanes);
  }
}

struct SiluAndMul {
  const void* gate_up;  // [rows, 2 * intermediate]
  void* out;            // [rows, intermediate]
  int64_t rows, intermediate;
  int64_t dtype;
};

// of a task: what takes a few microseconds
constexpr int64_t kTaskElements = 4096;

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_silu_and_mul(const SiluAndMul* arguments, Jobs* jobs) {
  const SiluAndMul op = *arguments;
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / op.intermediate);
  with_type(static_cast<int32_t>(op.dtype), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    jobs->add((op.rows + task_rows - 1) / task_rows, [=](int64_t task) {
      for (int64_t row = task * task_rows; row < std::min((task + 1) * task_rows, op.rows); ++row) {
        const T* gate = static_cast<const T*>(op.gate_up) + row * 2 * op.intermediate;
        gate_row(gate, gate + op.intermediate, static_cast<T*>(op.out) + row * op.intermediate, op.intermediate);
      }
    });
  });
}
