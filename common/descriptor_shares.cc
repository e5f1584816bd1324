#include "common/descriptor_shares.h"

#include <sys/resource.h>

#include <algorithm>
#include <limits>

namespace wintserve {
namespace {

// Beside connections: listeners, gRPC, event loops, log, shared memory.
constexpr int64_t kOwnDescriptors = 128;
constexpr int64_t kMostOfAQueue = 1024;
constexpr int64_t kFewest = 16;

}  // namespace

DescriptorShares ShareDescriptors(int64_t limit) {
  DescriptorShares shares;
  shares.queue = std::clamp(limit / 8, kFewest, kMostOfAQueue);
  shares.http = std::max(limit - 2 * shares.queue - kOwnDescriptors, kFewest);
  return shares;
}

DescriptorShares OwnDescriptorShares() {
  rlimit limit = {};
  constexpr int64_t kNoLimit = std::numeric_limits<int32_t>::max();
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return ShareDescriptors(0);
  return ShareDescriptors(
      static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, static_cast<rlim_t>(kNoLimit))));
}

}  // namespace wintserve
