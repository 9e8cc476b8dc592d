// Runs operations: see jobs.h.
#include "jobs.h"

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

namespace loraplex {

// Where threads wait for each other. A thread that comes early spins for as long as a task usually takes, then lets
// others have the core: on a busy machine the one it waits for may need it.
class Meeting {
 public:
  void wait(int num_threads) {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins)
        _mm_pause();
      else
        sched_yield();
    }
  }

 private:
  // about 40 ns each
  static constexpr int kSpins = 2000;

  std::atomic<int> arrived_{0}, round_{0};
};

void Jobs::work(int thread, int num_threads, Meeting& meeting) {
  for (const auto& stage : stages_) {
    // The jobs of a stage from different ends: what reads memory and what multiplies go on at the same time.
    const int64_t size = static_cast<int64_t>(stage.size());
    for (int64_t i = 0; i < size; ++i) {
      Job& job = *stage[thread % 2 ? size - 1 - i : i];
      for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.run(task);
    }
    if (num_threads > 1 && &stage != &stages_.back()) meeting.wait(num_threads);
  }
}

void Jobs::run() {
  Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1 && total_ > 1)
  work(omp_get_thread_num(), omp_get_num_threads(), meeting);
}

}  // namespace loraplex

using namespace loraplex;

// kernels.cpu.launch: an operation's function, which adds its jobs, and what it takes.
struct Call {
  void (*add)(const void* arguments, Jobs* jobs);
  const void* arguments;
  int64_t side_by_side;  // with the call before it
};

extern "C" void loraplex_run(const Call* calls, int64_t count, int threads) {
  Jobs jobs(threads);
  for (int64_t i = 0; i < count; ++i) {
    if (!calls[i].side_by_side) jobs.new_stage();
    calls[i].add(calls[i].arguments, &jobs);
  }
  jobs.run();
}

// kernels.cpu.recording: a word of an operation's arguments that is another for each batch.
struct Patch {
  int64_t* word;
  int64_t source, count, per_row, offset;  // word = values[source] + values[count] * per_row + offset
};

extern "C" void loraplex_replay(const Patch* patches, int64_t num_patches, const int64_t* values, const Call* calls,
                                int64_t num_calls, int threads) {
  for (const Patch* patch = patches; patch != patches + num_patches; ++patch)
    *patch->word = values[patch->source] + values[patch->count] * patch->per_row + patch->offset;
  loraplex_run(calls, num_calls, threads);
}
