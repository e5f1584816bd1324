#include "cache_manager/service/cache_server.h"

#include <fmt/format.h>
#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>
#include <functional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "common/descriptor_shares.h"
#include "common/log.h"
#include "common/log_limit.h"
#include "common/mutex.h"
#include "common/status_macros.h"
#include "common/transport/queue_listener.h"
#include "common/transport/queue_transport.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;
constexpr size_t kMaxQueuedEvents = 4096;
// How long an OpenPool waits for memory. Below the 3 s after which the client takes us for hanging.
constexpr std::chrono::milliseconds kMemoryPatience(2000);
constexpr std::chrono::milliseconds kMemoryRetry(100);

grpc::Status ToGrpcStatus(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

template <typename Message>
grpc::ByteBuffer ToByteBuffer(const Message& message) {
  grpc::ByteBuffer buffer;
  bool owned = false;
  grpc::SerializationTraits<Message>::Serialize(message, &buffer, &owned);
  return buffer;
}

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

// Ends the session when its grace ends.
class GraceTimer {
 public:
  explicit GraceTimer(PoolOwner* owner) : owner_(owner), thread_([this] { Run(); }) {}
  ~GraceTimer() {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      changed_.NotifyAll();
    }
    thread_.join();
  }

  // A grace may have begun.
  void Wake() EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    woken_ = true;
    changed_.NotifyAll();
  }

 private:
  void Run() EXCLUDES(mu_) {
    while (true) {
      const auto next = owner_->EndExpiredSession();
      MutexLock lock(&mu_);
      const auto news = [this]() REQUIRES(mu_) { return woken_ || stopping_; };
      if (next.has_value()) {
        changed_.WaitFor(&mu_, *next - PoolOwner::Clock::now(), news);
      } else {
        changed_.Wait(&mu_, news);
      }
      if (stopping_) return;
      woken_ = false;
    }
  }

  PoolOwner* const owner_;
  Mutex mu_;
  CondVar changed_;
  bool woken_ GUARDED_BY(mu_) = false;
  bool stopping_ GUARDED_BY(mu_) = false;
  std::thread thread_;
};

// What all streams share.
struct ServerState {
  ServerState(const std::string& token, PoolOwner* pool_owner)
      : token_value(TokenMetadataValue(token)), owner(pool_owner) {}

  // Says no in the log, too.
  bool Authenticate(const grpc::CallbackServerContext& context) {
    if (HasToken(context, token_value)) return true;
    if (const auto more = stranger_log.Admit()) {
      LOG_WARNING("refused a call from {}: wrong or missing token{}", context.peer(), *more);
    }
    return false;
  }

  const std::string token_value;
  PoolOwner* const owner;
  GraceTimer timer{owner};
  StreamCount streams;
  LogLimit stranger_log;  // calls without the token
  LogLimit refusal_log;   // requests of sessions
};

// One session: request, its replies, request, its replies, …
class SessionStream : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
 public:
  SessionStream(uint64_t id, grpc::CallbackServerContext* context, ServerState* state)
      : id_(id), context_(context), state_(state) {
    state_->streams.Add();
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End();
    received_ = std::chrono::steady_clock::now();
    Serve();
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return End();
    if (++next_reply_ < replies_.size()) return StartWrite(&replies_[next_reply_]);
    StartRead(&request_);
  }

  void OnDone() override {
    // Only now it is known whether the client said that it is done or the stream broke.
    if (!context_->IsCancelled()) state_->owner->EndSession(id_);
    StreamCount* const streams = &state_->streams;
    delete this;
    streams->Remove();
  }

 private:
  void Serve() {
    if (request_.seq() != last_seq_ + 1 && last_seq_ != 0) {
      replies_.assign(1,
                      Refuse(fmt::format("seq is {}; expected {}", request_.seq(), last_seq_ + 1)));
    } else if (request_.seq() == 0) {
      replies_.assign(1, Refuse("seq is 0; it starts at 1"));
    } else {
      replies_ = state_->owner->Handle(id_, request_);
      // The memory of a pool before this one goes when the last worker has unmapped it.
      if (request_.has_open() && WantsMemory(replies_[0]) &&
          std::chrono::steady_clock::now() - received_ < kMemoryPatience) {
        retry_ = std::make_unique<grpc::Alarm>();  // the one that calls us is in use
        retry_->Set(std::chrono::system_clock::now() + kMemoryRetry, [this](bool) { Serve(); });
        return;
      }
      last_seq_ = request_.seq();
      // A session taken over began another grace.
      if (request_.has_open()) state_->timer.Wake();
    }
    if (replies_[0].has_refusal() && !FoundNothingToAdopt()) {
      if (const auto more = state_->refusal_log.Admit()) {
        LOG_WARNING("session {}: refused: {}{}", id_, replies_[0].refusal().text(), *more);
      }
    }
    next_reply_ = 0;
    StartWrite(&replies_[0]);
  }

  proto::CacheReply Refuse(const std::string& text) const {
    proto::CacheReply reply;
    reply.set_seq(request_.seq());
    reply.mutable_refusal()->set_status_code(grpc::StatusCode::INVALID_ARGUMENT);
    reply.mutable_refusal()->set_text(text);
    return reply;
  }

  // Every API server asks for any pool before it creates its first: that there is none is its
  // answer.
  bool FoundNothingToAdopt() const {
    return request_.has_open() && request_.open().adopt_any() &&
           replies_[0].refusal().status_code() == grpc::StatusCode::NOT_FOUND &&
           state_->owner->Stats().pool_epoch() == 0;
  }

  static bool WantsMemory(const proto::CacheReply& reply) {
    return reply.has_refusal() &&
           reply.refusal().status_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
  }

  // Before Finish, so that whoever has seen the end finds the session no longer open.
  void End() {
    state_->owner->SuspendSession(id_);
    state_->timer.Wake();
    Finish(grpc::Status::OK);
  }

  const uint64_t id_;
  grpc::CallbackServerContext* const context_;
  ServerState* const state_;
  uint64_t last_seq_ = 0;
  proto::CacheRequest request_;
  std::chrono::steady_clock::time_point received_;  // the request
  std::vector<proto::CacheReply> replies_;
  size_t next_reply_ = 0;
  std::unique_ptr<grpc::Alarm> retry_;
};

