// What the engine asks of whoever supervises the engine workers' processes, and hears from it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace wintserve {

// From a thread of its own; must not block.
struct WorkerProcessEvents {
  // Whether exits are told from now on: false once the supervisor is out of reach.
  std::function<void(bool watching)> on_watching;
  // The process has been reaped. kv_trusted: see WorkerExit in proto/supervisor.proto. text: "was
  // ended by signal 9", "exited with code 70".
  std::function<void(uint32_t rank, uint64_t worker_id, bool kv_trusted, const std::string& text)>
      on_exit;
};

// No event comes once it is destroyed. Threading: one thread calls.
class WorkerProcesses {
 public:
  virtual ~WorkerProcesses() = default;
  // Has the process killed, unless the rank's process is another one by now. Does not block.
  // at_fault: it hangs by itself, and too many such faults end the instance.
  virtual void End(uint32_t rank, uint64_t worker_id, bool at_fault) = 0;
};

using WorkerProcessWatcher =
    std::function<std::unique_ptr<WorkerProcesses>(WorkerProcessEvents events)>;

}  // namespace wintserve
