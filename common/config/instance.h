// What the launcher hands to each child, as JSON in a sealed memfd named by --instance-fd=N (argv is
// world-readable, and the token is a secret).
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"
#include "common/unique_fd.h"

namespace wintserve {

struct Instance {
  ServeOptions options;          // effective: validated, defaults filled in
  std::string token;             // 32 random bytes; every socket of the instance demands them
  std::string runtime_dir;       // 0700, holds the Unix sockets below; removed by the launcher
  int rank = 0;                  // engine worker only
  int http_fd = -1;              // API server only: bound, listening, inherited
  int metrics_fd = -1;           // API server only: -1 when /metrics is on the HTTP port
  std::string mode = "serve";    // API server only: "serve" or "generate"
  std::string generate_json;     // API server only, mode "generate": the request

  std::string work_queue_socket() const { return runtime_dir + "/work_queue.sock"; }
  std::string cache_socket() const { return runtime_dir + "/cache.sock"; }
  std::string memory_socket() const { return runtime_dir + "/memory.sock"; }
  std::string supervisor_socket() const { return runtime_dir + "/supervisor.sock"; }
};

// A sealed memfd that holds `instance`; inheritable (no close-on-exec). Read it with ReadInstance.
absl::StatusOr<UniqueFd> WriteInstance(const Instance& instance);

// Reads what WriteInstance wrote. INVALID_ARGUMENT: not such a file.
absl::StatusOr<Instance> ReadInstance(int fd);

}  // namespace wintserve
