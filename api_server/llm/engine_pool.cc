// The engine's dealings with the cache manager and the pool.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "api_server/llm/engine.h"
#include "common/check.h"
#include "common/log.h"

namespace wintserve {
namespace {

// What copying a block between the tiers is taken to cost before one was measured: 5 GB/s, which
// one core of any machine copies at and PCIe exceeds.
constexpr double kCopyBytesPerUs = 5'000;

// A sequence longer than this share of the model length is a long prompt, when no flag says so.
constexpr double kLongPrefillShare = 0.04;

// The pool may still be held by the session of an API server that has just died.
constexpr int64_t kOpeningPauseUs = 200'000;
constexpr int64_t kOpeningPatienceUs = 10'000'000;

// The scheduler drops all copies with a lost session: write-backs come again.
constexpr uint64_t kCopiesForgotten = 0;

// The cache manager knows by the number of a step when a block was written, and outlives API
// servers. A microsecond of the wall clock is shorter than any step, so that a later API server
// begins above all that an earlier one has used, also if that has committed nothing by it. Should
// somebody set the clock back, what the cache manager knows counts.
uint64_t FirstStep() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                   std::chrono::system_clock::now().time_since_epoch())
                                   .count());
}

}  // namespace

void Engine::Handle(CacheConnected event) {
  LOG_INFO("the cache manager is connected");
  cache_ = std::move(event.client);
  pool_.OnConnected();
}

void Engine::Handle(PoolOpened event) {
  if (failed_) return;
  const absl::Status& status = event.pool.status();
  if (absl::IsNotFound(status) && (pool_.resuming() || pool_.adopting())) {
    const bool is_held = pool_.resuming() || pool_.adopted_pool() != 0;
    if (is_held)
      LOG_WARNING("the KV pool that the engine workers hold is lost with its cache manager");
    return pool_.OnPoolGone();
  }
  if (absl::IsFailedPrecondition(status) && !pool_.resuming() && RetryOpening(status)) return;
  if (!status.ok()) {
    return Fatal(fmt::format("the cache manager cannot {} the KV pool: {}",
                             pool_.resuming()   ? "resume"
                             : pool_.adopting() ? "hand over"
                                                : "create",
                             std::string(status.message())));
  }
  first_opening_try_us_.reset();
  const bool adopted = pool_.adopting();
  // Of a pool that this API server has not opened yet, nothing was said; of another one it was.
  const bool was_wrong = adopted && first_distrusted_step_.has_value();
  if (!pool_.resuming()) first_distrusted_step_.reset();
  if (absl::Status unasked = pool_.OnOpened(*event.pool); !unasked.ok()) {
    return Fatal(std::string(unasked.message()));
  }
  if (adopted) {
    LOG_INFO("the KV pool {:016x} of an earlier API server is taken over", event.pool->pool_epoch);
    // Every rank has attached, so that every worker of the old one has left its group or has gone.
    cache_->Fence();
    // A worker has gone wrong meanwhile, or has died, and nobody knows how.
    if (was_wrong || !pool_.every_rank_maps_pool()) DistrustLastSteps();
    return;
  }
  // Of a session that was lost before its answer came: nothing of that pool is held.
  if (event.pool->resumed && !pool_.resuming()) cache_->Reconcile({}, {}, kCopiesForgotten);
}

bool Engine::RetryOpening(const absl::Status& refusal) {
  const int64_t now_us = EngineNowUs();
  if (!first_opening_try_us_.has_value()) first_opening_try_us_ = now_us;
  if (now_us - *first_opening_try_us_ < kOpeningPatienceUs) {
    next_opening_try_us_ = now_us + kOpeningPauseUs;
    return true;
  }
  first_opening_try_us_.reset();
  if (!pool_.adopting()) return false;
  LOG_WARNING("the KV pool of an earlier API server cannot be taken over: {}",
              std::string(refusal.message()));
  pool_.OnPoolGone();
  return true;
}

