#include "api_server/work_queue/server/work_queue_server.h"

#include <fmt/core.h>
#include <grpcpp/grpcpp.h>

#include <deque>
#include <utility>
#include <vector>

#include "api_server/work_queue/message_codec.h"
#include "api_server/work_queue/transport.h"
#include "common/descriptor_shares.h"
#include "common/log.h"
#include "common/log_limit.h"
#include "common/mutex.h"
#include "common/status_macros.h"
#include "common/transport/queue_listener.h"
#include "common/transport/queue_transport.h"
#include "proto/work_queue.grpc.pb.h"

namespace wintserve {
namespace {

using grpc::ByteBuffer;
using AttachReactor = grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>;

class AttachStream;

// What the service and all its streams share.
struct Hub {
  Hub(const WorkQueueServerOptions& options_in, WorkQueueEvents events_in)
      : options(options_in),
        token_value(TokenMetadataValue(options_in.token)),
        events(std::move(events_in)),
        streams(options_in.world_size),
        num_admitted(options_in.world_size),
        num_accepted(options_in.world_size) {}

  const WorkQueueServerOptions options;
  const std::string token_value;
  const WorkQueueEvents events;

  // Registers the stream as that of its rank, or says why the Hello does not fit.
  absl::Status Admit(const HelloMessage& hello, std::shared_ptr<AttachStream> stream)
      EXCLUDES(mutex);

  // Null: the rank has no stream, or one that was not accepted yet.
  std::shared_ptr<AttachStream> Accepted(uint32_t rank) REQUIRES(mutex) {
    const bool accepted = !options.wait_for_accept || num_accepted[rank] == num_admitted[rank];
    return accepted ? streams[rank] : nullptr;
  }

  Mutex mutex;
  std::vector<std::shared_ptr<AttachStream>> streams GUARDED_BY(mutex);  // by rank; null: absent
  std::vector<uint64_t> num_admitted GUARDED_BY(mutex);                  // streams so far, by rank
  std::vector<uint64_t> num_accepted GUARDED_BY(mutex);
};

// One worker's stream. Keeps itself alive until gRPC calls OnDone.
class AttachStream : public AttachReactor, public std::enable_shared_from_this<AttachStream> {
 public:
  AttachStream(std::shared_ptr<Hub> hub, grpc::CallbackServerContext* context)
      : hub_(std::move(hub)), context_(context) {}

  // Not in the constructor, which has no shared_ptr to keep yet.
  AttachReactor* Begin() {
    self_ = shared_from_this();
    StartRead(&incoming_);
    return this;
  }

  void Send(const ByteBuffer& message) EXCLUDES(mutex_) {
    {
      MutexLock lock(&mutex_);
      if (finishing_) return;
      outgoing_.push_back(message);
      if (writing_) return;
      writing_ = true;
    }
    // Outside of the lock, since gRPC may run callbacks on this thread. `writing_` keeps the stream
    // from finishing under our feet, and the deque never moves its front.
    StartWrite(&outgoing_front());
  }

  const HelloMessage& hello() const { return hello_; }

  // The read side reports the end.
  void Cut() { context_->TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return Leave(absl::UnavailableError("the stream ended"));
    absl::StatusOr<WorkerMessage> message = DecodeWorkerMessage(ToString(incoming_));
    absl::Status status = message.ok() ? Handle(*std::move(message)) : message.status();
    if (!status.ok()) return Leave(status);
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    {
      MutexLock lock(&mutex_);
      outgoing_.pop_front();
      if (!ok) outgoing_.clear();  // the stream is broken; the read side reports it
      writing_ = !outgoing_.empty() && !finishing_;
      if (!writing_ && !finishing_) return;
    }
    if (writing_now()) return StartWrite(&outgoing_front());
    Finish(final_status());
  }

  void OnDone() override { self_.reset(); }

 private:
  absl::Status Handle(WorkerMessage message) {
    if (std::holds_alternative<HelloMessage>(message)) {
      return HandleHello(std::get<HelloMessage>(message));
    }
    if (!admitted_) return absl::FailedPreconditionError("the first message must be Hello");
    const WorkQueueEvents& events = hub_->events;
    const uint32_t rank = hello_.hello.rank;
    if (auto* ready = std::get_if<ReadyMessage>(&message)) events.on_ready(rank, *ready);
    if (auto* done = std::get_if<StepDone>(&message)) events.on_step_done(rank, std::move(*done));
    if (auto* beat = std::get_if<HeartbeatMessage>(&message)) events.on_heartbeat(rank, *beat);
    if (auto* detached = std::get_if<PoolDetachedMessage>(&message)) {
      events.on_pool_detached(rank, *detached);
    }
    if (auto* fault = std::get_if<FaultMessage>(&message)) events.on_fault(rank, *fault);
    if (auto* aborted = std::get_if<AbortedMessage>(&message)) events.on_aborted(rank, *aborted);
    return absl::OkStatus();
  }

