// Rows of a matrix, or of a weight in panels, where the elements of a row lie `panel` apart.
#include <algorithm>
#include <cstring>

#include "../cpu/jobs.h"
#include "../cpu/simd.h"

namespace loraplex {
namespace {

struct TakeRows {
  const void* source;   // [source_rows, width], or [ceil(source_rows / panel), width, panel]
  const int64_t* rows;  // [count]
  void* out;            // [count, width]
  int64_t count, source_rows, width, panel, element_bytes;
};

// of a task: what takes a few microseconds
constexpr int64_t kTaskElements = 4096;

// Elements are copied as bits. A row that is not there becomes NaN: all bits set, in every dtype.
template <typename T>
void take(const TakeRows& op, int64_t index) {
  T* out = static_cast<T*>(op.out) + index * op.width;
  const int64_t row = op.rows[index];
  if (row < 0 || row >= op.source_rows) {
    std::memset(out, 0xff, op.width * sizeof(T));
    return;
  }
  const T* source = static_cast<const T*>(op.source) + row / op.panel * op.width * op.panel + row % op.panel;
  if (op.panel == 1) {
    std::memcpy(out, source, op.width * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < op.width; ++i) out[i] = source[i * op.panel];
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

extern "C" void loraplex_take_rows(const TakeRows* arguments, Jobs* jobs) {
  const TakeRows op = *arguments;
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / op.width);
  jobs->add((op.count + task_rows - 1) / task_rows, [=](int64_t task) {
    for (int64_t index = task * task_rows; index < std::min((task + 1) * task_rows, op.count); ++index)
      op.element_bytes == 4 ? take<uint32_t>(op, index) : take<uint16_t>(op, index);
  });
}
