// The product with vectors of eight.
#include "panels.h"

namespace loraplex {
namespace {

struct Panel {
  static constexpr int kRows = 6, kPanels = 1;  // 6 rows x 2 vectors + 2 of the weight + 1 of x = 15 of 16 registers
  static constexpr int kAccumulators = 6;       // panels

  __m256 low, high;

  static Panel zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static __m256 broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  template <typename W>
  static Panel load(const W* w) {
    return {loraplex::load(w), loraplex::load(w + kLanes)};
  }
  static Panel load_first(const float* p, int n) {
    if (n >= kPanel) return load(p);
    float lanes[kPanel] = {};
    std::memcpy(lanes, p, n * sizeof(float));
    return load(lanes);
  }

  void add_product(__m256 x, const Panel& w) {
    low = fma(x, w.low, low);
    high = fma(x, w.high, high);
  }
  void add(const Panel& other) {
    low = _mm256_add_ps(low, other.low);
    high = _mm256_add_ps(high, other.high);
  }
  void store_first(float* p, int n) const {
    float lanes[kPanel];
    float* to = n >= kPanel ? p : lanes;
    store(to, low);
    store(to + kLanes, high);
    if (n < kPanel) std::memcpy(p, lanes, n * sizeof(float));
  }
};

}  // namespace

void linear_avx2(const Linear& op, Jobs& jobs) { add<Panel>(op, jobs); }

}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_linear(const Linear* op, Jobs* jobs) {
  (op->lanes == 16 ? linear_avx512 : linear_avx2)(*op, *jobs);
}