void Engine::Handle(const CacheAnswer& event) {
  if (!failed_ && scheduler_ != nullptr) event.deliver(scheduler_.get());
}

void Engine::Handle(BlocksAvailable event) {
  num_blocks_available_ = event.count;
  if (!failed_ && scheduler_ != nullptr) scheduler_->OnAvailable(event.count);
}

void Engine::Handle(const CacheLost& event) {
  if (failed_) return;
  const bool hangs = absl::IsDeadlineExceeded(event.status);
  LOG_WARNING("the session with the cache manager is lost: {}",
              std::string(event.status.message()));
  metrics_->RecordCacheLoss();
  pool_.OnLost();
  first_opening_try_us_.reset();
  next_opening_try_us_.reset();
  cache_link_->Reconnect(std::move(cache_), hangs);
}

bool Engine::AdvancePool() {
  if (next_opening_try_us_.has_value() && EngineNowUs() >= *next_opening_try_us_) {
    next_opening_try_us_.reset();
    OpenPool(pool_.adopting() ? PoolLifecycle::Action::kAdoptPool
                              : PoolLifecycle::Action::kOpenPool);
  }
  const PoolLifecycle::Action action = pool_.NextAction(steps_.idle());
  if (action == PoolLifecycle::Action::kNone) return false;
  Perform(action);
  return true;
}

void Engine::Perform(PoolLifecycle::Action action) {
  using Action = PoolLifecycle::Action;
  switch (action) {
    case Action::kNone:
      return;
    case Action::kAdoptPool:
    case Action::kOpenPool:
    case Action::kResumePool:
      return OpenPool(action);
    case Action::kUsePool:
      return UseNewPool();
    case Action::kLoseSession:
      return scheduler_->OnCacheLost();
    case Action::kReconcile:
      return ReconcileSession();
    case Action::kPause:
      pool_paused_ = true;
      return;
    case Action::kContinue:
      pool_paused_ = false;
      return;
    case Action::kDetachPool: {
      const uint64_t pool_epoch = pool_.mapped_pool(pool_.rank());
      detach_us_ = EngineNowUs();
      LOG_WARNING("engine worker {} lets go of KV pool {:016x}, which is lost", pool_.rank(),
                  pool_epoch);
      return work_queue_->Send(pool_.rank(), DetachPool{.pool_epoch = pool_epoch});
    }
  }
}

void Engine::OpenPool(PoolLifecycle::Action action) {
  if (action == PoolLifecycle::Action::kAdoptPool) {
    // Of as many blocks as it has. New workers do not find room for another one beside it.
    PoolSpec layout = startup_.pool_layout();
    layout.resume_only = true;
    layout.adopt_pool_epoch = pool_.adopted_pool();
    layout.adopt_any = pool_.adopted_pool() == 0;
    return cache_->OpenPool(layout);
  }
  absl::StatusOr<PoolSpec> spec = startup_.pool_spec();
  if (!spec.ok()) return Fatal(std::string(spec.status().message()));
  spec->resume_only = action != PoolLifecycle::Action::kOpenPool;
  cache_->OpenPool(*spec);
}

void Engine::UseNewPool() {
  const OpenedPool& pool = pool_.pool();
  pool_paused_ = false;
  if (scheduler_ == nullptr) {
    const SchedulerConfig config = SchedulerConfigOf(pool);
    first_step_ = config.first_step;
    scheduler_ = std::make_unique<Scheduler>(config);
    scheduler_->OnAvailable(num_blocks_available_);
    return BecomeReady();
  }
  LOG_INFO("a new KV pool is in use: {} blocks, {} in host memory", pool.num_blocks,
           pool.num_host_slots);
  metrics_->RecordPoolReplacement();
  RecordFacts();
  scheduler_->OnPoolReplaced(static_cast<int>(pool.num_blocks));
  scheduler_->OnAvailable(num_blocks_available_);
}

