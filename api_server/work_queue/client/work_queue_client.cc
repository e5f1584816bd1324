#include "api_server/work_queue/client/work_queue_client.h"

#include <fmt/core.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/support/sync_stream.h>

#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "api_server/work_queue/message_codec.h"
#include "api_server/work_queue/transport.h"
#include "common/mutex.h"
#include "common/transport/queue_transport.h"

namespace wintserve {
namespace {

using grpc::ByteBuffer;
using Stream = grpc::ClientReaderWriter<ByteBuffer, ByteBuffer>;

// A reader thread of its own, so that gRPC always has a thread that answers keepalive pings,
// however long the caller is away executing a plan.
class GrpcWorkQueueClient : public WorkQueueClient {
 public:
  GrpcWorkQueueClient(const std::string& target, const std::string& token, const TlsIdentity& tls)
      : target_(target) {
    grpc::ChannelArguments args;
    ConfigureTransport(&args);
    channel_ = grpc::CreateCustomChannel(target, QueueChannelCredentials(target, tls), args);
    context_.AddMetadata(kTokenMetadataKey, TokenMetadataValue(token));
  }

  ~GrpcWorkQueueClient() override {
    Close();
    if (reader_.joinable()) reader_.join();
  }

  absl::Status Open(const WorkerHello& hello, int64_t timeout_ms) {
    const auto deadline = std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms);
    if (!channel_->WaitForConnected(deadline)) {
      return absl::UnavailableError(
          fmt::format("no API server at {} within {} ms", target_, timeout_ms));
    }
    // The generated stub parses messages away, but a plan is hashed as received: hence raw bytes.
    stream_.reset(grpc::internal::ClientReaderWriterFactory<ByteBuffer, ByteBuffer>::Create(
        channel_.get(),
        grpc::internal::RpcMethod(kAttachMethod, grpc::internal::RpcMethod::BIDI_STREAMING,
                                  channel_),
        &context_));
    const bool sent = Send(HelloMessage{.hello = hello}).ok();
    // The server sends its initial metadata once it has accepted the Hello; a refusal has none.
    stream_->WaitForInitialMetadata();
    if (!sent || context_.GetServerInitialMetadata().count(kAcceptedMetadataKey) == 0) {
      return FinishStream();
    }
    reader_ = std::thread([this] { ReadUntilEnd(); });
    return absl::OkStatus();
  }

