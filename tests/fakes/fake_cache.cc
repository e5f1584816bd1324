#include "tests/fakes/fake_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

uint32_t NumHostSlots(const PoolSpec& spec, uint64_t host_bytes) {
  const uint64_t block_bytes = std::accumulate(spec.block_bytes_by_rank.begin(),
                                               spec.block_bytes_by_rank.end(), uint64_t{0});
  return block_bytes == 0 ? 0 : static_cast<uint32_t>(host_bytes / block_bytes);
}

// Events are optional for a test that does not look at them.
template <typename Event, typename... Arguments>
void Tell(bool wanted, const Event& event, Arguments&&... arguments) {
  if (wanted && event) event(std::forward<Arguments>(arguments)...);
}

}  // namespace

class FakeCache::Client : public CacheClient {
 public:
  Client(FakeCache* cache, std::shared_ptr<Session> session)
      : cache_(cache), session_(std::move(session)) {}

  ~Client() override {
    Close();
    MutexLock lock(&cache_->mutex_);
    cache_->changed_.Wait(&cache_->mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS {
      return session_->ended || cache_->held_;
    });
    cache_->EndSession(session_.get());
  }

  void OpenPool(const PoolSpec& spec) override {
    Send([this, spec]() NO_THREAD_SAFETY_ANALYSIS { cache_->Open(*session_, spec); });
  }

  void Peek(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens) override {
    Send([=, this, tokens = std::vector(tokens.begin(), tokens.end())]() NO_THREAD_SAFETY_ANALYSIS {
      PrefixCache* const cache = cache_->CacheOf(*session_, "Peek");
      const PeekResult result = cache == nullptr ? PeekResult() : cache->Peek(salt, tokens);
      Answer(session_->events.on_peeked, tag, result);
    });
  }

  void Match(uint64_t tag, const std::string& salt, std::span<const int32_t> tokens,
             bool allow_restore) override {
    Send([=, this, tokens = std::vector(tokens.begin(), tokens.end())]() NO_THREAD_SAFETY_ANALYSIS {
      PrefixCache* const cache = cache_->CacheOf(*session_, "Match");
      Answer(session_->events.on_matched, tag,
             cache == nullptr ? MatchResult() : cache->Match(salt, tokens, allow_restore));
    });
  }

  void LeaseBlocks(uint64_t tag, uint32_t count) override {
    Send([=, this]() NO_THREAD_SAFETY_ANALYSIS {
      std::vector<PoolBlock> blocks;
      if (PrefixCache* const cache = cache_->CacheOf(*session_, "LeaseBlocks"); cache != nullptr) {
        auto leased = cache->Lease(count);
        cache_->Check(leased.status(), "LeaseBlocks");
        if (leased.ok()) blocks = *std::move(leased);
      }
      Answer(session_->events.on_leased, tag, std::move(blocks));
    });
  }

  void Commit(uint64_t tag, CommitRequest request) override {
    Send([=, this, request = std::move(request)]() NO_THREAD_SAFETY_ANALYSIS {
      std::vector<CommittedBlock> committed(request.blocks.size());
      if (PrefixCache* const cache = cache_->CacheOf(*session_, "Commit"); cache != nullptr) {
        auto result = cache->Commit(request);
        cache_->Check(result.status(), "Commit");
        cache_->pool_.newest_step = std::max(cache_->pool_.newest_step, request.step);
        if (result.ok()) committed = *std::move(result);
      }
      Answer(session_->events.on_committed, tag, std::move(committed));
    });
  }

  void Release(std::vector<uint64_t> entries) override {
    Do("Release",
       [entries = std::move(entries)](PrefixCache* cache) { return cache->Release(entries); });
  }

  void ReturnBlocks(std::vector<PoolBlock> blocks) override {
    Do("ReturnBlocks",
       [blocks = std::move(blocks)](PrefixCache* cache) { return cache->Return(blocks); });
  }

