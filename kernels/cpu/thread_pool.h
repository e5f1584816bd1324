// A small pool that splits one loop at a time over the calling thread and its workers.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace wintserve::kernels::cpu {

// Threading:   one thread calls Run, which is not reentrant.
// Waiting:     on futexes. A worker (and a caller that waits for the last item) first looks for
//              news for at most two microseconds, unless the machine has fewer cores than the pool
//              has threads.
// Determinism: which thread runs an item is not fixed; items must not depend on it.
class ThreadPool {
 public:
  // num_threads >= 1 includes the caller.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(item, thread) once for every item in 0 … num_items-1; thread is in
  // 0 … num_threads()-1 and no two items run on one thread at once. Returns when all are done.
  // multiply_adds is the whole loop's work: below kMinParallelMultiplyAdds the caller does it
  // alone.
  void Run(int64_t num_items, int64_t multiply_adds,
           absl::FunctionRef<void(int64_t item, int thread)> fn);

 private:
  using Function = absl::FunctionRef<void(int64_t item, int thread)>;

  void WorkerLoop(int thread);
  // Claims and runs items until none is left.
  void RunItems(int thread);
  // Returns once word != old_value.
  void WaitWhileEqual(const std::atomic<uint32_t>& word, uint32_t old_value);

  const bool may_spin_;
  std::vector<std::thread> workers_;

  // The loop that runs now. A claim succeeds only by lowering ticket_ = generation << 32 | items
  // that nobody has claimed yet; the caller changes the other fields only after all items of a
  // generation are done, so a claim proves that the fields read before it belong to its generation.
  // The ticket alone says that nothing is left: were that told from num_items_, a late worker could
  // claim from the used-up ticket of one loop what the caller has just put there for the next.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<const Function*> function_{nullptr};
  std::atomic<uint32_t> num_items_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  // Open items of this loop; caller_sleeps_ spares the wake-up when nobody waits.
  alignas(64) std::atomic<uint32_t> num_open_{0};
  std::atomic<bool> caller_sleeps_{false};
};

}  // namespace wintserve::kernels::cpu
