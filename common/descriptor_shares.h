// How the descriptors that one process may open are shared out, so that no peer can take those that
// others, or the process itself, need: without one gRPC and the kernel's accept fail for everybody.
#pragma once

#include <cstdint>

namespace wintserve {

// How many connections may be open at once.
struct DescriptorShares {
  int64_t queue = 0;  // to each of the two sockets of a gRPC queue
  int64_t http = 0;   // of the API server: all that is left but for what it needs itself
};

// Of a process that may open `limit` descriptors. Never less than a few.
DescriptorShares ShareDescriptors(int64_t limit);

// Of this process, by RLIMIT_NOFILE as it is now. Any thread.
DescriptorShares OwnDescriptorShares();

}  // namespace wintserve