  absl::StatusOr<ServerEvent> Next() override {
    MutexLock lock(&mutex_);
    arrived_.Wait(&mutex_,
                  [this]() NO_THREAD_SAFETY_ANALYSIS { return !events_.empty() || !end_.ok(); });
    if (events_.empty()) return end_;
    ServerEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

  void SetInterrupt(std::function<void(uint64_t)> interrupt) override {
    MutexLock interrupt_lock(&interrupt_mutex_);
    interrupt_ = std::move(interrupt);
    if (interrupt_ == nullptr) return;
    std::vector<uint64_t> group_epochs;
    {
      MutexLock lock(&mutex_);
      for (const ServerEvent& event : events_) {
        if (const auto* abort = std::get_if<AbortGroup>(&event)) {
          group_epochs.push_back(abort->group_epoch);
        }
      }
      if (!end_.ok()) group_epochs.push_back(0);
    }
    for (const uint64_t group_epoch : group_epochs) interrupt_(group_epoch);
  }

  absl::Status SendReady(uint64_t group_epoch, uint64_t pool_epoch) override {
    return Send(ReadyMessage{group_epoch, pool_epoch});
  }
  absl::Status SendPoolDetached(uint64_t pool_epoch) override {
    return Send(PoolDetachedMessage{pool_epoch});
  }
  absl::Status SendStepDone(const StepDone& done) override { return Send(done); }
  absl::Status SendHeartbeat(const HeartbeatMessage& beat) override { return Send(beat); }
  absl::Status SendAborted(uint64_t group_epoch) override {
    return Send(AbortedMessage{group_epoch});
  }
  absl::Status SendFault(FaultKind kind, const std::string& text, bool kv_trusted) override {
    return Send(FaultMessage{kind, text, kv_trusted});
  }

  void Close() override { context_.TryCancel(); }

 private:
  absl::Status Send(const WorkerMessage& message) EXCLUDES(write_mutex_) {
    const ByteBuffer buffer = ToByteBuffer(EncodeWorkerMessage(message));
    MutexLock lock(&write_mutex_);
    if (finished_ || !stream_->Write(buffer)) return Gone();
    return absl::OkStatus();
  }

  void ReadUntilEnd() {
    absl::Status end;
    ByteBuffer buffer;
    while (end.ok() && stream_->Read(&buffer)) {
      absl::StatusOr<ServerEvent> event = DecodeServerMessage(ToString(buffer));
      if (!event.ok()) {
        end = event.status();
        break;
      }
      HandOut(*std::move(event));
    }
    if (!end.ok()) context_.TryCancel();
    const absl::Status stream_end = FinishStream();
    MutexLock interrupt_lock(&interrupt_mutex_);
    if (interrupt_ != nullptr) interrupt_(0);
    MutexLock lock(&mutex_);
    end_ = end.ok() ? stream_end : end;
    arrived_.NotifyAll();
  }

  void HandOut(ServerEvent event) EXCLUDES(interrupt_mutex_, mutex_) {
    if (const auto* abort = std::get_if<AbortGroup>(&event)) {
      MutexLock interrupt_lock(&interrupt_mutex_);
      if (interrupt_ != nullptr) interrupt_(abort->group_epoch);
      return Push(std::move(event));  // under the lock: SetInterrupt looks at what is there
    }
    Push(std::move(event));
  }

  void Push(ServerEvent event) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    events_.push_back(std::move(event));
    arrived_.NotifyOne();
  }

  // The stream's own status, or UNAVAILABLE for an end that is none of our doing.
  absl::Status FinishStream() EXCLUDES(write_mutex_) {
    MutexLock lock(&write_mutex_);  // gRPC allows no write beside or after Finish
    finished_ = true;
    const grpc::Status status = stream_->Finish();
    switch (status.error_code()) {
      case grpc::StatusCode::UNAUTHENTICATED:
        return absl::UnauthenticatedError(
            fmt::format("the API server at {} refused the instance token", target_));
      case grpc::StatusCode::FAILED_PRECONDITION:
      case grpc::StatusCode::INVALID_ARGUMENT:
        return ToAbslStatus(status);
      default:
        return Gone();
    }
  }

  absl::Status Gone() const {
    return absl::UnavailableError(fmt::format("the API server at {} is gone", target_));
  }

  const std::string target_;
  std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  std::unique_ptr<Stream> stream_;
  std::thread reader_;

  Mutex write_mutex_;
  bool finished_ GUARDED_BY(write_mutex_) = false;

  Mutex interrupt_mutex_;  // before mutex_
  std::function<void(uint64_t)> interrupt_ GUARDED_BY(interrupt_mutex_);

  Mutex mutex_;
  CondVar arrived_;
  std::deque<ServerEvent> events_ GUARDED_BY(mutex_);
  absl::Status end_ GUARDED_BY(mutex_);  // not OK once no more events come
};

}  // namespace

absl::StatusOr<std::unique_ptr<WorkQueueClient>> WorkQueueClient::Attach(const std::string& target,
                                                                         const std::string& token,
                                                                         const WorkerHello& hello,
                                                                         int64_t timeout_ms,
                                                                         const TlsIdentity& tls) {
  auto client = std::make_unique<GrpcWorkQueueClient>(target, token, tls);
  if (absl::Status status = client->Open(hello, timeout_ms); !status.ok()) return status;
  return client;
}

}  // namespace wintserve
