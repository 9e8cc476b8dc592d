// Operations as tasks that threads share, many operations in one parallel region: to wake a sleeping thread takes tens of
// microseconds, to meet one that is awake takes less than one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace loraplex {

// Tasks 0 to `count` - 1, in any order, on any threads.
class Job {
 public:
  explicit Job(int64_t count) : count(count) {}
  virtual ~Job() = default;
  virtual void run(int64_t task) = 0;

  const int64_t count;
  // the first task that nobody has taken
  std::atomic<int64_t> next{0};
};

// What is to be done: stages one after the other, the jobs of a stage side by side.
class Jobs {
 public:
  explicit Jobs(int threads) : threads(threads) {}

  // The next job starts when all before it have ended.
  void new_stage() { fresh_ = true; }

  template <typename F>
  void add(int64_t count, F run) {
    struct Made final : Job {
      Made(int64_t count, F run) : Job(count), run_(std::move(run)) {}
      void run(int64_t task) override { run_(task); }
      F run_;
    };
    if (count <= 0) return;
    if (fresh_ || stages_.empty()) stages_.emplace_back();
    fresh_ = false;
    stages_.back().push_back(std::make_unique<Made>(count, std::move(run)));
    total_ += count;
  }

  void run();

  const int threads;

 private:
  void work(int thread, int num_threads, class Meeting& meeting);

  std::vector<std::vector<std::unique_ptr<Job>>> stages_;
  int64_t total_ = 0;
  bool fresh_ = true;
};

}  // namespace loraplex
