#include "common/check.h"

#include <cstdio>
#include <cstdlib>

namespace wintserve {

void CheckFailed(const char* file, int line, const char* condition, const std::string& message) {
  // stderr and not the log: the log may be what failed.
  std::fprintf(stderr, "%s:%d: CHECK failed: %s%s%s\n", file, line, condition,
               message.empty() ? "" : ": ", message.c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace wintserve
