#include "cache_manager/client/cache_client.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "common/log.h"
#include "common/mutex.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int kMaxMessageBytes = 64 << 20;
constexpr std::chrono::seconds kPingInterval(1);
constexpr int kMaxSilentIntervals = 3;
constexpr std::chrono::seconds kCloseTimeout(2);

std::shared_ptr<grpc::Channel> CreateChannel(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 2000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 1000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A proxy of the environment is meant for the outside world.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // The cache manager may still be starting: knock often, and not in step with another channel.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

absl::Status FromRefusal(const proto::Refusal& refusal) {
  return absl::Status(static_cast<absl::StatusCode>(refusal.status_code()), refusal.text());
}

// The stream is one gRPC reactor. A read is always under way; a write is, while the outbox has
// something. gRPC calls OnReadDone and OnWriteDone from its threads, each one never twice at a
// time, and OnDone last; events are called from OnReadDone and OnDone only.
class GrpcCacheClient final : public CacheClient,
                              grpc::ClientBidiReactor<proto::CacheRequest, proto::CacheReply> {
 public:
  GrpcCacheClient(const std::string& target, const std::string& token, uint64_t api_epoch,
                  CacheEvents events)
      : target_(target),
        api_epoch_(api_epoch),
        events_(std::move(events)),
        channel_(CreateChannel(target)),
        stub_(proto::Cache::NewStub(channel_)) {
    // Metadata is text, so the token travels as hexadecimal digits.
    context_.AddMetadata("wintserve-token", absl::BytesToHexString(token));
  }

  absl::Status Connect(int64_t timeout_ms);
  ~GrpcCacheClient() override;

  void OpenPool(const PoolSpec& spec) override;
  void LeaseBlocks(uint64_t tag, uint32_t count) override;
  void ReturnBlocks(std::vector<PoolBlock> blocks) override;
  void Close() override;

 private:
  // A request that has no reply yet.
  struct Pending {
    uint64_t seq;
    proto::CacheRequest::RequestCase kind;
    uint64_t tag;
  };

  void Send(proto::CacheRequest request, uint64_t tag) EXCLUDES(mu_);
  // Starts the next write, or half-closes the stream when there is none and there will be none.
  void WriteNext() REQUIRES(mu_);
  // Ends the stream because of `reason`.
  void Fail(absl::Status reason) REQUIRES(mu_);
  // The request that reply_ answers; nothing when the stream fails or is being closed.
  std::optional<Pending> TakePending() EXCLUDES(mu_);
  void Deliver(const Pending& pending);
  void Watch() EXCLUDES(mu_);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  const std::string target_;
  const uint64_t api_epoch_;
  const CacheEvents events_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<proto::Cache::Stub> stub_;
  grpc::ClientContext context_;
  proto::CacheReply reply_;  // of the read under way

  Mutex mu_;
  CondVar changed_;
  std::deque<proto::CacheRequest> outbox_ GUARDED_BY(mu_);  // the first one is being written
  std::deque<Pending> pending_ GUARDED_BY(mu_);
  uint64_t last_seq_ GUARDED_BY(mu_) = 0;
  int silent_intervals_ GUARDED_BY(mu_) = 0;  // of the watch, since the last reply
  bool started_ GUARDED_BY(mu_) = false;      // the stream exists
  bool answered_ GUARDED_BY(mu_) = false;     // there was a reply: we are connected
  bool closing_ GUARDED_BY(mu_) = false;      // Close() was called
  bool half_closed_ GUARDED_BY(mu_) = false;
  bool ended_ GUARDED_BY(mu_) = false;  // the read failed: nothing more may be started
  bool done_ GUARDED_BY(mu_) = false;   // OnDone has returned
  std::optional<absl::Status> failure_ GUARDED_BY(mu_);
  absl::Status end_ GUARDED_BY(mu_);  // why the session ended, once done_
  std::thread watch_;
};

absl::Status GrpcCacheClient::Connect(int64_t timeout_ms) {
  const auto timeout = std::chrono::milliseconds(timeout_ms);
  const auto deadline = steady_clock::now() + timeout;
  const absl::Status nobody = absl::UnavailableError(
      fmt::format("no cache manager at {} within {} ms", target_, timeout_ms));
  if (!channel_->WaitForConnected(std::chrono::system_clock::now() + timeout)) return nobody;

  {
    MutexLock lock(&mu_);
    started_ = true;
  }
  stub_->async()->Session(&context_, this);
  AddHold();  // writes start outside of reactions; released once the read has failed
  StartRead(&reply_);
  StartCall();
  proto::CacheRequest ping;
  ping.mutable_ping();
  Send(std::move(ping), /*tag=*/0);

  MutexLock lock(&mu_);
  changed_.WaitFor(&mu_, deadline - steady_clock::now(),
                   [this]() REQUIRES(mu_) { return answered_ || done_; });
  if (!answered_) return done_ ? end_ : nobody;
  watch_ = std::thread([this] { Watch(); });
  return absl::OkStatus();
}

GrpcCacheClient::~GrpcCacheClient() {
  Close();
  {
    MutexLock lock(&mu_);
    const auto over = [this]() REQUIRES(mu_) { return done_ || !started_; };
    if (!changed_.WaitFor(&mu_, answered_ ? kCloseTimeout : std::chrono::seconds(0), over)) {
      context_.TryCancel();
      changed_.Wait(&mu_, over);
    }
  }
  if (watch_.joinable()) watch_.join();
}

void GrpcCacheClient::OpenPool(const PoolSpec& spec) {
  proto::CacheRequest request;
  proto::OpenPool* const open = request.mutable_open();
  open->set_api_epoch(api_epoch_);
  open->set_num_blocks(spec.num_blocks);
  for (const uint64_t bytes : spec.block_bytes_by_rank) open->add_block_bytes_by_rank(bytes);
  open->set_kv_layout_digest(spec.kv_layout_digest);
  Send(std::move(request), /*tag=*/0);
}

void GrpcCacheClient::LeaseBlocks(uint64_t tag, uint32_t count) {
  proto::CacheRequest request;
  request.mutable_lease()->set_count(count);
  Send(std::move(request), tag);
}

void GrpcCacheClient::ReturnBlocks(std::vector<PoolBlock> blocks) {
  proto::CacheRequest request;
  proto::ReturnBlocks* const returned = request.mutable_return_blocks();
  for (const PoolBlock& block : blocks) {
    proto::Block* const added = returned->add_blocks();
    added->set_id(static_cast<uint32_t>(block.id));
    added->set_generation(block.generation);
  }
  Send(std::move(request), /*tag=*/0);
}

void GrpcCacheClient::Close() {
  MutexLock lock(&mu_);
  if (closing_) return;
  closing_ = true;
  if (started_ && outbox_.empty()) WriteNext();
}

void GrpcCacheClient::Send(proto::CacheRequest request, uint64_t tag) {
  MutexLock lock(&mu_);
  if (closing_ || ended_) return;
  request.set_seq(++last_seq_);
  pending_.push_back({last_seq_, request.request_case(), tag});
  outbox_.push_back(std::move(request));
  if (outbox_.size() == 1) WriteNext();
}

void GrpcCacheClient::WriteNext() {
  if (ended_ || half_closed_) return;
  if (!outbox_.empty()) {
    StartWrite(&outbox_.front());
  } else if (closing_) {
    half_closed_ = true;
    StartWritesDone();
  }
}

void GrpcCacheClient::OnWriteDone(bool ok) {
  MutexLock lock(&mu_);
  // A failed write means a broken stream: the read fails as well, and ends the session.
  if (!ok) return;
  outbox_.pop_front();
  WriteNext();
}

void GrpcCacheClient::Fail(absl::Status reason) {
  if (!failure_.has_value()) failure_ = std::move(reason);
  context_.TryCancel();
}

std::optional<GrpcCacheClient::Pending> GrpcCacheClient::TakePending() {
  MutexLock lock(&mu_);
  silent_intervals_ = 0;
  if (pending_.empty() || pending_.front().seq != reply_.seq()) {
    Fail(absl::InternalError(fmt::format("the cache manager answered request {}, expected {}",
                                         reply_.seq(),
                                         pending_.empty() ? last_seq_ + 1 : pending_.front().seq)));
    return std::nullopt;
  }
  const Pending pending = pending_.front();
  pending_.pop_front();
  if (!answered_) {
    answered_ = true;
    changed_.NotifyAll();
  }
  if (closing_ || failure_.has_value()) return std::nullopt;
  return pending;
}

void GrpcCacheClient::OnReadDone(bool ok) {
  if (!ok) {
    {
      MutexLock lock(&mu_);
      ended_ = true;
      changed_.NotifyAll();
    }
    RemoveHold();
    return;
  }
  if (const auto pending = TakePending(); pending.has_value()) Deliver(*pending);
  StartRead(&reply_);
}

void GrpcCacheClient::Deliver(const Pending& pending) {
  const absl::Status refusal =
      reply_.has_refusal() ? FromRefusal(reply_.refusal()) : absl::OkStatus();
  switch (pending.kind) {
    case proto::CacheRequest::kOpen: {
      if (!refusal.ok()) return events_.on_opened(refusal);
      const proto::PoolOpened& opened = reply_.opened();
      return events_.on_opened(
          OpenedPool{opened.pool_epoch(), opened.memory_socket(), opened.num_blocks()});
    }
    case proto::CacheRequest::kLease: {
      if (!refusal.ok()) LOG_ERROR("the cache manager refused a lease: {}", refusal.ToString());
      std::vector<PoolBlock> blocks;
      blocks.reserve(reply_.leased().blocks_size());
      for (const proto::Block& block : reply_.leased().blocks()) {
        blocks.push_back({static_cast<int32_t>(block.id()), block.generation()});
      }
      return events_.on_leased(pending.tag, std::move(blocks));
    }
    case proto::CacheRequest::kReturnBlocks:
      if (!refusal.ok()) LOG_ERROR("the cache manager refused a return: {}", refusal.ToString());
      return;
    case proto::CacheRequest::kPing:
    case proto::CacheRequest::REQUEST_NOT_SET:
      return;
  }
}

void GrpcCacheClient::Watch() {
  while (true) {
    {
      MutexLock lock(&mu_);
      if (changed_.WaitFor(&mu_, kPingInterval, [this]() REQUIRES(mu_) { return ended_; })) return;
      // Counted in our own wake-ups and not by the clock, so that a pause of this very process does
      // not pass for silence of the peer.
      if (++silent_intervals_ > kMaxSilentIntervals) {
        return Fail(absl::UnavailableError(
            fmt::format("the cache manager at {} has not replied for {} s", target_,
                        kMaxSilentIntervals * kPingInterval.count())));
      }
    }
    proto::CacheRequest ping;
    ping.mutable_ping();
    Send(std::move(ping), /*tag=*/0);
  }
}

void GrpcCacheClient::OnDone(const grpc::Status& status) {
  absl::Status end;
  bool deliver = false;
  {
    MutexLock lock(&mu_);
    if (failure_.has_value()) {
      end = *failure_;
    } else if (status.error_code() == grpc::StatusCode::UNAUTHENTICATED) {
      end = absl::UnauthenticatedError(fmt::format("{}: {}", target_, status.error_message()));
    } else {
      end = absl::UnavailableError(fmt::format("the cache manager at {} ended the session{}{}",
                                               target_, status.ok() ? "" : ": ",
                                               status.error_message()));
    }
    deliver = answered_ && !closing_;
  }
  if (deliver) events_.on_closed(end);
  MutexLock lock(&mu_);
  end_ = std::move(end);
  done_ = true;
  // Under the lock: once it is released, the destructor may go on.
  changed_.NotifyAll();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CacheClient>> ConnectCacheClient(const std::string& target,
                                                                const std::string& token,
                                                                uint64_t api_epoch,
                                                                CacheEvents events,
                                                                int64_t timeout_ms) {
  auto client = std::make_unique<GrpcCacheClient>(target, token, api_epoch, std::move(events));
  if (absl::Status status = client->Connect(timeout_ms); !status.ok()) return status;
  return client;
}

}  // namespace wintserve
