// Memory that another process made, as it comes over a socket.
#pragma once

#include <cstdint>
#include <vector>

#include "common/unique_fd.h"

namespace wintserve {

// Owns descriptors whose memory stands one behind the other in one range of addresses. It is not
// mapped yet: common/mapped_memory.h maps memory of the host, a kernels::Backend also a GPU's.
struct SharedMemory {
  enum class Kind {
    kHost,  // sealed memfds
    kGpu,   // allocations of a GPU's driver (CUDA's virtual memory management)
  };
  struct Part {
    UniqueFd fd;
    int64_t size_bytes = 0;
  };

  Kind kind = Kind::kHost;
  int64_t size_bytes = 0;  // that are of use; a GPU's parts, which have its granularity, hold more
  std::vector<Part> parts;
};

}  // namespace wintserve
