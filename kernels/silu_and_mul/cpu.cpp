// silu(gate) * up, eight elements at a time.
#include <type_traits>

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

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// gate_up: [rows, 2 * intermediate], out: [rows, intermediate], both of `dtype`.
extern "C" void loraplex_silu_and_mul(const void* gate_up, void* out, int32_t dtype, int64_t rows, int64_t intermediate,
                                      int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (rows * intermediate > 8192)
    for (int64_t row = 0; row < rows; ++row) {
      const T* gate = static_cast<const T*>(gate_up) + row * 2 * intermediate;
      gate_row(gate, gate + intermediate, static_cast<T*>(out) + row * intermediate, intermediate);
    }
  });
}