// One reader of the cache's events. The events wait in a bounded queue; the first is being written.
// WatchRequest has no field, so it is not read.
class WatchStream : public grpc::ServerGenericBidiReactor, public CacheWatcher {
 public:
  explicit WatchStream(ServerState* state) : state_(state) {
    state_->streams.Add();
    const absl::Status status = state_->owner->Watch(this);
    if (!status.ok()) {
      MutexLock lock(&mu_);
      End(ToGrpcStatus(status));
    }
  }

  void OnEvent(std::shared_ptr<const proto::CacheEvent> event) override EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    if (ended_) return;
    if (queue_.size() == kMaxQueuedEvents) return End(FellBehind());
    queue_.push_back(std::move(event));
    if (queue_.size() == 1) WriteFront();
  }

  void OnLostEvents() override EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    End(FellBehind());
  }

  void OnWriteDone(bool ok) override EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    queue_.pop_front();
    if (ended_) return;
    if (!ok) return End(grpc::Status::CANCELLED);
    if (!queue_.empty()) WriteFront();
  }

  void OnCancel() override EXCLUDES(mu_) {
    MutexLock lock(&mu_);
    End(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    state_->owner->Unwatch(this);
    StreamCount* const streams = &state_->streams;
    delete this;
    streams->Remove();
  }

 private:
  static grpc::Status FellBehind() {
    return {grpc::StatusCode::RESOURCE_EXHAUSTED,
            fmt::format("Watch: the reader fell {} events behind; what it has seen is incomplete",
                        kMaxQueuedEvents)};
  }

  void WriteFront() REQUIRES(mu_) {
    message_ = ToByteBuffer(*queue_.front());
    StartWrite(&message_);
  }

  void End(const grpc::Status& status) REQUIRES(mu_) {
    if (std::exchange(ended_, true)) return;
    if (queue_.size() > 1) queue_.resize(1);  // a write under way keeps its event
    Finish(status);
  }

  ServerState* const state_;
  Mutex mu_;
  std::deque<std::shared_ptr<const proto::CacheEvent>> queue_ GUARDED_BY(mu_);
  grpc::ByteBuffer message_ GUARDED_BY(mu_);  // the first, being written
  bool ended_ GUARDED_BY(mu_) = false;
};

// A call of one request and one reply.
template <typename Request, typename Reply>
class UnaryCall : public grpc::ServerGenericBidiReactor {
 public:
  using Handler = std::function<absl::StatusOr<Reply>(const Request&)>;

