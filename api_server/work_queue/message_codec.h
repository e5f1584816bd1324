// The envelopes of the step protocol as plain structs: every WorkerMessage and ServerMessage in
// terms of bytes, so that only this file and plan_codec.cc know the generated classes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "api_server/work_queue/messages.h"

namespace wintserve {

inline constexpr uint32_t kWorkQueueProtoVersion = 2;

// In the server's initial metadata, which it sends when it accepts a Hello.
inline constexpr char kAcceptedMetadataKey[] = "wintserve-accepted";

// Full name of the only method; both ends use it with raw bytes.
inline constexpr char kAttachMethod[] = "/wintserve.proto.WorkQueue/Attach";

// What must agree between the builds of all processes.
std::string WorkQueueBuildId();

// A Hello together with what the sender's build says of itself.
struct HelloMessage {
  WorkerHello hello;
  uint32_t proto_version = kWorkQueueProtoVersion;
  std::string build_id = WorkQueueBuildId();
};

using WorkerMessage = std::variant<HelloMessage, ReadyMessage, StepDone, HeartbeatMessage,
                                   PoolDetachedMessage, FaultMessage, AbortedMessage>;

struct EncodedPlan {
  std::string message;  // a whole ServerMessage
  uint64_t plan_hash = 0;
};

std::string EncodeWorkerMessage(const WorkerMessage& message);
std::string EncodeServerMessage(const ConfigureWorker& configure);
std::string EncodeServerMessage(const AttachPool& attach);
std::string EncodeServerMessage(const DetachPool& detach);
std::string EncodeServerMessage(const AbortGroup& abort);
std::string EncodeServerMessage(const ShutdownWorker& shutdown);
EncodedPlan EncodePlanMessage(const StepPlan& plan);

// INVALID_ARGUMENT names the field at fault.
absl::StatusOr<WorkerMessage> DecodeWorkerMessage(std::string_view bytes);
absl::StatusOr<ServerEvent> DecodeServerMessage(std::string_view bytes);

}  // namespace wintserve
