// CHECK: for our own bugs only. What the world does wrong (a request, a file, a peer) is a Status.
#pragma once

#include <fmt/core.h>

namespace wintserve {

// Logs "file:line: CHECK failed: condition: message" and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              const std::string& message);

}  // namespace wintserve

// CHECK(num_free >= 0, "num_free={} num_blocks={}", num_free, num_blocks);
#define CHECK(condition, ...)                                                                \
  do {                                                                                       \
    if (!(condition)) [[unlikely]] {                                                         \
      ::wintserve::CheckFailed(__FILE__, __LINE__, #condition, fmt::format("" __VA_ARGS__)); \
    }                                                                                        \
  } while (false)
