// The API server's end of the step protocol: one stream per engine worker rank.
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

struct WorkQueueServerOptions {
  std::string unix_socket = {};  // path; bound by Start, then ours to unlink
  std::string tcp_address = {};  // "127.0.0.1:8471"; empty: the Unix socket only
  TlsIdentity tls = {};          // of the TCP port
  std::string token = {};  // streams without it end with UNAUTHENTICATED and learn nothing more
  uint32_t world_size = 1;
  // A stream is sent nothing, but for ShutdownWorker, before Accept of its rank.
  bool wait_for_accept = false;
};

// Called from gRPC's threads, in order for one rank; must not block. A rank is known by its number
// from on_hello to on_detached, and no other event of that rank comes outside of the two. Then the
// rank may attach anew, as the same process or as its replacement.
struct WorkQueueEvents {
  std::function<void(const WorkerHello&)> on_hello;
  std::function<void(uint32_t rank, const ReadyMessage&)> on_ready;
  std::function<void(uint32_t rank, StepDone)> on_step_done;
  std::function<void(uint32_t rank, const HeartbeatMessage&)> on_heartbeat;
  std::function<void(uint32_t rank, const PoolDetachedMessage&)> on_pool_detached;
  std::function<void(uint32_t rank, const FaultMessage&)> on_fault;
  std::function<void(uint32_t rank, const AbortedMessage&)> on_aborted;
  // The stream has ended; whether its process has, it does not say. worker_id: of the Hello.
  // status: UNAVAILABLE, or why the server has cut it: INVALID_ARGUMENT for what is no message of
  // this protocol, FAILED_PRECONDITION for one out of order.
  std::function<void(uint32_t rank, uint64_t worker_id, const absl::Status& status)> on_detached;
  // A worker with the right token whose Hello does not fit: another build, world size or
  // checkpoint, or a rank that is taken. It has been sent away with the same text.
  std::function<void(const std::string& reason)> on_refused;
};

// Owns the listening sockets and the streams. Threading: any thread; a call only queues a message.
// A message for a rank that is not attached is dropped: on_detached is on its way.
class WorkQueueServer {
 public:
  // UNAVAILABLE names the addresses that cannot be bound.
  static absl::StatusOr<std::unique_ptr<WorkQueueServer>> Start(
      const WorkQueueServerOptions& options, WorkQueueEvents events);
  virtual ~WorkQueueServer() = default;  // Stop(0)

  // With wait_for_accept: to be called once for every on_hello of the rank, when it has been taken
  // note of. What is sent until then was meant for the stream before.
  virtual void Accept(uint32_t rank) = 0;
  // Ends the rank's stream; on_detached follows.
  virtual void Cut(uint32_t rank) = 0;

  virtual void Send(uint32_t rank, const DetachPool& detach) = 0;
  virtual void Send(uint32_t rank, const AbortGroup& abort) = 0;
  // To every attached rank.
  virtual void Send(const ConfigureWorker& configure) = 0;
  virtual void Send(const AttachPool& attach) = 0;
  virtual void Send(const DetachPool& detach) = 0;
  virtual void Send(const AbortGroup& abort) = 0;
  virtual void Send(const ShutdownWorker& shutdown) = 0;
  // Serialises once and sends the same bytes to every rank. Returns the plan's hash.
  virtual uint64_t SendPlan(const StepPlan& plan) = 0;

  // Waits up to grace_ms for the workers to leave, then cuts their streams. No event comes after it
  // has returned.
  virtual void Stop(int64_t grace_ms) = 0;
};

}  // namespace wintserve
