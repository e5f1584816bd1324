#include "engine_worker/collectives/shm/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace wintserve {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
static_assert(std::atomic<uint32_t>::is_always_lock_free, "a lock would not cross processes");

void FutexWait(std::atomic<uint32_t>* word, uint32_t expected, int64_t timeout_us) {
  const timespec timeout = {.tv_sec = static_cast<time_t>(timeout_us / 1'000'000),
                            .tv_nsec = static_cast<long>(timeout_us % 1'000'000 * 1'000)};
  ::syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  ::syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace wintserve
