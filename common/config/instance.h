// What the launcher hands to each child, as JSON in a sealed memfd named by --instance-fd=N (argv
// is world-readable, and the token is a secret).
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"
#include "common/unique_fd.h"

namespace wintserve {

struct Instance {
  ServeOptions options;        // effective: validated, defaults filled in
  std::string token;           // 32 random bytes; every socket of the instance demands them
  std::string runtime_dir;     // 0700, holds the Unix sockets below; removed by the launcher
  int rank = 0;                // engine worker only
  uint64_t worker_id = 0;      // engine worker only: of this process, random
  bool restarted = false;      // engine worker only: its rank had a process before
  int http_fd = -1;            // API server only: bound, listening, inherited
  int metrics_fd = -1;         // API server only: -1 when /metrics is on the HTTP port
  int start_fd = -1;           // inherited; see common/start_pulse.h
  std::string mode = "serve";  // API server only: "serve" or "generate"
  // API server only, mode "generate": the request, as a JSON object with every one of these keys:
  //   "prompt" string, "chat" bool (render it as one user message; false: use it as it is),
  //   "temperature" and "top_p" number or null (the model's default), "top_k" int (0: off),
  //   "max_tokens" int or null (what the model length leaves), "seed" int or null (a random one),
  //   "stop" list of strings, "print_ids" bool (print token ids instead of text).
  std::string generate_json;

  std::string work_queue_socket() const { return runtime_dir + "/work_queue.sock"; }
  std::string cache_socket() const { return runtime_dir + "/cache.sock"; }
  std::string memory_socket() const { return runtime_dir + "/memory.sock"; }
  std::string supervisor_socket() const { return runtime_dir + "/supervisor.sock"; }
};

// A sealed memfd that holds `instance`; inheritable (no close-on-exec). Read it with ReadInstance.
absl::StatusOr<UniqueFd> WriteInstance(const Instance& instance);

// Reads what WriteInstance wrote. INVALID_ARGUMENT: not such a file.
absl::StatusOr<Instance> ReadInstance(int fd);

// How every child's main begins: finds --instance-fd=N, its only argument, reads the instance and
// closes N. INVALID_ARGUMENT (exit kExitUsage): started by hand, or with another argument.
absl::StatusOr<Instance> InstanceFromArgv(int argc, const char* const* argv);

}  // namespace wintserve
