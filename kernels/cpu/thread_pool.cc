#include "kernels/cpu/thread_pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>

#include "common/check.h"
#include "kernels/cpu/work_split.h"

namespace wintserve::kernels::cpu {
namespace {

// A futex wake-up costs more than most gaps between two loops of a decode step: looking this long
// took a one-row step of the demo model from 0.94 to 0.73 ms on two Zen 4 cores; 6 us gained no
// more than noise.
constexpr auto kSpinTime = std::chrono::microseconds(2);

int NumUsableCores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
  return CPU_COUNT(&cores);
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void FutexWait(const std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWakeAll(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : may_spin_(num_threads <= NumUsableCores()) {
  CHECK(num_threads >= 1, "num_threads={}", num_threads);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { WorkerLoop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  FutexWakeAll(generation_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t num_items, int64_t multiply_adds, Function fn) {
  CHECK(num_items >= 0 && num_items < INT_MAX, "num_items={}", num_items);
  if (workers_.empty() || num_items <= 1 || multiply_adds < kMinParallelMultiplyAdds) {
    for (int64_t item = 0; item < num_items; ++item) fn(item, 0);
    return;
  }
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  num_open_.store(static_cast<uint32_t>(num_items), std::memory_order_relaxed);
  function_.store(&fn, std::memory_order_relaxed);
  num_items_.store(static_cast<uint32_t>(num_items), std::memory_order_relaxed);
  ticket_.store(uint64_t{generation} << 32 | static_cast<uint32_t>(num_items),
                std::memory_order_release);
  generation_.store(generation);
  if (num_sleeping_.load() > 0) FutexWakeAll(generation_);

  RunItems(/*thread=*/0);

  // A worker may still run an item, but none waits to be woken for one: sleepers claimed nothing.
  for (uint32_t open = num_open_.load(std::memory_order_acquire); open != 0;
       open = num_open_.load(std::memory_order_acquire)) {
    caller_sleeps_.store(true);
    WaitWhileEqual(num_open_, open);
    caller_sleeps_.store(false);
  }
}

void ThreadPool::RunItems(int thread) {
  const auto threads = static_cast<uint32_t>(num_threads());
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  const uint64_t generation = ticket >> 32;
  while (ticket >> 32 == generation) {
    const auto num_unclaimed = static_cast<uint32_t>(ticket);
    if (num_unclaimed == 0) return;
    const Function* function = function_.load(std::memory_order_relaxed);
    const uint32_t first = num_items_.load(std::memory_order_relaxed) - num_unclaimed;
    // Large claims first, single items at the end: few claims and an even finish.
    const uint32_t count = std::max<uint32_t>(1, num_unclaimed / (2 * threads));
    if (!ticket_.compare_exchange_weak(ticket, ticket - count, std::memory_order_acq_rel)) continue;
    for (uint32_t item = first; item < first + count; ++item) (*function)(item, thread);
    // The caller needs every decrement's writes, hence release; seq_cst orders it with the flag.
    if (num_open_.fetch_sub(count) == count && thread != 0 && caller_sleeps_.load()) {
      FutexWakeAll(num_open_);
    }
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  while (!stopping_.load(std::memory_order_relaxed)) {
    WaitWhileEqual(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    RunItems(thread);
  }
}

void ThreadPool::WaitWhileEqual(const std::atomic<uint32_t>& word, uint32_t old_value) {
  if (may_spin_) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < 8; ++i) {
        if (word.load(std::memory_order_acquire) != old_value) return;
        Pause();
      }
    } while (std::chrono::steady_clock::now() < deadline);
  }
  num_sleeping_.fetch_add(1);
  while (word.load() == old_value) FutexWait(word, old_value);
  num_sleeping_.fetch_sub(1);
}

}  // namespace wintserve::kernels::cpu
