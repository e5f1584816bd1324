// An engine worker's end of the step protocol.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "api_server/work_queue/messages.h"
#include "common/transport/tls_files.h"

namespace wintserve {

// Threading: Next() from one thread; all else from any thread (serialised inside).
// A Send… returns UNAVAILABLE once the stream has ended; Next() then says why.
class WorkQueueClient {
 public:
  // target: "unix:/run/…/work_queue.sock" or "host:port"; only the latter uses `tls`, and then the
  // server's certificate has to name that host. Returns once the server has accepted the
  // Hello. UNAVAILABLE: no server there within timeout_ms. UNAUTHENTICATED: another instance's
  // token. FAILED_PRECONDITION: the Hello does not fit (rank taken, other world size, build or
  // checkpoint).
  static absl::StatusOr<std::unique_ptr<WorkQueueClient>> Attach(const std::string& target,
                                                                 const std::string& token,
                                                                 const WorkerHello& hello,
                                                                 int64_t timeout_ms,
                                                                 const TlsIdentity& tls = {});
  virtual ~WorkQueueClient() = default;  // closes; no other call may be under way

  // Blocks for the next message. UNAVAILABLE: the stream ended (the API server is gone, or Close).
  // INVALID_ARGUMENT: the server sent something that is no message of this protocol.
  virtual absl::StatusOr<ServerEvent> Next() = 0;

  // Calls `interrupt` as soon as an AbortGroup has arrived, with its group_epoch, or the stream has
  // ended, with 0: on the stream's own thread and ahead of Next(), whose caller may be waiting for
  // a group that does not answer. What has arrived by now counts, too. It must not block, nor call
  // this. Returns when no call is under way. nullptr: none any more.
  virtual void SetInterrupt(std::function<void(uint64_t group_epoch)> interrupt) = 0;

  virtual absl::Status SendReady(uint64_t group_epoch, uint64_t pool_epoch) = 0;
  virtual absl::Status SendPoolDetached(uint64_t pool_epoch) = 0;  // the answer to DetachPool
  virtual absl::Status SendStepDone(const StepDone& done) = 0;
  virtual absl::Status SendHeartbeat(const HeartbeatMessage& beat) = 0;
  virtual absl::Status SendAborted(uint64_t group_epoch) = 0;  // the answer to AbortGroup
  // kv_trusted: what this rank wrote to KV blocks is right up to the last step that it has
  // reported.
  virtual absl::Status SendFault(FaultKind kind, const std::string& text, bool kv_trusted) = 0;

  // Ends the stream: Next() returns UNAVAILABLE once it has handed out what had arrived.
  virtual void Close() = 0;
};

}  // namespace wintserve
