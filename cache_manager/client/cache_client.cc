#include "cache_manager/client/cache_client.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "common/log.h"
#include "common/mutex.h"
#include "common/transport/queue_transport.h"
#include "proto/cache.grpc.pb.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int kMaxMessageBytes = 64 << 20;
constexpr std::chrono::milliseconds kWatchInterval(250);
constexpr int kIntervalsPerPing = 4;
constexpr int kMaxSilentIntervals = 12;
constexpr std::chrono::seconds kCloseTimeout(2);

std::shared_ptr<grpc::Channel> CreateChannel(const std::string& target, const TlsIdentity& tls) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // Slower than a session's own watch, which tells silence from an end.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 2000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 3000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A proxy of the environment is meant for the outside world.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // The cache manager may still be starting: knock often, and not in step with another channel.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  return grpc::CreateCustomChannel(target, QueueChannelCredentials(target, tls), arguments);
}

void AddToken(const std::string& token, grpc::ClientContext* context) {
  context->AddMetadata(kTokenMetadataKey, TokenMetadataValue(token));
}

void Write(const PoolBlock& block, proto::Block* message) {
  message->set_id(static_cast<uint32_t>(block.id));
  message->set_generation(block.generation);
}

PoolBlock Read(const proto::Block& message) {
  return {static_cast<int32_t>(message.id()), message.generation()};
}

PinnedBlock Read(const proto::PinnedBlock& message) {
  return {message.entry(), Read(message.block())};
}

std::vector<CopyOrder> ReadCopies(const google::protobuf::RepeatedPtrField<proto::Copy>& copies) {
  std::vector<CopyOrder> read;
  read.reserve(copies.size());
  for (const proto::Copy& copy : copies) {
    read.push_back(
        {.copy_id = copy.copy_id(),
         .direction = copy.to_device() ? CopyDirection::kToDevice : CopyDirection::kToHost,
         .block = Read(copy.block()),
         .host_slot = copy.host_slot()});
  }
  return read;
}

MatchResult ReadMatch(const proto::Matched& message) {
  MatchResult read;
  for (const proto::PinnedBlock& pinned : message.device()) read.device.push_back(Read(pinned));
  for (const proto::PinnedBlock& pinned : message.restoring()) {
    read.restoring.push_back(Read(pinned));
  }
  read.copies = ReadCopies(message.copies());
  return read;
}

std::vector<CommittedBlock> ReadCommitted(const proto::Committed& message, size_t num_blocks) {
  std::vector<CommittedBlock> read(num_blocks);
  const auto num_answered =
      static_cast<size_t>(std::min(message.entry_size(), message.duplicate_size()));
  for (size_t i = 0; i < std::min(num_blocks, num_answered); ++i) {
    const int at = static_cast<int>(i);
    read[i] = {message.entry(at), message.duplicate(at)};
  }
  return read;
}

// An event that nobody wants is skipped.
template <typename Event, typename... Arguments>
void Tell(const Event& event, Arguments&&... arguments) {
  if (event) event(std::forward<Arguments>(arguments)...);
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
                  CacheEvents events, const TlsIdentity& tls)
      : target_(target),
        api_epoch_(api_epoch),
        events_(std::move(events)),
        channel_(CreateChannel(target, tls)),
        stub_(proto::Cache::NewStub(channel_)) {
    AddToken(token, &context_);
  }

  absl::Status Connect(int64_t timeout_ms);
  ~GrpcCacheClient() override;

  void OpenPool(const PoolSpec& spec) override;
  void Peek(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens) override;
  void Match(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens,
             bool allow_restore) override;
  void LeaseBlocks(uint64_t tag, uint32_t count) override;
  void Commit(uint64_t tag, CommitRequest request) override;
  void Release(std::vector<uint64_t> entries) override;
  void ReturnBlocks(std::vector<PoolBlock> blocks) override;
  void CopyDone(std::vector<uint64_t> copy_ids, uint64_t step) override;
  void Reconcile(std::vector<PinCount> pins, std::vector<PoolBlock> leased,
                 uint64_t last_copy_id) override;
  void Fence() override;
  void DistrustSteps(uint64_t first_step) override;
  void Close() override;

 private:
  // A request that has no reply yet.
  struct Pending {
    uint64_t seq;
    proto::CacheRequest::RequestCase kind;
    uint64_t tag;
    size_t num_blocks;  // of a Commit
  };
  // What reply_ is, and whether somebody is to be told of it.
  struct Received {
    std::optional<Pending> answered;  // none: a push
    bool deliver;
  };

  void Send(proto::CacheRequest request, uint64_t tag = 0) EXCLUDES(mu_);
  // Starts the next write, or half-closes the stream when there is none and there will be none.
  void WriteNext() REQUIRES(mu_);
  // Ends the stream because of `reason`.
  void Fail(absl::Status reason) REQUIRES(mu_);
  Received TakePending() EXCLUDES(mu_);
  void Deliver(const Pending& pending);
  void DeliverRefusal(const Pending& pending, const absl::Status& refusal);
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
  Send(std::move(ping));

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
  open->set_root_seed(spec.root_seed);
  open->set_host_bytes(spec.host_bytes);
  open->set_block_size_tokens(static_cast<uint32_t>(spec.block_size_tokens));
  open->set_resume_only(spec.resume_only);
  open->set_adopt_pool_epoch(spec.adopt_pool_epoch);
  open->set_adopt_any(spec.adopt_any);
  Send(std::move(request));
}

