#include "engine_worker/runner/stall_watch.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace wintserve {
namespace {

// How often it looks, as a share of the timeout: by so much later it may notice.
constexpr int64_t kLooksPerTimeout = 20;
constexpr int64_t kLongestPauseMs = 1'000;

}  // namespace

uint64_t DiskProgress() {
  // A page that was read ahead for a mapping counts for one major fault, what a read() waits for as
  // input of blocks.
  rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_majflt) + static_cast<uint64_t>(usage.ru_inblock);
}

StallWatch::StallWatch(int64_t timeout_ms, std::function<uint64_t()> progress,
                       std::function<void()> on_stall)
    : progress_(std::move(progress)), on_stall_(std::move(on_stall)) {
  if (timeout_ms > 0) thread_ = std::thread([this, timeout_ms] { Run(timeout_ms); });
}

StallWatch::~StallWatch() {
  {
    MutexLock lock(&mutex_);
    is_over_ = true;
    changed_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void StallWatch::Run(int64_t timeout_ms) {
  using std::chrono::milliseconds;
  using std::chrono::steady_clock;
  const milliseconds pause(std::clamp<int64_t>(timeout_ms / kLooksPerTimeout, 1, kLongestPauseMs));
  uint64_t last = progress_();
  milliseconds stalled(0);
  while (true) {
    const auto begin = steady_clock::now();
    {
      MutexLock lock(&mutex_);
      const bool is_over =
          changed_.WaitFor(&mutex_, pause, [this]() NO_THREAD_SAFETY_ANALYSIS { return is_over_; });
      if (is_over) return;
    }
    const uint64_t now = progress_();
    if (now != std::exchange(last, now)) {
      stalled = milliseconds(0);
      continue;
    }
    // A process that was stopped as a whole has not had that time.
    const auto waited = std::chrono::duration_cast<milliseconds>(steady_clock::now() - begin);
    stalled += std::min(waited, 2 * pause);
    if (stalled < milliseconds(timeout_ms)) continue;
    on_stall_();
    return;
  }
}

}  // namespace wintserve