SchedulerConfig Engine::SchedulerConfigOf(const OpenedPool& pool) const {
  SchedulerConfig config = config_.scheduler;
  config.num_blocks = static_cast<int>(pool.num_blocks);
  config.vocab_size = startup_.sampled_vocab_size();
  config.first_step = std::max(FirstStep(), pool.newest_step + 1);
  config.restore_us_per_block =
      static_cast<double>(startup_.largest_block_bytes()) / kCopyBytesPerUs;
  if (config.long_prefill_token_threshold == 0) {
    config.long_prefill_token_threshold =
        std::max(1, static_cast<int>(kLongPrefillShare * startup_.max_model_len()));
  }
  return config;
}

void Engine::RecordFacts() {
  const StartupConfig& config = config_.startup;
  const OpenedPool& pool = pool_.pool();
  metrics_->RecordFacts({.max_num_seqs = config.max_num_seqs,
                         .max_model_len = startup_.max_model_len(),
                         .max_num_batched_tokens = config.max_num_batched_tokens,
                         .block_size_tokens = config.block_size_tokens,
                         .num_blocks = static_cast<int>(pool.num_blocks),
                         .num_host_blocks = static_cast<int>(pool.num_host_slots),
                         .pool_bytes = pool.num_blocks * startup_.block_bytes(),
                         .prefix_caching = config_.scheduler.prefix_caching});
}

void Engine::BecomeReady() {
  const StartupConfig& config = config_.startup;
  const OpenedPool& pool = pool_.pool();
  RecordFacts();
  {
    MutexLock lock(&readiness_mutex_);
    readiness_ = {.ready = true};
    limits_ = {.max_model_len = startup_.max_model_len(), .vocab_size = startup_.vocab_size()};
  }
  LOG_INFO(
      "ready: world size {}, KV pool of {} blocks ({} MiB), {} blocks in host memory, max model "
      "length {}",
      config.world_size, pool.num_blocks, pool.num_blocks * startup_.block_bytes() >> 20,
      pool.num_host_slots, startup_.max_model_len());
  if (config_.on_ready) config_.on_ready();
}

void Engine::ReconcileSession() {
  HeldBlocks held = scheduler_->OnCacheResumed();
  LOG_INFO("the KV pool is resumed: {} entries and {} leased blocks are held", held.pins.size(),
           held.leased.size());
  cache_->Reconcile(std::move(held.pins), std::move(held.leased), kCopiesForgotten);
  cache_->Fence();  // no plan is in flight: no copy of before the loss runs any more
  // Perhaps again: saying it once more costs hits, not saying it wrong answers.
  if (first_distrusted_step_.has_value()) cache_->DistrustSteps(*first_distrusted_step_);
  pool_paused_ = false;
}

void Engine::SendToCache(std::vector<CacheCommand> commands) {
  struct Send {
    CacheClient* cache;
    void operator()(PeekCommand& c) const { cache->Peek(c.tag, c.salt, *c.tokens); }
    void operator()(MatchCommand& c) const {
      cache->Match(c.tag, c.salt, c.tokens, c.allow_restore);
    }
    void operator()(LeaseCommand& c) const { cache->LeaseBlocks(c.tag, c.count); }
    void operator()(CommitCommand& c) const { cache->Commit(c.tag, std::move(c.request)); }
    void operator()(ReleaseCommand& c) const { cache->Release(std::move(c.entries)); }
    void operator()(ReturnCommand& c) const { cache->ReturnBlocks(std::move(c.blocks)); }
    void operator()(CopyDoneCommand& c) const { cache->CopyDone(std::move(c.copy_ids), c.step); }
  };
  CHECK(cache_ != nullptr || commands.empty(), "{} commands without a session", commands.size());
  for (CacheCommand& command : commands) std::visit(Send{cache_.get()}, command);
}

}  // namespace wintserve
