// Linux futexes on a word that several processes map.
#pragma once

#include <atomic>
#include <cstdint>

namespace wintserve {

// Sleeps while *word == expected, until a wake, at most timeout_us. Spurious returns happen: the
// caller looks at the word again.
void FutexWait(std::atomic<uint32_t>* word, uint32_t expected, int64_t timeout_us);

// Wakes every sleeper on *word.
void FutexWakeAll(std::atomic<uint32_t>* word);

}  // namespace wintserve