  void CopyDone(std::vector<uint64_t> copy_ids, uint64_t step) override {
    Do("CopyDone",
       [this, step, copy_ids = std::move(copy_ids)](PrefixCache* cache) NO_THREAD_SAFETY_ANALYSIS {
         for (const uint64_t copy_id : copy_ids) {
           cache_->pool_.write_backs.erase(copy_id);
           // One that is no longer under way was reported before a session broke, or fenced.
           cache->CopyDone(copy_id, step).IgnoreError();
         }
         return absl::OkStatus();
       });
  }

  void Reconcile(std::vector<PinCount> pins, std::vector<PoolBlock> leased,
                 uint64_t last_copy_id) override {
    Send([this, last_copy_id, pins = std::move(pins), leased = std::move(leased)]()
             NO_THREAD_SAFETY_ANALYSIS {
               Pool& pool = cache_->pool_;
               if (pool.session != session_.get() || !pool.must_reconcile) {
                 cache_->Check(absl::FailedPreconditionError("nothing to reconcile"), "Reconcile");
               } else {
                 const absl::Status status = pool.cache->Reconcile(pins, leased);
                 cache_->Check(status, "Reconcile");
                 pool.must_reconcile = !status.ok();
                 pool.num_lost_write_backs = static_cast<size_t>(std::distance(
                     pool.write_backs.upper_bound(last_copy_id), pool.write_backs.end()));
               }
               cache_->TellAvailable(*session_);
             });
  }

  void Fence() override {
    Do("Fence", [](PrefixCache* cache) {
      cache->Fence();
      return absl::OkStatus();
    });
  }

  void DistrustSteps(uint64_t first_step) override {
    Do("DistrustSteps", [first_step](PrefixCache* cache) {
      cache->DistrustSteps(first_step);
      return absl::OkStatus();
    });
  }

  void Close() override {
    {
      MutexLock lock(&cache_->mutex_);
      if (std::exchange(session_->closing, true)) return;
    }
    Send([this]() NO_THREAD_SAFETY_ANALYSIS { cache_->EndSession(session_.get()); });
  }

 private:
  void Send(std::function<void()> serve) { cache_->Send(session_, std::move(serve)); }

  template <typename Event, typename Result>
  void Answer(const Event& event, uint64_t tag, Result result) NO_THREAD_SAFETY_ANALYSIS {
    cache_->TellAvailable(*session_);
    Tell(!session_->closing, event, tag, std::move(result));
  }

  // A request whose answer says nothing.
  void Do(const char* request, std::function<absl::Status(PrefixCache*)> run) {
    Send([=, this]() NO_THREAD_SAFETY_ANALYSIS {
      if (PrefixCache* const cache = cache_->CacheOf(*session_, request); cache != nullptr) {
        cache_->Check(run(cache), request);
      }
      cache_->TellAvailable(*session_);
    });
  }

  FakeCache* const cache_;
  const std::shared_ptr<Session> session_;
};

FakeCache::FakeCache() : thread_([this] { Run(); }) {}

FakeCache::~FakeCache() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

FakeCache::ConnectFunction FakeCache::Connector() {
  return [this](uint64_t api_epoch,
                CacheEvents events) -> absl::StatusOr<std::unique_ptr<CacheClient>> {
    MutexLock lock(&mutex_);
    if (!reachable_) return absl::UnavailableError("no cache manager");
    auto session = std::make_shared<Session>(Session{api_epoch, std::move(events)});
    sessions_.push_back(session);
    return std::make_unique<Client>(this, std::move(session));
  };
}

void FakeCache::SetReachable(bool reachable) {
  MutexLock lock(&mutex_);
  reachable_ = reachable;
}

void FakeCache::SetDelay(std::chrono::microseconds delay) {
  MutexLock lock(&mutex_);
  delay_ = delay;
}

void FakeCache::Hold(bool held) {
  MutexLock lock(&mutex_);
  held_ = held;
  changed_.NotifyAll();
}

void FakeCache::DropSession() {
  MutexLock lock(&mutex_);
  BreakSession("the stream broke", /*resumable=*/true);
}

void FakeCache::Die() {
  MutexLock lock(&mutex_);
  BreakSession("the cache manager died", /*resumable=*/false);
}

uint64_t FakeCache::Flush(const std::optional<std::string>& salt) {
  MutexLock lock(&mutex_);
  return pool_.cache == nullptr ? 0 : pool_.cache->Flush(salt);
}

