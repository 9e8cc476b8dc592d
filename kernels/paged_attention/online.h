// Softmax over keys that come tile by tile, and the merging of parts: what makes a row's bits follow from its own
// position alone. Only float32, one row at a time.
#pragma once

#include <cmath>

#include "../cpu/simd.h"

namespace loraplex {

// Of one row over some keys: the largest score, the sum of e^(score - largest), and the values weighted by the same.
struct Part {
  float largest, total;
  float* mixed;  // [width], whole vectors

  void clear(int64_t width) {
    largest = -INFINITY;
    total = 0.0f;
    for (int64_t i = 0; i < width; i += kLanes) store(mixed + i, _mm256_setzero_ps());
  }

  void scale(float factor, int64_t width) {
    total *= factor;
    for (int64_t i = 0; i < width; i += kLanes)
      store(mixed + i, _mm256_mul_ps(load(mixed + i), _mm256_set1_ps(factor)));
  }

  // A part of later keys.
  void merge(const Part& later, int64_t width) {
    const float top = std::fmax(largest, later.largest);
    scale(exp(largest - top), width);
    const float factor = exp(later.largest - top);
    total = std::fma(later.total, factor, total);
    for (int64_t i = 0; i < width; i += kLanes)
      store(mixed + i, fma(load(later.mixed + i), _mm256_set1_ps(factor), load(mixed + i)));
    largest = top;
  }
};

// Turns scores [low, high) into weights relative to the part's new largest. Whole vectors are worked on: the lanes
// beside the range become 0, which adds nothing to any lane's sum.
inline void weigh(float* scores, int64_t low, int64_t high, float scale, Part& part, int64_t width) {
  const int64_t begin = low / kLanes * kLanes, end = (high + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = begin; i < low; ++i) scores[i] = -INFINITY;
  for (int64_t i = high; i < end; ++i) scores[i] = -INFINITY;
  __m256 top = _mm256_set1_ps(-INFINITY);
  for (int64_t i = begin; i < end; i += kLanes) {
    const __m256 scaled = _mm256_mul_ps(load(scores + i), _mm256_set1_ps(scale));
    store(scores + i, scaled);
    top = _mm256_max_ps(top, scaled);
  }
  const float largest = std::fmax(part.largest, max(top));
  if (largest > part.largest) part.scale(exp(part.largest - largest), width);
  part.largest = largest;
  __m256 total = _mm256_setzero_ps();
  for (int64_t i = begin; i < end; i += kLanes) {
    const __m256 weight = exp(_mm256_sub_ps(load(scores + i), _mm256_set1_ps(largest)));
    store(scores + i, weight);
    total = _mm256_add_ps(total, weight);
  }
  part.total += sum(total);
}

}  // namespace loraplex
