// `wintserve serve` for the time of an evaluation.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/child_process.h"
#include "common/unique_fd.h"

namespace wintserve::eval {

struct LocalServerOptions {
  std::string program;  // path of `wintserve`
  std::string model;
  std::vector<std::string> flags;
  std::string log_path;  // empty: a file without a name, for LogTail
  std::string api_key;   // empty: a random one
  int loading_fd = -1;   // a descriptor that shows how far loading is; -1: only the log does
};

// Listens on loopback, on free ports, and asks for a key, so that nobody else is served. Dies with
// the thread that started it; destruction stops it (SIGTERM, then SIGKILL after a while) with all
// its processes. Threading: the thread that started it, which must be the main thread.
class LocalServer {
 public:
  // Returns once the program runs. Errors: it cannot be started; the log cannot be written.
  static absl::StatusOr<LocalServer> Start(const LocalServerOptions& options);
  LocalServer(LocalServer&&) = default;
  LocalServer& operator=(LocalServer&&) = delete;

  const std::string& url() const { return url_; }
  const std::string& api_key() const { return api_key_; }
  // Readable once the process has ended; -1 after Exit().
  int pidfd() const { return process_.pidfd(); }

  // Whether it answers /ready with 200. Waits for an answer for a second at most.
  bool IsReady() const;
  // How it ended; empty while it runs. A server that ended because its port had been taken in the
  // meantime is worth another Start: kExitUnavailable.
  std::optional<ChildExit> Exit() { return process_.Wait(0); }
  void Stop();

  // The last lines of its log, each ending in a newline.
  std::string LogTail() const;

 private:
  LocalServer() = default;

  std::string url_;
  std::string api_key_;
  UniqueFd log_;
  ChildProcess process_;
};

}  // namespace wintserve::eval
