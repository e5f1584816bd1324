// What a child asks the launcher for through supervisor.sock.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace wintserve {

// Tells the launcher that the cache manager hangs: it is killed and started again. Blocks for up to
// timeout_ms. UNAVAILABLE: no launcher there, or it refuses the token.
absl::Status RequestCacheManagerRestart(const std::string& socket_path, const std::string& token,
                                        int64_t timeout_ms);

// Has the launcher kill that process, unless the rank's process is another one by now. at_fault:
// see EndWorker in proto/supervisor.proto. Otherwise as above.
absl::Status RequestEndOfWorker(const std::string& socket_path, const std::string& token,
                                uint32_t rank, uint64_t worker_id, bool at_fault,
                                int64_t timeout_ms);

// How far an engine worker has got; see LoadProgress in proto/supervisor.proto.
struct LoadProgressNotice {
  uint32_t rank = 0;
  uint64_t worker_id = 0;
  int64_t done_bytes = 0;   // 0..total_bytes
  int64_t total_bytes = 0;  // > 0
};

// For the launcher's console. Blocks for up to twice timeout_ms. INVALID_ARGUMENT: the launcher
// says that it cannot be so. Otherwise as above.
absl::Status TellLoadProgress(const std::string& socket_path, const std::string& token,
                              const LoadProgressNotice& notice, int64_t timeout_ms);

}  // namespace wintserve
