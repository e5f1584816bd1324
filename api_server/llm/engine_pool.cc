// The engine's dealings with the cache manager and the pool.
#include <fmt/core.h>

#include <algorithm>
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

// The scheduler drops all copies with a lost session: write-backs come again.
constexpr uint64_t kCopiesForgotten = 0;

}  // namespace

void Engine::Handle(CacheConnected event) {
  LOG_INFO("the cache manager is connected");
  cache_ = std::move(event.client);
  pool_.OnConnected();
}

void Engine::Handle(PoolOpened event) {
  if (absl::IsNotFound(event.pool.status()) && pool_.resuming()) return pool_.OnPoolGone();
  if (!event.pool.ok()) {
    return Fatal(fmt::format("the cache manager cannot {} the KV pool: {}",
                             pool_.resuming() ? "resume" : "create",
                             std::string(event.pool.status().message())));
  }
  if (absl::Status status = pool_.OnOpened(*event.pool); !status.ok()) {
    return Fatal(std::string(status.message()));
  }
  // Of a session that was lost before its answer came: nothing of that pool is held.
  if (event.pool->resumed && !pool_.resuming()) cache_->Reconcile({}, {}, kCopiesForgotten);
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
  cache_link_->Reconnect(std::move(cache_), hangs);
}

// Does what has become possible, and says what is missing.
void Engine::AdvancePool() {
  for (;;) {
    const PoolLifecycle::Action action = pool_.NextAction(steps_.idle());
    if (action == PoolLifecycle::Action::kNone) break;
    Perform(action);
    if (failed_) return;
  }
  if (scheduler_ != nullptr) return;  // once ready, a lost pool does not make the engine unready
  const std::string workers = startup_.WaitingFor();
  SetReadiness(false, workers.empty() ? pool_.WaitingFor() : workers);
}

void Engine::Perform(PoolLifecycle::Action action) {
  using Action = PoolLifecycle::Action;
  switch (action) {
    case Action::kNone:
      return;
    case Action::kOpenPool:
    case Action::kResumePool: {
      absl::StatusOr<PoolSpec> spec = startup_.pool_spec();
      if (!spec.ok()) return Fatal(std::string(spec.status().message()));
      spec->resume_only = action == Action::kResumePool;
      return cache_->OpenPool(*spec);
    }
    case Action::kAttachPool: {
      const OpenedPool& pool = pool_.pool();
      return work_queue_->Send(AttachPool{.pool_epoch = pool.pool_epoch,
                                          .memory_socket = pool.memory_socket,
                                          .num_blocks = pool.num_blocks,
                                          .num_host_slots = pool.num_host_slots});
    }
    case Action::kUsePool:
      return UseNewPool();
    case Action::kLoseSession:
      return scheduler_->OnCacheLost();
    case Action::kReconcile:
      return ReconcileSession();
    case Action::kPause:
      return scheduler_->SetPaused(true);
    case Action::kContinue:
      return scheduler_->SetPaused(false);
    case Action::kDetachPool:
      LOG_WARNING(
          "the KV pool is lost with its cache manager: {}",
          scheduler_ == nullptr ? "another one is created" : "every sequence is computed again");
      return work_queue_->Send(DetachPool{.pool_epoch = pool_.pool().pool_epoch});
  }
}

void Engine::UseNewPool() {
  const OpenedPool& pool = pool_.pool();
  if (scheduler_ == nullptr) {
    scheduler_ = std::make_unique<Scheduler>(SchedulerConfigOf(pool));
    scheduler_->OnAvailable(num_blocks_available_);
    return BecomeReady();
  }
  LOG_INFO("a new KV pool is in use: {} blocks, {} in host memory", pool.num_blocks,
           pool.num_host_slots);
  metrics_->RecordPoolReplacement();
  RecordFacts();
  scheduler_->OnPoolReplaced(static_cast<int>(pool.num_blocks));
  scheduler_->OnAvailable(num_blocks_available_);
  scheduler_->SetPaused(false);
}

SchedulerConfig Engine::SchedulerConfigOf(const OpenedPool& pool) const {
  SchedulerConfig config = config_.scheduler;
  config.num_blocks = static_cast<int>(pool.num_blocks);
  config.vocab_size = startup_.sampled_vocab_size();
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
    readiness_ = {.ready = true, .reason = ""};
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
  scheduler_->SetPaused(false);
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
    void operator()(CopyDoneCommand& c) const { cache->CopyDone(std::move(c.copy_ids), 0); }
  };
  CHECK(cache_ != nullptr || commands.empty(), "{} commands without a session", commands.size());
  for (CacheCommand& command : commands) std::visit(Send{cache_.get()}, command);
}

}  // namespace wintserve