  absl::Status HandleHello(const HelloMessage& hello) {
    if (admitted_) return absl::FailedPreconditionError("Hello came twice");
    hello_ = hello;
    if (absl::Status status = hub_->Admit(hello, shared_from_this()); !status.ok()) {
      hub_->events.on_refused(std::string(status.message()));
      return status;
    }
    admitted_ = true;
    context_->AddInitialMetadata(kAcceptedMetadataKey, "1");
    StartSendInitialMetadata();  // tells the worker that it is in
    hub_->events.on_hello(hello.hello);
    return absl::OkStatus();
  }

  void Leave(const absl::Status& reason) EXCLUDES(mutex_) {
    if (admitted_) {
      // First: nobody else attaches as this rank before it is known that this one has left.
      hub_->events.on_detached(hello_.hello.rank, hello_.hello.worker_id, reason);
      MutexLock lock(&hub_->mutex);
      hub_->streams[hello_.hello.rank].reset();
    }
    // An end of the worker's doing is no error of the call.
    const grpc::Status status =
        absl::IsUnavailable(reason) ? grpc::Status::OK : ToGrpcStatus(reason);
    {
      MutexLock lock(&mutex_);
      finishing_ = true;
      final_status_ = status;
      if (writing_) return;  // OnWriteDone finishes
    }
    Finish(status);
  }

  ByteBuffer& outgoing_front() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    return outgoing_.front();
  }
  bool writing_now() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    return writing_;
  }
  grpc::Status final_status() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    return final_status_;
  }

  const std::shared_ptr<Hub> hub_;
  grpc::CallbackServerContext* const context_;  // gRPC's, alive until OnDone
  std::shared_ptr<AttachStream> self_;
  ByteBuffer incoming_;
  HelloMessage hello_;     // written by the read callbacks before the stream is registered
  bool admitted_ = false;  // read callbacks only, which gRPC runs one after the other

  Mutex mutex_;
  std::deque<ByteBuffer> outgoing_ GUARDED_BY(mutex_);
  bool writing_ GUARDED_BY(mutex_) = false;
  bool finishing_ GUARDED_BY(mutex_) = false;
  grpc::Status final_status_ GUARDED_BY(mutex_);
};

absl::Status Differs(const HelloMessage& hello, std::string_view what, const std::string& value,
                     uint32_t other_rank, const std::string& other_value) {
  return absl::FailedPreconditionError(
      fmt::format("engine worker {} has {} {}, engine worker {} has {}: all ranks must be of one "
                  "build and load the same checkpoint",
                  hello.hello.rank, what, value, other_rank, other_value));
}

absl::Status CheckSameGroup(const HelloMessage& hello, const HelloMessage& other) {
  const uint32_t other_rank = other.hello.rank;
  if (hello.build_id != other.build_id) {
    return Differs(hello, "build_id", hello.build_id, other_rank, other.build_id);
  }
  if (hello.hello.weights_digest != other.hello.weights_digest) {
    return Differs(hello, "weights_digest", fmt::format("{:016x}", hello.hello.weights_digest),
                   other_rank, fmt::format("{:016x}", other.hello.weights_digest));
  }
  if (hello.hello.kv_layout_digest != other.hello.kv_layout_digest) {
    return Differs(hello, "kv_layout_digest", fmt::format("{:016x}", hello.hello.kv_layout_digest),
                   other_rank, fmt::format("{:016x}", other.hello.kv_layout_digest));
  }
  return absl::OkStatus();
}

absl::Status Hub::Admit(const HelloMessage& hello, std::shared_ptr<AttachStream> stream) {
  const uint32_t rank = hello.hello.rank;
  const uint32_t world_size = options.world_size;
  if (hello.proto_version != kWorkQueueProtoVersion) {
    return absl::FailedPreconditionError(
        fmt::format("engine worker {} speaks protocol version {}, the API server {}", rank,
                    hello.proto_version, kWorkQueueProtoVersion));
  }
  if (hello.hello.world_size != world_size) {
    return absl::FailedPreconditionError(
        fmt::format("engine worker {} has world_size {}, the API server expects {}", rank,
                    hello.hello.world_size, world_size));
  }
  if (rank >= world_size) {
    return absl::FailedPreconditionError(fmt::format(
        "engine worker has rank {}, must be below the world size {}", rank, world_size));
  }
  MutexLock lock(&mutex);
  if (streams[rank] != nullptr) {
    return absl::FailedPreconditionError(fmt::format("engine worker {} is attached already", rank));
  }
  for (const std::shared_ptr<AttachStream>& other : streams) {
    if (other == nullptr) continue;
    if (absl::Status status = CheckSameGroup(hello, other->hello()); !status.ok()) return status;
  }
  streams[rank] = std::move(stream);
  ++num_admitted[rank];
  return absl::OkStatus();
}

class Service : public proto::WorkQueue::WithRawCallbackMethod_Attach<proto::WorkQueue::Service> {
 public:
  explicit Service(std::shared_ptr<Hub> hub) : hub_(std::move(hub)) {}