  UnaryCall(StreamCount* streams, Handler handler)
      : streams_(streams), handler_(std::move(handler)) {
    streams_->Add();
    StartRead(&message_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return Finish({grpc::StatusCode::INVALID_ARGUMENT, "the call has no request"});
    Request request;
    const grpc::Status read = grpc::SerializationTraits<Request>::Deserialize(&message_, &request);
    if (!read.ok()) return Finish({grpc::StatusCode::INVALID_ARGUMENT, read.error_message()});
    const absl::StatusOr<Reply> reply = handler_(request);
    if (!reply.ok()) return Finish(ToGrpcStatus(reply.status()));
    message_ = ToByteBuffer(*reply);
    StartWriteAndFinish(&message_, grpc::WriteOptions(), grpc::Status::OK);
  }

  void OnDone() override {
    StreamCount* const streams = streams_;
    delete this;
    streams->Remove();
  }

 private:
  StreamCount* const streams_;
  const Handler handler_;
  grpc::ByteBuffer message_;
};

// A session of a stranger.
class RefusedSession : public grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply> {
 public:
  RefusedSession() { Finish(Unauthenticated()); }
  void OnDone() override { delete this; }
};

// The service's Session. The other methods are CacheCalls'.
using SessionService = proto::Cache::WithCallbackMethod_Session<
    proto::Cache::WithGenericMethod_Stats<proto::Cache::WithGenericMethod_Watch<
        proto::Cache::WithGenericMethod_Admin<proto::Cache::Service>>>>;

class CacheService : public SessionService {
 public:
  explicit CacheService(ServerState* state) : state_(state) {}

  grpc::ServerBidiReactor<proto::CacheRequest, proto::CacheReply>* Session(
      grpc::CallbackServerContext* context) override {
    if (!state_->Authenticate(*context)) return new RefusedSession;
    return new SessionStream(state_->owner->NewSession(), context, state_);
  }

 private:
  ServerState* const state_;
};

// Stats, Watch, Admin. gRPC itself would take in a call's only request, 64 MiB of it, before it
// asks the service; so these come as calls whose requests are read once the caller is known.
class CacheCalls : public UnknownMethods {
 public:
  explicit CacheCalls(ServerState* state) : UnknownMethods(state->token_value), state_(state) {}

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    if (!state_->Authenticate(*context)) return new EndedCall(Unauthenticated());
    PoolOwner* const owner = state_->owner;
    if (context->method() == kMethodPrefix + "Watch") return new WatchStream(state_);
    if (context->method() == kMethodPrefix + "Stats") {
      return new UnaryCall<proto::StatsRequest, proto::StatsReply>(
          &state_->streams, [owner](const proto::StatsRequest&) { return owner->Stats(); });
    }
    if (context->method() == kMethodPrefix + "Admin") {
      return new UnaryCall<proto::AdminRequest, proto::AdminReply>(
          &state_->streams,
          [owner](const proto::AdminRequest& request) { return owner->Admin(request); });
    }
    return UnknownMethods::CreateReactor(context);
  }

 private:
  static inline const std::string kMethodPrefix =
      fmt::format("/{}/", proto::Cache::service_full_name());

  ServerState* const state_;
};

void SetChannelArguments(grpc::ServerBuilder* builder) {
  // A peer that hangs or whose host is gone is noticed within 3 s; clients ping as often.
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
  Impl(const CacheServerOptions& options, PoolOwner* owner) : state_(options.token, owner) {}

  absl::Status Listen(const CacheServerOptions& options) {
    const int64_t max_connections = OwnDescriptorShares().queue;
    auto tcp =
        QueueListener::Tcp(fmt::format("{}:{}", options.host, options.port), max_connections);
    if (!tcp.ok()) {
      return absl::UnavailableError(
          fmt::format("cannot listen on {}:{}, is the port taken? Choose another with "
                      "--cache-queue-port",
                      options.host, options.port));
    }
    tcp_listener_ = *std::move(tcp);
    ASSIGN_OR_RETURN(unix_listener_, QueueListener::Unix(options.unix_path, max_connections));
    grpc::ServerBuilder builder;
    SetChannelArguments(&builder);
    LimitStrangers(&builder);
    builder.RegisterService(&service_);
    builder.RegisterCallbackGenericService(&calls_);
    tcp_listener_->AddTo(&builder, options.tls);
    unix_listener_->AddTo(&builder);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) return absl::InternalError("gRPC cannot serve the cache queue");
    tcp_listener_->Start();
    unix_listener_->Start();
    return absl::OkStatus();
  }

  ~Impl() {
    if (server_ == nullptr) return;
    tcp_listener_->Stop();
    unix_listener_->Stop();
    // Sessions are open-ended: waiting for them to end by themselves would only cost the deadline.
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    state_.streams.WaitForNone();
  }

  int port() const { return tcp_listener_->port(); }

 private:
  ServerState state_;
  CacheService service_{&state_};
  CacheCalls calls_{&state_};
  std::unique_ptr<QueueListener> tcp_listener_;
  std::unique_ptr<QueueListener> unix_listener_;
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
