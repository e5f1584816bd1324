#include "cache_manager/service/cache_server.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <utility>

#include "absl/strings/escaping.h"
#include "cache_manager/memory/token.h"
#include "common/log.h"
#include "common/mutex.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;

// Counts the live streams, so that the server outlives the last of them.
class StreamCount {
 public:
  void Add() EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    ++count_;
  }
  void Remove() EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    --count_;
    // Under the lock: once it is released, the waiter may destroy this object.
    none_left_.NotifyAll();
  }
  void WaitForNone() EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    none_left_.Wait(&mu_, [this]() REQUIRES(mu_) { return count_ == 0; });
  }

 private:
  Mutex mu_;
  CondVar none_left_;
  int count_ GUARDED_BY(mu_) = 0;
};

// One stream: request, reply, request, reply, …
class SessionStream : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
 public:
  SessionStream(uint64_t id, PoolOwner* owner, StreamCount* count)
      : id_(id), owner_(owner), count_(count) {
    count_->Add();
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End();
    reply_ = owner_->Handle(id_, request_);
    StartWrite(&reply_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return End();
    StartRead(&request_);
  }

  void OnDone() override {
    StreamCount* const count = count_;
    delete this;
    count->Remove();
  }

 private:
  // Before Finish, so that a client that has seen the end can open the pool again.
  void End() {
    owner_->EndSession(id_);
    Finish(grpc::Status::OK);
  }

  const uint64_t id_;
  PoolOwner* const owner_;
  StreamCount* const count_;
  proto::CacheRequest request_;
  proto::CacheReply reply_;
};

class RefusedStream : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
 public:
  RefusedStream() {
    Finish({grpc::StatusCode::UNAUTHENTICATED, "the cache queue demands the instance token"});
  }
  void OnDone() override { delete this; }
};

class CacheService : public proto::Cache::CallbackService {
 public:
  // Metadata is text, so the token travels as hexadecimal digits.
  CacheService(const std::string& token, PoolOwner* owner)
      : token_hex_(absl::BytesToHexString(token)), owner_(owner) {}

  grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply>* Session(
      grpc::CallbackServerContext* context) override {
    const auto& metadata = context->client_metadata();
    const auto presented = metadata.find("wintserve-token");
    if (presented == metadata.end() ||
        !TokensEqual(token_hex_, {presented->second.data(), presented->second.size()})) {
      LOG_WARNING("refused a stream from {}: wrong or missing token", context->peer());
      return new RefusedStream;
    }
    return new SessionStream(++last_session_id_, owner_, &streams_);
  }

  void WaitForStreams() { streams_.WaitForNone(); }

 private:
  const std::string token_hex_;
  PoolOwner* const owner_;
  std::atomic<uint64_t> last_session_id_ = 0;
  StreamCount streams_;
};

void SetChannelArguments(grpc::ServerBuilder* builder) {
  // The launcher holds the port with a SO_REUSEPORT socket that never listens, so gRPC must bind
  // with it too (its default); that nobody else listens there is the launcher's check. A peer that
  // hangs or whose host is gone is noticed within 3 s; clients ping as often.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 2000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 1000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 500);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->SetMaxReceiveMessageSize(kMaxMessageBytes);
}

}  // namespace

class CacheServer::Impl {
 public:
  Impl(const CacheServerOptions& options, PoolOwner* owner)
      : unix_path_(options.unix_path), service_(options.token, owner) {}

  absl::Status Listen(const CacheServerOptions& options) {
    grpc::ServerBuilder builder;
    SetChannelArguments(&builder);
    builder.RegisterService(&service_);
    int unix_bound = 0;
    builder.AddListeningPort(fmt::format("{}:{}", options.host, options.port),
                             grpc::InsecureServerCredentials(), &port_);
    builder.AddListeningPort("unix:" + unix_path_, grpc::InsecureServerCredentials(), &unix_bound);
    server_ = builder.BuildAndStart();
    if (server_ != nullptr) return absl::OkStatus();
    if (port_ == 0) {
      return absl::UnavailableError(
          fmt::format("cannot listen on {}:{}, is the port taken? Choose another with "
                      "--cache-queue-port",
                      options.host, options.port));
    }
    return absl::UnavailableError(fmt::format("cannot listen on {}", unix_path_));
  }

  ~Impl() {
    if (server_ == nullptr) return;
    // Sessions are open-ended: waiting for them to end by themselves would only cost the deadline.
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    service_.WaitForStreams();
    ::unlink(unix_path_.c_str());
  }

  int port() const { return port_; }

 private:
  const std::string unix_path_;
  CacheService service_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

absl::StatusOr<std::unique_ptr<CacheServer>> CacheServer::Start(const CacheServerOptions& options,
                                                                PoolOwner* owner) {
  auto impl = std::make_unique<Impl>(options, owner);
  if (absl::Status status = impl->Listen(options); !status.ok()) return status;
  return std::unique_ptr<CacheServer>(new CacheServer(std::move(impl)));
}

CacheServer::CacheServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CacheServer::~CacheServer() = default;
int CacheServer::port() const { return impl_->port(); }

}  // namespace wintserve
