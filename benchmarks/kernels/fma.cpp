// The most multiply-adds a core can do: twelve independent chains in registers. Each begins with another number that the
// compiler does not know: chains that are the same in every step, or never change, are none to it.
#include <cstdint>

typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));

template <typename V>
__attribute__((always_inline)) inline float chains(int64_t rounds) {
  V sums[12], factor = V{} + 0.999f, addend = V{} + 0.001f;
  for (int i = 0; i < 12; ++i) sums[i] = V{} + static_cast<float>(rounds + i);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (V& sum : sums) sum = sum * factor + addend;
  V total = {};
  for (const V& sum : sums) total += sum;
  return total[0];
}

extern "C" __attribute__((target("avx2,fma"))) float fma_eight(int64_t rounds) { return chains<Eight>(rounds); }
extern "C" __attribute__((target("avx512f"))) float fma_sixteen(int64_t rounds) { return chains<Sixteen>(rounds); }
