// Hears from the launcher which engine workers have ended, and has it end some.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/mutex.h"
#include "common/unique_fd.h"

namespace wintserve {

// See WorkerExit in proto/supervisor.proto.
struct WorkerExitNotice {
  uint32_t rank = 0;
  uint64_t worker_id = 0;
  int signal = 0;  // that ended it; 0: it exited with `code`
  int code = 0;
  bool kv_trusted = false;
};

// From the watch's thread; must not block.
struct WorkerWatchEvents {
  // True: from now on every exit is told. False: the launcher is out of reach, and is looked for.
  std::function<void(bool watching)> on_watching;
  std::function<void(const WorkerExitNotice& notice)> on_exit;
};

// Keeps a connection to supervisor.sock, and makes it anew whenever it breaks; exits meanwhile are
// missed. Owns a thread. Threading: any thread; nothing blocks but the destructor, for at most a
// request that is under way (2 s). No event comes afterwards.
class WorkerWatch {
 public:
  WorkerWatch(std::string socket_path, std::string token, WorkerWatchEvents events);
  ~WorkerWatch();
  WorkerWatch(const WorkerWatch&) = delete;
  WorkerWatch& operator=(const WorkerWatch&) = delete;

  // Has the launcher kill the process, unless the rank's process is another one by now. Without a
  // launcher in reach it is logged and forgotten. at_fault: see proto/supervisor.proto.
  void EndWorker(uint32_t rank, uint64_t worker_id, bool at_fault) EXCLUDES(mutex_);

 private:
  struct Order {
    uint32_t rank;
    uint64_t worker_id;
    bool at_fault;
  };

  void Run();
  // Returns when the connection is lost, with the reason, or the watch stops.
  absl::Status Watch();
  // True: something is there to be read from `fd`, which may be -1; false: the time is over. What
  // has been ordered is done meanwhile.
  bool WaitForPacket(int fd, int64_t timeout_ms);
  void SendOrders() EXCLUDES(mutex_);
  bool stopping() EXCLUDES(mutex_);

  const std::string socket_path_;
  const std::string token_;
  const WorkerWatchEvents events_;
  const UniqueFd wake_;  // eventfd: there are orders, or the watch stops
  Mutex mutex_;
  std::vector<Order> orders_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace wintserve
