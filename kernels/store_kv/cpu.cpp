// Rotates query and key and writes key and value into their slots: one pass over the fused projection.
#include <algorithm>
#include <type_traits>

#include "../cpu/jobs.h"
#include "../cpu/simd.h"

namespace loraplex {
namespace {

// A tensor [num_tokens, heads, head_dim] whose heads are contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t heads, token_stride, head_stride;
};

struct StoreKv {
  Heads query, key, value;
  void* rotated;          // [num_tokens, query heads, head_dim]
  void* pages;            // element (page, key or value, slot, head, 0) of one layer by the strides below
  const float* cos_sin;   // [max_positions, 2, head_dim / 2]
  const int64_t* positions;
  const int64_t* slots;   // page * page_size + offset
  int64_t num_tokens, head_dim, page_size, page_stride, value_offset, slot_stride, head_stride;
  int32_t x_dtype;  // of query, key, value and rotated
  int32_t page_dtype;
};

constexpr int64_t kTaskTokens = 8;

// Product, product, difference: three roundings in float32, as the reference has them, then one to X and one to Y.
template <typename X, typename Y>
void rotate(const X* x, const float* cosines, const float* sines, Y* out, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int lanes = static_cast<int>(half - i < kLanes ? half - i : kLanes);
    const __m256 first = load_first(x + i, lanes), second = load_first(x + half + i, lanes);
    const __m256 c = load_first(cosines + i, lanes), s = load_first(sines + i, lanes);
    const __m256 low = _mm256_sub_ps(_mm256_mul_ps(first, c), _mm256_mul_ps(second, s));
    const __m256 high = _mm256_add_ps(_mm256_mul_ps(second, c), _mm256_mul_ps(first, s));
    store_first(out + i, rounded<X>(low), lanes);
    store_first(out + half + i, rounded<X>(high), lanes);
  }
}

template <typename X, typename Y>
void copy(const X* x, Y* out, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int lanes = static_cast<int>(size - i < kLanes ? size - i : kLanes);
    store_first(out + i, load_first(x + i, lanes), lanes);
  }
}

template <typename X>
const X* head_of(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<const X*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

template <typename X, typename Y>
void store_token(const StoreKv& op, int64_t token) {
  const int64_t half = op.head_dim / 2, slot = op.slots[token];
  const float* cosines = op.cos_sin + op.positions[token] * op.head_dim;
  const float* sines = cosines + half;
  X* rotated = static_cast<X*>(op.rotated) + token * op.query.heads * op.head_dim;
  Y* keys = static_cast<Y*>(op.pages) + slot / op.page_size * op.page_stride + slot % op.page_size * op.slot_stride;
  for (int64_t head = 0; head < op.query.heads; ++head)
    rotate(head_of<X>(op.query, token, head), cosines, sines, rotated + head * op.head_dim, half);
  for (int64_t head = 0; head < op.key.heads; ++head) {
    Y* key = keys + head * op.head_stride;
    rotate(head_of<X>(op.key, token, head), cosines, sines, key, half);
    copy(head_of<X>(op.value, token, head), key + op.value_offset, op.head_dim);
  }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_store_kv(const StoreKv* arguments, Jobs* jobs) {
  const StoreKv op = *arguments;
  with_type(op.x_dtype, [&](auto* x) {
    with_type(op.page_dtype, [&](auto* page) {
      using X = std::remove_pointer_t<decltype(x)>;
      using Y = std::remove_pointer_t<decltype(page)>;
      jobs->add((op.num_tokens + kTaskTokens - 1) / kTaskTokens, [=](int64_t task) {
        const int64_t end = std::min((task + 1) * kTaskTokens, op.num_tokens);
        for (int64_t token = task * kTaskTokens; token < end; ++token) store_token<X, Y>(op, token);
      });
    });
  });
}