void GrpcCacheClient::Peek(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens) {
  proto::CacheRequest request;
  proto::Peek* const peek = request.mutable_peek();
  peek->set_salt(salt);
  peek->mutable_tokens()->Add(tokens.begin(), tokens.end());
  Send(std::move(request), tag);
}

void GrpcCacheClient::Match(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens,
                            bool allow_restore) {
  proto::CacheRequest request;
  proto::Match* const match = request.mutable_match();
  match->set_salt(salt);
  match->mutable_tokens()->Add(tokens.begin(), tokens.end());
  match->set_allow_restore(allow_restore);
  Send(std::move(request), tag);
}

void GrpcCacheClient::LeaseBlocks(uint64_t tag, uint32_t count) {
  proto::CacheRequest request;
  request.mutable_lease()->set_count(count);
  Send(std::move(request), tag);
}

void GrpcCacheClient::Commit(uint64_t tag, CommitRequest commit) {
  proto::CacheRequest request;
  proto::Commit* const message = request.mutable_commit();
  message->set_parent(commit.parent);
  message->set_salt(std::move(commit.salt));
  message->set_step(commit.step);
  for (const CommitBlock& block : commit.blocks) {
    Write(block.block, message->add_blocks());
    message->mutable_tokens()->Add(block.tokens.begin(), block.tokens.end());
  }
  Send(std::move(request), tag);
}

void GrpcCacheClient::Release(std::vector<uint64_t> entries) {
  proto::CacheRequest request;
  request.mutable_release()->mutable_entries()->Add(entries.begin(), entries.end());
  Send(std::move(request));
}

void GrpcCacheClient::ReturnBlocks(std::vector<PoolBlock> blocks) {
  proto::CacheRequest request;
  proto::ReturnBlocks* const returned = request.mutable_return_blocks();
  for (const PoolBlock& block : blocks) Write(block, returned->add_blocks());
  Send(std::move(request));
}

void GrpcCacheClient::CopyDone(std::vector<uint64_t> copy_ids, uint64_t step) {
  proto::CacheRequest request;
  proto::CopyDone* const done = request.mutable_copy_done();
  done->mutable_copy_ids()->Add(copy_ids.begin(), copy_ids.end());
  done->set_step(step);
  Send(std::move(request));
}

void GrpcCacheClient::Reconcile(std::vector<PinCount> pins, std::vector<PoolBlock> leased,
                                uint64_t last_copy_id) {
  proto::CacheRequest request;
  proto::Reconcile* const reconcile = request.mutable_reconcile();
  for (const PinCount& pin : pins) {
    reconcile->add_pinned_entry(pin.entry);
    reconcile->add_pin_count(pin.count);
  }
  for (const PoolBlock& block : leased) Write(block, reconcile->add_leased());
  reconcile->set_last_copy_id(last_copy_id);
  Send(std::move(request));
}

void GrpcCacheClient::Fence() {
  proto::CacheRequest request;
  request.mutable_fence();
  Send(std::move(request));
}