void FakeCache::ResizeHostTier(uint64_t host_bytes) {
  MutexLock lock(&mutex_);
  resized_host_bytes_ = host_bytes;
}

bool FakeCache::WaitUntilAllAvailable() {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, std::chrono::seconds(10), [this]() NO_THREAD_SAFETY_ANALYSIS {
    return pool_.cache != nullptr && pool_.cache->num_available() == pool_.spec.num_blocks;
  });
}

PoolSpec FakeCache::spec() const {
  MutexLock lock(&mutex_);
  return pool_.spec;
}

PrefixCacheStats FakeCache::stats() const {
  MutexLock lock(&mutex_);
  return pool_.cache == nullptr ? PrefixCacheStats() : pool_.cache->stats();
}

uint64_t FakeCache::num_pools() const {
  MutexLock lock(&mutex_);
  return last_pool_epoch_ - kFirstPoolEpoch + 1;
}

absl::Status FakeCache::CheckInvariants() const {
  MutexLock lock(&mutex_);
  return pool_.cache == nullptr ? absl::OkStatus() : pool_.cache->CheckInvariants();
}

std::vector<std::string> FakeCache::refusals() const {
  MutexLock lock(&mutex_);
  return refusals_;
}

void FakeCache::Send(std::shared_ptr<Session> session, std::function<void()> serve) {
  MutexLock lock(&mutex_);
  if (session->ended) return;
  requests_.push_back({std::move(session), Clock::now() + delay_, std::move(serve)});
  changed_.NotifyAll();
}

// Events are told under the lock, so that nothing is told once Close() has returned.
void FakeCache::Run() {
  MutexLock lock(&mutex_);
  while (true) {
    changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS {
      return stopping_ || (!requests_.empty() && !held_);
    });
    if (stopping_) return;
    const auto wait = requests_.front().due - Clock::now();
    const bool interrupted = wait > Clock::duration::zero() &&
                             changed_.WaitFor(&mutex_, wait, [this]() NO_THREAD_SAFETY_ANALYSIS {
                               return stopping_ || held_ || requests_.empty();
                             });
    if (interrupted) continue;
    const Request request = std::move(requests_.front());
    requests_.pop_front();
    if (!request.session->ended) {
      request.serve();
      PushCopyOuts(*request.session);
    }
    std::erase_if(sessions_, [](const auto& session) { return session->ended; });
    changed_.NotifyAll();
  }
}

PrefixCache* FakeCache::CacheOf(const Session& session, const char* request) {
  if (pool_.session == &session && !pool_.must_reconcile) return pool_.cache.get();
  Check(absl::FailedPreconditionError(pool_.session == &session ? "Reconcile comes first"
                                                                : "OpenPool comes first"),
        request);
  return nullptr;
}

void FakeCache::Check(const absl::Status& status, const char* request) {
  if (!status.ok()) refusals_.push_back(fmt::format("{}: {}", request, status.ToString()));
}

void FakeCache::Open(const Session& session, const PoolSpec& spec) {
  absl::StatusOr<OpenedPool> opened = TryOpen(session, spec);
  TellAvailable(session);
  Tell(!session.closing, session.events.on_opened, std::move(opened));
}

absl::StatusOr<OpenedPool> FakeCache::TryOpen(const Session& session, const PoolSpec& spec) {
  if (pool_.session == &session) {
    return absl::FailedPreconditionError("this session has the pool open already");
  }
  if (spec.resume_only && (spec.adopt_pool_epoch != 0 || spec.adopt_any)) {
    return Adopt(session, spec);
  }
  const bool taken = pool_.cache != nullptr && pool_.resumable;
  if (taken && pool_.api_epoch != session.api_epoch) {
    return absl::FailedPreconditionError("another session has the pool open");
  }
  if (!taken && spec.resume_only) {
    return absl::NotFoundError(fmt::format("no pool of api_epoch {:x}", session.api_epoch));
  }
  if (!taken) {
    pool_ = Pool();
    pool_.spec = spec;
    pool_.num_host_slots = NumHostSlots(spec, resized_host_bytes_.value_or(spec.host_bytes));
    pool_.api_epoch = session.api_epoch;
    pool_.pool_epoch = ++last_pool_epoch_;
    pool_.cache =
        std::make_unique<PrefixCache>(PrefixCacheConfig{.num_blocks = spec.num_blocks,
                                                        .num_host_slots = pool_.num_host_slots,
                                                        .block_size_tokens = spec.block_size_tokens,
                                                        .root_seed = spec.root_seed});
  }
  pool_.session = &session;
  pool_.must_reconcile = taken;
  return OpenedPool{.pool_epoch = pool_.pool_epoch,
                    .memory_socket = "unused",
                    .num_blocks = spec.num_blocks,
                    .num_host_slots = pool_.num_host_slots,
                    .resumed = taken};
}