  AttachReactor* Attach(grpc::CallbackServerContext* context) override {
    if (!HasToken(*context, hub_->token_value)) {
      if (const auto more = stranger_log_.Admit()) {
        LOG_WARNING("work queue: refused a call from {}: wrong or missing token{}", context->peer(),
                    *more);
      }
      return new EndedCall(Unauthenticated());
    }
    return std::make_shared<AttachStream>(hub_, context)->Begin();
  }

 private:
  const std::shared_ptr<Hub> hub_;
  LogLimit stranger_log_;
};

class GrpcWorkQueueServer : public WorkQueueServer {
 public:
  explicit GrpcWorkQueueServer(std::shared_ptr<Hub> hub)
      : hub_(hub), service_(hub), unknown_methods_(hub->token_value) {}
  ~GrpcWorkQueueServer() override { Stop(/*grace_ms=*/0); }

  absl::Status Listen() {
    const WorkQueueServerOptions& options = hub_->options;
    const int64_t max_connections = OwnDescriptorShares().queue;
    ASSIGN_OR_RETURN(unix_listener_, QueueListener::Unix(options.unix_socket, max_connections));
    if (!options.tcp_address.empty()) {
      ASSIGN_OR_RETURN(tcp_listener_, QueueListener::Tcp(options.tcp_address, max_connections));
    }
    grpc::ServerBuilder builder;
    unix_listener_->AddTo(&builder);
    if (tcp_listener_ != nullptr) tcp_listener_->AddTo(&builder, options.tls);
    ConfigureTransport(&builder);
    LimitStrangers(&builder);
    builder.RegisterService(&service_);
    builder.RegisterCallbackGenericService(&unknown_methods_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) return absl::InternalError("gRPC cannot serve the work queue");
    unix_listener_->Start();
    if (tcp_listener_ != nullptr) tcp_listener_->Start();
    return absl::OkStatus();
  }

  void Accept(uint32_t rank) override {
    MutexLock lock(&hub_->mutex);
    ++hub_->num_accepted[rank];
  }
  void Cut(uint32_t rank) override {
    std::shared_ptr<AttachStream> stream;
    {
      MutexLock lock(&hub_->mutex);
      stream = hub_->Accepted(rank);
    }
    if (stream != nullptr) stream->Cut();
  }

  void Send(uint32_t rank, const DetachPool& detach) override {
    SendTo(rank, EncodeServerMessage(detach));
  }
  void Send(uint32_t rank, const AbortGroup& abort) override {
    SendTo(rank, EncodeServerMessage(abort));
  }
  void Send(const ConfigureWorker& configure) override {
    Broadcast(EncodeServerMessage(configure));
  }
  void Send(const AttachPool& attach) override { Broadcast(EncodeServerMessage(attach)); }
  void Send(const DetachPool& detach) override { Broadcast(EncodeServerMessage(detach)); }
  void Send(const AbortGroup& abort) override { Broadcast(EncodeServerMessage(abort)); }
  void Send(const ShutdownWorker& shutdown) override {
    Broadcast(EncodeServerMessage(shutdown), /*to_all=*/true);
  }

  uint64_t SendPlan(const StepPlan& plan) override {
    const EncodedPlan encoded = EncodePlanMessage(plan);
    Broadcast(encoded.message);
    return encoded.plan_hash;
  }

  void Stop(int64_t grace_ms) override {
    if (server_ == nullptr) return;
    unix_listener_->Stop();
    if (tcp_listener_ != nullptr) tcp_listener_->Stop();
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(grace_ms));
    server_->Wait();
    server_.reset();
  }

 private:
  void SendTo(uint32_t rank, const std::string& message) {
    std::shared_ptr<AttachStream> stream;
    {
      MutexLock lock(&hub_->mutex);
      stream = hub_->Accepted(rank);
    }
    if (stream != nullptr) stream->Send(ToByteBuffer(message));
  }

  // to_all: also to those that were not accepted.
  void Broadcast(const std::string& message, bool to_all = false) {
    const ByteBuffer buffer = ToByteBuffer(message);  // copies share the bytes
    std::vector<std::shared_ptr<AttachStream>> streams;
    {
      MutexLock lock(&hub_->mutex);
      for (uint32_t rank = 0; rank < hub_->options.world_size; ++rank) {
        streams.push_back(to_all ? hub_->streams[rank] : hub_->Accepted(rank));
      }
    }
    for (const std::shared_ptr<AttachStream>& stream : streams) {
      if (stream != nullptr) stream->Send(buffer);
    }
  }

  const std::shared_ptr<Hub> hub_;
  Service service_;
  UnknownMethods unknown_methods_;
  std::unique_ptr<QueueListener> unix_listener_;
  std::unique_ptr<QueueListener> tcp_listener_;  // null: no TCP port
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WorkQueueServer>> WorkQueueServer::Start(
    const WorkQueueServerOptions& options, WorkQueueEvents events) {
  auto server =
      std::make_unique<GrpcWorkQueueServer>(std::make_shared<Hub>(options, std::move(events)));
  if (absl::Status status = server->Listen(); !status.ok()) return status;
  return server;
}

}  // namespace wintserve
