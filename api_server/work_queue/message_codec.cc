#include "api_server/work_queue/message_codec.h"

#include <fmt/core.h>

#include <limits>
#include <optional>
#include <utility>

#include "api_server/work_queue/plan_codec.h"
#include "common/status_macros.h"
#include "proto/work_queue.pb.h"

namespace wintserve {
namespace {

constexpr uint32_t kMaxId = std::numeric_limits<int32_t>::max();  // of tokens

// Field 3 of ServerMessage, length-delimited, as it stands on the wire.
constexpr uint8_t kPlanTag = (proto::ServerMessage::kPlanFieldNumber << 3) | 2;

absl::Status InvalidWorkerMessage(std::string_view what) {
  return absl::InvalidArgumentError(fmt::format("WorkerMessage: {}", what));
}

absl::Status InvalidServerMessage(std::string_view what) {
  return absl::InvalidArgumentError(fmt::format("ServerMessage: {}", what));
}

// The plan's own bytes when the message is a plan and nothing else. They are taken as they came,
// because a plan is hashed "as received" and protobuf does not promise to re-serialise to the same
// bytes.
std::optional<std::string_view> PlanBytes(std::string_view message) {
  if (message.empty() || static_cast<uint8_t>(message[0]) != kPlanTag) return std::nullopt;
  uint64_t length = 0;
  size_t at = 1;
  for (int shift = 0;; shift += 7) {
    if (at >= message.size() || shift > 28) return std::nullopt;
    const uint8_t byte = static_cast<uint8_t>(message[at++]);
    length |= uint64_t{byte & 0x7fu} << shift;
    if ((byte & 0x80) == 0) break;
  }
  if (message.size() - at != length) return std::nullopt;
  return message.substr(at);
}

proto::Fault::Kind ToProto(FaultKind kind) {
  switch (kind) {
    case FaultKind::kCheckpoint:
      return proto::Fault::KIND_CHECKPOINT;
    case FaultKind::kOutOfMemory:
      return proto::Fault::KIND_OUT_OF_MEMORY;
    case FaultKind::kCollective:
      return proto::Fault::KIND_COLLECTIVE;
    case FaultKind::kDevice:
      return proto::Fault::KIND_DEVICE;
    case FaultKind::kInternal:
      return proto::Fault::KIND_INTERNAL;
  }
  return proto::Fault::KIND_INTERNAL;
}

std::optional<FaultKind> FromProto(proto::Fault::Kind kind) {
  switch (kind) {
    case proto::Fault::KIND_CHECKPOINT:
      return FaultKind::kCheckpoint;
    case proto::Fault::KIND_OUT_OF_MEMORY:
      return FaultKind::kOutOfMemory;
    case proto::Fault::KIND_COLLECTIVE:
      return FaultKind::kCollective;
    case proto::Fault::KIND_DEVICE:
      return FaultKind::kDevice;
    case proto::Fault::KIND_INTERNAL:
      return FaultKind::kInternal;
    default:
      return std::nullopt;
  }
}

void Fill(const HelloMessage& from, proto::WorkerMessage* message) {
  proto::Hello* to = message->mutable_hello();
  to->set_proto_version(from.proto_version);
  to->set_build_id(from.build_id);
  to->set_worker_id(from.hello.worker_id);
  to->set_rank(from.hello.rank);
  to->set_world_size(from.hello.world_size);
  to->set_backend(from.hello.backend);
  to->set_weights_digest(from.hello.weights_digest);
  to->set_kv_layout_digest(from.hello.kv_layout_digest);
  to->set_kv_block_bytes(from.hello.kv_block_bytes);
  to->set_kv_bytes_available(from.hello.kv_bytes_available);
  to->set_max_slots(from.hello.max_slots);
  to->set_max_tokens(from.hello.max_tokens);
  to->set_mapped_pool_epoch(from.hello.mapped_pool_epoch);
  to->mutable_model()->set_vocab_size(from.hello.vocab_size);
  to->mutable_model()->set_num_layers(from.hello.num_layers);
  to->mutable_model()->set_max_position(from.hello.max_position);
  to->mutable_model()->set_block_size_tokens(from.hello.block_size_tokens);
}

void Fill(const ReadyMessage& from, proto::WorkerMessage* message) {
  message->mutable_ready()->set_group_epoch(from.group_epoch);
  message->mutable_ready()->set_pool_epoch(from.pool_epoch);
}

void Fill(const PromptRowLogprobs& from, proto::PromptLogprobs* to) {
  to->set_slot(from.slot);
  to->set_position(from.position);
  for (const PositionLogprobs& token : from.tokens) {
    to->add_logprob(token.logprob);
    to->add_rank(static_cast<uint32_t>(token.rank));
    for (const TokenLogprob& top : token.top) {
      to->add_top_token(static_cast<uint32_t>(top.token));
      to->add_top_logprob(top.logprob);
    }
  }
}

void Fill(const StepDone& from, proto::WorkerMessage* message) {
  proto::StepDone* to = message->mutable_step_done();
  to->set_group_epoch(from.group_epoch);
  to->set_step(from.step);
  to->set_plan_hash(from.plan_hash);
  to->set_execute_us(from.execute_us);
  to->set_sampled_digest(from.sampled_digest);
  for (const SampledToken& sampled : from.sampled) {
    to->mutable_result()->add_slot(sampled.slot);
    to->mutable_result()->add_token(static_cast<uint32_t>(sampled.token));
    if (!sampled.logprobs.has_value()) continue;
    proto::Logprobs* logprobs = to->mutable_result()->add_logprobs();
    logprobs->set_entry(static_cast<uint32_t>(to->result().slot_size() - 1));
    logprobs->set_logprob(sampled.logprobs->logprob);
    logprobs->set_rank(static_cast<uint32_t>(sampled.logprobs->rank));
    for (const TokenLogprob& top : sampled.logprobs->top) {
      logprobs->add_top_token(static_cast<uint32_t>(top.token));
      logprobs->add_top_logprob(top.logprob);
    }
  }
  for (const PromptRowLogprobs& row : from.prompt_logprobs) {
    Fill(row, to->mutable_result()->add_prompt_logprobs());
  }
}

void Fill(const HeartbeatMessage& from, proto::WorkerMessage* message) {
  message->mutable_heartbeat()->set_step_started(from.step_started);
  message->mutable_heartbeat()->set_step_done(from.step_done);
  message->mutable_heartbeat()->set_resident_bytes(from.resident_bytes);
  message->mutable_heartbeat()->set_progress(from.progress);
}

void Fill(const PoolDetachedMessage& from, proto::WorkerMessage* message) {
  message->mutable_pool_detached()->set_pool_epoch(from.pool_epoch);
}

void Fill(const FaultMessage& from, proto::WorkerMessage* message) {
  message->mutable_fault()->set_kind(ToProto(from.kind));
  message->mutable_fault()->set_text(from.text);
  message->mutable_fault()->set_kv_trusted(from.kv_trusted);
}

void Fill(const AbortedMessage& from, proto::WorkerMessage* message) {
  message->mutable_aborted()->set_group_epoch(from.group_epoch);
}

HelloMessage ReadHello(const proto::Hello& in) {
  HelloMessage out;
  out.proto_version = in.proto_version();
  out.build_id = in.build_id();
  out.hello = {.worker_id = in.worker_id(),
               .rank = in.rank(),
               .world_size = in.world_size(),
               .backend = in.backend(),
               .weights_digest = in.weights_digest(),
               .kv_layout_digest = in.kv_layout_digest(),
               .kv_block_bytes = in.kv_block_bytes(),
               .kv_bytes_available = in.kv_bytes_available(),
               .max_slots = in.max_slots(),
               .max_tokens = in.max_tokens(),
               .vocab_size = in.model().vocab_size(),
               .num_layers = in.model().num_layers(),
               .max_position = in.model().max_position(),
               .block_size_tokens = in.model().block_size_tokens(),
               .mapped_pool_epoch = in.mapped_pool_epoch()};
  return out;
}

absl::StatusOr<PositionLogprobs> ReadLogprobs(const proto::Logprobs& in) {
  if (in.top_token_size() != in.top_logprob_size()) {
    return InvalidWorkerMessage(
        fmt::format("step_done.result.logprobs.top_logprob has {} entries, top_token has {}",
                    in.top_logprob_size(), in.top_token_size()));
  }
  if (in.rank() > kMaxId) {
    return InvalidWorkerMessage(fmt::format(
        "step_done.result.logprobs.rank is {}, above the largest {}", in.rank(), kMaxId));
  }
  PositionLogprobs out{.logprob = in.logprob(), .rank = static_cast<int32_t>(in.rank())};
  out.top.reserve(in.top_token_size());
  for (int i = 0; i < in.top_token_size(); ++i) {
    if (in.top_token(i) > kMaxId) {
      return InvalidWorkerMessage(
          fmt::format("step_done.result.logprobs.top_token holds {}, above the largest id {}",
                      in.top_token(i), kMaxId));
    }
    out.top.push_back({static_cast<int32_t>(in.top_token(i)), in.top_logprob(i)});
  }
  return out;
}

absl::Status CheckPromptColumns(const proto::PromptLogprobs& in) {
  constexpr const char* kPlace = "step_done.result.prompt_logprobs";
  const int num_tokens = in.logprob_size();
  if (num_tokens == 0) return InvalidWorkerMessage(fmt::format("{}.logprob is empty", kPlace));
  if (in.rank_size() != num_tokens) {
    return InvalidWorkerMessage(
        fmt::format("{}.rank has {} entries, logprob has {}", kPlace, in.rank_size(), num_tokens));
  }
  if (in.top_token_size() % num_tokens != 0) {
    return InvalidWorkerMessage(
        fmt::format("{}.top_token has {} entries, not as many for each of {} "
                    "tokens",
                    kPlace, in.top_token_size(), num_tokens));
  }
  if (in.top_logprob_size() != in.top_token_size()) {
    return InvalidWorkerMessage(fmt::format("{}.top_logprob has {} entries, top_token has {}",
                                            kPlace, in.top_logprob_size(), in.top_token_size()));
  }
  for (const auto& [name, values] :
       {std::pair("rank", &in.rank()), std::pair("top_token", &in.top_token())}) {
    for (const uint32_t value : *values) {
      if (value <= kMaxId) continue;
      return InvalidWorkerMessage(
          fmt::format("{}.{} holds {}, above the largest {}", kPlace, name, value, kMaxId));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PromptRowLogprobs> ReadPromptLogprobs(const proto::PromptLogprobs& in) {
  RETURN_IF_ERROR(CheckPromptColumns(in));
  PromptRowLogprobs out{.slot = in.slot(), .position = in.position()};
  const int num_top = in.top_token_size() / in.logprob_size();
  out.tokens.reserve(in.logprob_size());
  for (int i = 0; i < in.logprob_size(); ++i) {
    PositionLogprobs& token = out.tokens.emplace_back(
        PositionLogprobs{.logprob = in.logprob(i), .rank = static_cast<int32_t>(in.rank(i))});
    token.top.reserve(num_top);
    for (int j = i * num_top; j < (i + 1) * num_top; ++j) {
      token.top.push_back({static_cast<int32_t>(in.top_token(j)), in.top_logprob(j)});
    }
  }
  return out;
}

absl::StatusOr<StepDone> ReadStepDone(const proto::StepDone& in) {
  StepDone out{.group_epoch = in.group_epoch(),
               .step = in.step(),
               .plan_hash = in.plan_hash(),
               .execute_us = in.execute_us(),
               .sampled = {},
               .sampled_digest = in.sampled_digest()};
  if (in.result().slot_size() != in.result().token_size()) {
    return InvalidWorkerMessage(fmt::format("step_done.result.token has {} entries, slot has {}",
                                            in.result().token_size(), in.result().slot_size()));
  }
  out.sampled.reserve(in.result().slot_size());
  for (int i = 0; i < in.result().slot_size(); ++i) {
    const uint32_t token = in.result().token(i);
    if (token > kMaxId) {
      return InvalidWorkerMessage(
          fmt::format("step_done.result.token holds {}, above the largest id {}", token, kMaxId));
    }
    out.sampled.push_back({in.result().slot(i), static_cast<int32_t>(token)});
  }
  for (const proto::Logprobs& logprobs : in.result().logprobs()) {
    if (logprobs.entry() >= out.sampled.size()) {
      return InvalidWorkerMessage(
          fmt::format("step_done.result.logprobs.entry is {}, of {} entries", logprobs.entry(),
                      out.sampled.size()));
    }
    ASSIGN_OR_RETURN(out.sampled[logprobs.entry()].logprobs, ReadLogprobs(logprobs));
  }
  for (const proto::PromptLogprobs& row : in.result().prompt_logprobs()) {
    ASSIGN_OR_RETURN(PromptRowLogprobs logprobs, ReadPromptLogprobs(row));
    out.prompt_logprobs.push_back(std::move(logprobs));
  }
  return out;
}

absl::StatusOr<ConfigureWorker> ReadConfigure(const proto::Configure& in) {
  ConfigureWorker out{.group_epoch = in.group_epoch(),
                      .world_size = in.world_size(),
                      .max_slots = in.max_slots(),
                      .max_tokens = in.max_tokens(),
                      .max_sequence_tokens = in.max_sequence_tokens(),
                      .sampled_vocab_size = in.sampled_vocab_size(),
                      .stop_ids = {}};
  out.stop_ids.reserve(in.stop_ids_size());
  for (const uint32_t id : in.stop_ids()) {
    if (id > kMaxId) {
      return InvalidServerMessage(
          fmt::format("configure.stop_ids holds {}, above the largest id {}", id, kMaxId));
    }
    out.stop_ids.push_back(static_cast<int32_t>(id));
  }
  return out;
}

}  // namespace

std::string WorkQueueBuildId() { return "wintserve " WINTSERVE_VERSION; }

std::string EncodeWorkerMessage(const WorkerMessage& message) {
  proto::WorkerMessage out;
  std::visit([&out](const auto& body) { Fill(body, &out); }, message);
  return out.SerializeAsString();
}

std::string EncodeServerMessage(const ConfigureWorker& configure) {
  proto::ServerMessage out;
  proto::Configure* to = out.mutable_configure();
  to->set_group_epoch(configure.group_epoch);
  to->set_world_size(configure.world_size);
  to->set_max_slots(configure.max_slots);
  to->set_max_tokens(configure.max_tokens);
  to->set_max_sequence_tokens(configure.max_sequence_tokens);
  to->set_sampled_vocab_size(configure.sampled_vocab_size);
  for (const int32_t id : configure.stop_ids) to->add_stop_ids(static_cast<uint32_t>(id));
  return out.SerializeAsString();
}

std::string EncodeServerMessage(const AttachPool& attach) {
  proto::ServerMessage out;
  out.mutable_attach_pool()->set_pool_epoch(attach.pool_epoch);
  out.mutable_attach_pool()->set_memory_socket(attach.memory_socket);
  out.mutable_attach_pool()->set_num_blocks(attach.num_blocks);
  out.mutable_attach_pool()->set_num_host_slots(attach.num_host_slots);
  return out.SerializeAsString();
}

std::string EncodeServerMessage(const DetachPool& detach) {
  proto::ServerMessage out;
  out.mutable_detach_pool()->set_pool_epoch(detach.pool_epoch);
  return out.SerializeAsString();
}

std::string EncodeServerMessage(const AbortGroup& abort) {
  proto::ServerMessage out;
  out.mutable_abort_group()->set_group_epoch(abort.group_epoch);
  out.mutable_abort_group()->set_reason(abort.reason);
  return out.SerializeAsString();
}

std::string EncodeServerMessage(const ShutdownWorker&) {
  proto::ServerMessage out;
  out.mutable_shutdown();
  return out.SerializeAsString();
}

EncodedPlan EncodePlanMessage(const StepPlan& plan) {
  const std::string plan_bytes = EncodePlan(plan);
  std::string message(1, static_cast<char>(kPlanTag));
  size_t length = plan_bytes.size();
  for (; length >= 0x80; length >>= 7) message.push_back(static_cast<char>(length | 0x80));
  message.push_back(static_cast<char>(length));
  message += plan_bytes;
  return {std::move(message), PlanHash(plan_bytes)};
}

absl::StatusOr<WorkerMessage> DecodeWorkerMessage(std::string_view bytes) {
  proto::WorkerMessage in;
  if (bytes.size() > static_cast<size_t>(std::numeric_limits<int>::max()) ||
      !in.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return InvalidWorkerMessage(fmt::format("{} bytes that are no such message", bytes.size()));
  }
  switch (in.message_case()) {
    case proto::WorkerMessage::kHello:
      return ReadHello(in.hello());
    case proto::WorkerMessage::kReady:
      return ReadyMessage{in.ready().group_epoch(), in.ready().pool_epoch()};
    case proto::WorkerMessage::kStepDone: {
      ASSIGN_OR_RETURN(StepDone done, ReadStepDone(in.step_done()));
      return done;
    }
    case proto::WorkerMessage::kHeartbeat:
      return HeartbeatMessage{in.heartbeat().step_started(), in.heartbeat().step_done(),
                              in.heartbeat().resident_bytes(), in.heartbeat().progress()};
    case proto::WorkerMessage::kPoolDetached:
      return PoolDetachedMessage{in.pool_detached().pool_epoch()};
    case proto::WorkerMessage::kFault: {
      const std::optional<FaultKind> kind = FromProto(in.fault().kind());
      if (!kind.has_value()) {
        return InvalidWorkerMessage(
            fmt::format("fault.kind is {}, unknown", static_cast<int>(in.fault().kind())));
      }
      return FaultMessage{*kind, in.fault().text(), in.fault().kv_trusted()};
    }
    case proto::WorkerMessage::kAborted:
      if (in.aborted().group_epoch() == 0) {
        return InvalidWorkerMessage("aborted.group_epoch is 0, no group has that");
      }
      return AbortedMessage{in.aborted().group_epoch()};
    default:
      return InvalidWorkerMessage("no field that this build knows");
  }
}

absl::StatusOr<ServerEvent> DecodeServerMessage(std::string_view bytes) {
  if (const std::optional<std::string_view> plan_bytes = PlanBytes(bytes)) {
    ASSIGN_OR_RETURN(StepPlan plan, DecodePlan(*plan_bytes));
    return ReceivedPlan{std::move(plan), PlanHash(*plan_bytes)};
  }
  proto::ServerMessage in;
  if (bytes.size() > static_cast<size_t>(std::numeric_limits<int>::max()) ||
      !in.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return InvalidServerMessage(fmt::format("{} bytes that are no such message", bytes.size()));
  }
  switch (in.message_case()) {
    case proto::ServerMessage::kConfigure: {
      ASSIGN_OR_RETURN(ConfigureWorker configure, ReadConfigure(in.configure()));
      return configure;
    }
    case proto::ServerMessage::kAttachPool:
      return AttachPool{.pool_epoch = in.attach_pool().pool_epoch(),
                        .memory_socket = in.attach_pool().memory_socket(),
                        .num_blocks = in.attach_pool().num_blocks(),
                        .num_host_slots = in.attach_pool().num_host_slots()};
    case proto::ServerMessage::kDetachPool:
      return DetachPool{in.detach_pool().pool_epoch()};
    case proto::ServerMessage::kPlan:
      return InvalidServerMessage("plan is not the only field of its message");
    case proto::ServerMessage::kAbortGroup:
      if (in.abort_group().group_epoch() == 0) {
        return InvalidServerMessage("abort_group.group_epoch is 0, no group has that");
      }
      return AbortGroup{in.abort_group().group_epoch(), in.abort_group().reason()};
    case proto::ServerMessage::kShutdown:
      return ShutdownWorker{};
    default:
      return InvalidServerMessage("no field that this build knows");
  }
}

}  // namespace wintserve