absl::StatusOr<OpenedPool> FakeCache::Adopt(const Session& session, const PoolSpec& spec) {
  const bool is_it = spec.adopt_any || pool_.pool_epoch == spec.adopt_pool_epoch;
  if (pool_.cache == nullptr || !pool_.adoptable || !is_it) {
    return absl::NotFoundError(fmt::format("no pool of pool_epoch {:x}", spec.adopt_pool_epoch));
  }
  const bool fits = spec.root_seed == pool_.spec.root_seed &&
                    spec.host_bytes == pool_.spec.host_bytes &&
                    spec.block_bytes_by_rank == pool_.spec.block_bytes_by_rank &&
                    spec.block_size_tokens == pool_.spec.block_size_tokens;
  if (!fits && spec.adopt_any) return absl::NotFoundError("the pool is laid out otherwise");
  if (pool_.session != nullptr) {
    return absl::FailedPreconditionError("another session has the pool open");
  }
  if (!fits) return absl::FailedPreconditionError("the pool is laid out otherwise");
  if (pool_.resumable) EndSessionOfPool();
  pool_.api_epoch = session.api_epoch;
  pool_.session = &session;
  pool_.resumable = true;
  return OpenedPool{.pool_epoch = pool_.pool_epoch,
                    .memory_socket = "unused",
                    .num_blocks = pool_.spec.num_blocks,
                    .num_host_slots = pool_.num_host_slots,
                    .newest_step = pool_.newest_step};
}

void FakeCache::EndSessionOfPool() {
  pool_.session = nullptr;
  pool_.resumable = false;
  pool_.must_reconcile = false;
  pool_.write_backs.clear();
  pool_.num_lost_write_backs = 0;
  pool_.cache->EndSession();
}

void FakeCache::TellAvailable(const Session& session) {
  const uint32_t available = pool_.session == &session ? pool_.cache->num_available() : 0;
  Tell(!session.closing, session.events.on_available, available);
}

void FakeCache::PushCopyOuts(const Session& session) {
  if (pool_.session != &session || pool_.must_reconcile || session.closing) return;
  std::vector<CopyOrder> copies;
  for (auto lost =
           std::prev(pool_.write_backs.end(), static_cast<ptrdiff_t>(pool_.num_lost_write_backs));
       pool_.num_lost_write_backs > 0 && copies.size() < kMaxCopiesPerPush; ++lost) {
    copies.push_back(lost->second);
    --pool_.num_lost_write_backs;
  }
  if (copies.empty()) copies = pool_.cache->TakeCopyOuts(kMaxCopiesPerPush);
  if (copies.empty()) return;
  for (const CopyOrder& copy : copies) pool_.write_backs.insert_or_assign(copy.copy_id, copy);
  TellAvailable(session);
  Tell(true, session.events.on_copy_out, std::move(copies));
}

void FakeCache::EndSession(Session* session) {
  session->ended = true;
  if (pool_.session == session) EndSessionOfPool();
}

void FakeCache::BreakSession(const char* reason, bool resumable) {
  for (const auto& session : std::exchange(sessions_, {})) {
    session->ended = true;
    Tell(!session->closing, session->events.on_closed, absl::UnavailableError(reason));
  }
  requests_.clear();
  pool_.session = nullptr;
  pool_.resumable = pool_.resumable && resumable;
  pool_.adoptable = pool_.adoptable && resumable;
  changed_.NotifyAll();
}

}  // namespace wintserve