void GrpcCacheClient::DistrustSteps(uint64_t first_step) {
  proto::CacheRequest request;
  request.mutable_distrust_steps()->set_first_step(first_step);
  Send(std::move(request));
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
  pending_.push_back({last_seq_, request.request_case(), tag,
                      static_cast<size_t>(request.commit().blocks_size())});
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

GrpcCacheClient::Received GrpcCacheClient::TakePending() {
  MutexLock lock(&mu_);
  silent_intervals_ = 0;
  const bool deliver = !closing_ && !failure_.has_value();
  if (reply_.seq() == 0) return {std::nullopt, deliver};
  // An answer that came before is old news.
  const uint64_t expected = pending_.empty() ? last_seq_ + 1 : pending_.front().seq;
  if (reply_.seq() < expected) return {std::nullopt, false};
  if (reply_.seq() > expected || pending_.empty()) {
    Fail(absl::InternalError(
        fmt::format("the cache manager answered request {}, expected {}", reply_.seq(), expected)));
    return {std::nullopt, false};
  }
  const Pending pending = pending_.front();
  pending_.pop_front();
  if (!answered_) {
    answered_ = true;
    changed_.NotifyAll();
  }
  return {pending, deliver};
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
  if (const Received received = TakePending(); received.deliver) {
    Tell(events_.on_available, reply_.num_available());
    if (received.answered.has_value()) {
      Deliver(*received.answered);
    } else if (reply_.has_copy_out()) {
      Tell(events_.on_copy_out, ReadCopies(reply_.copy_out().copies()));
    }
  }
  StartRead(&reply_);
}

void GrpcCacheClient::Deliver(const Pending& pending) {
  if (reply_.has_refusal()) return DeliverRefusal(pending, FromRefusal(reply_.refusal()));
  switch (pending.kind) {
    case proto::CacheRequest::kOpen: {
      const proto::PoolOpened& opened = reply_.opened();
      return Tell(events_.on_opened, OpenedPool{.pool_epoch = opened.pool_epoch(),
                                                .memory_socket = opened.memory_socket(),
                                                .num_blocks = opened.num_blocks(),
                                                .num_host_slots = opened.num_host_slots(),
                                                .resumed = opened.resumed(),
                                                .newest_step = opened.newest_step()});
    }
    case proto::CacheRequest::kPeek:
      return Tell(events_.on_peeked, pending.tag,
                  PeekResult{reply_.peeked().device_blocks(), reply_.peeked().host_blocks()});
    case proto::CacheRequest::kMatch: {
      MatchResult matched = ReadMatch(reply_.matched());
      if (matched.copies.size() == matched.restoring.size()) {
        return Tell(events_.on_matched, pending.tag, std::move(matched));
      }
      MutexLock lock(&mu_);
      return Fail(
          absl::InternalError(fmt::format("the cache manager restores {} blocks by {} copies",
                                          matched.restoring.size(), matched.copies.size())));
    }
    case proto::CacheRequest::kLease: {
      std::vector<PoolBlock> blocks;
      blocks.reserve(reply_.leased().blocks_size());
      for (const proto::Block& block : reply_.leased().blocks()) blocks.push_back(Read(block));
      return Tell(events_.on_leased, pending.tag, std::move(blocks));
    }
    case proto::CacheRequest::kCommit:
      return Tell(events_.on_committed, pending.tag,
                  ReadCommitted(reply_.committed(), pending.num_blocks));
    default:
      return;
  }
}

void GrpcCacheClient::DeliverRefusal(const Pending& pending, const absl::Status& refusal) {
  if (pending.kind == proto::CacheRequest::kOpen) return Tell(events_.on_opened, refusal);
  LOG_ERROR("the cache manager refused a request: {}", refusal.ToString());
  switch (pending.kind) {
    case proto::CacheRequest::kPeek:
      return Tell(events_.on_peeked, pending.tag, PeekResult());
    case proto::CacheRequest::kMatch:
      return Tell(events_.on_matched, pending.tag, MatchResult());
    case proto::CacheRequest::kLease:
      return Tell(events_.on_leased, pending.tag, std::vector<PoolBlock>());
    case proto::CacheRequest::kCommit:
      return Tell(events_.on_committed, pending.tag,
                  std::vector<CommittedBlock>(pending.num_blocks));
    case proto::CacheRequest::kReconcile: {
      // Nothing else would be served from now on.
      MutexLock lock(&mu_);
      return Fail(refusal);
    }
    default:
      return;
  }
}

void GrpcCacheClient::Watch() {
  for (int interval = 1;; ++interval) {
    {
      MutexLock lock(&mu_);
      if (changed_.WaitFor(&mu_, kWatchInterval, [this]() REQUIRES(mu_) { return ended_; })) return;
      // Counted in our own wake-ups and not by the clock, so that a pause of this very process does
      // not pass for silence of the peer.
      if (++silent_intervals_ > kMaxSilentIntervals) {
        return Fail(absl::DeadlineExceededError(
            fmt::format("the cache manager at {} has not replied for {} s", target_,
                        kMaxSilentIntervals * kWatchInterval.count() / 1000)));
      }
    }
    if (interval % kIntervalsPerPing != 0) continue;
    proto::CacheRequest ping;
    ping.mutable_ping();
    Send(std::move(ping));
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
  if (deliver) Tell(events_.on_closed, end);
  MutexLock lock(&mu_);
  end_ = std::move(end);
  done_ = true;
  // Under the lock: once it is released, the destructor may go on.
  changed_.NotifyAll();
}

}  // namespace

absl::StatusOr<uint64_t> FlushPrefixCache(const std::string& target, const std::string& token,
                                          const std::optional<std::string>& salt,
                                          int64_t timeout_ms, const TlsIdentity& tls) {
  const auto stub = proto::Cache::NewStub(CreateChannel(target, tls));
  grpc::ClientContext context;
  AddToken(token, &context);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms));
  context.set_wait_for_ready(true);  // the cache manager may be restarting
  proto::AdminRequest request;
  if (salt.has_value()) {
    request.set_flush_salt(*salt);
  } else {
    request.mutable_flush_all();
  }
  proto::AdminReply reply;
  const grpc::Status status = stub->Admin(&context, request, &reply);
  if (status.ok()) return reply.num_entries();
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return absl::UnavailableError(
        fmt::format("no cache manager at {} within {} ms", target, timeout_ms));
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      fmt::format("{}: {}", target, status.error_message()));
}

absl::StatusOr<std::unique_ptr<CacheClient>> ConnectCacheClient(
    const std::string& target, const std::string& token, uint64_t api_epoch, CacheEvents events,
    int64_t timeout_ms, const TlsIdentity& tls) {
  auto client = std::make_unique<GrpcCacheClient>(target, token, api_epoch, std::move(events), tls);
  if (absl::Status status = client->Connect(timeout_ms); !status.ok()) return status;
  return client;
}

}  // namespace wintserve
