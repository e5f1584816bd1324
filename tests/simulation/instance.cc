#include "tests/simulation/instance.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "tests/simulation/trace.h"

namespace wintserve::simulation {
namespace {

// Far beyond what any seed needs; a run that gets there goes round in circles.
constexpr uint64_t kMaxEvents = 2'000'000;
constexpr int64_t kMaxIdleUs = 120'000'000;
constexpr int kMaxPlansAtOnce = 100;

}  // namespace

Instance::Instance(const SimulationConfig& config, Report::Tracing tracing)
    : config_(config),
      report_(&clock_, tracing),
      references_(config_),
      scheduler_(std::in_place, config_.scheduler),
      ledger_(config_, &references_, &report_),
      cache_(config_, &clock_, &report_,
             {.on_reply = [this](const CacheReply& reply,
                                 uint32_t available) { OnCacheReply(reply, available); },
              .on_lost = [this] { OnCacheLost(); },
              .on_resumed = [this] { OnCacheResumed(); },
              .on_pool_gone = [this] { OnPoolGone(); },
              .on_pool_opened = [this](int num_blocks) { OnPoolOpened(num_blocks); },
              .on_adopted = [this](uint32_t num_available) { OnPoolAdopted(num_available); }}),
      ranks_(config_, &references_, &clock_, &report_,
             {.on_done = [this](uint64_t step, RankResult result,
                                int64_t step_us) { OnStepDone(step, std::move(result), step_us); },
              .on_frozen = [this] { OnGroupFrozen(); },
              .on_fenced = [this](bool kv_trusted) { OnGroupFenced(kv_trusted); },
              .on_ready = [this] { OnGroupReady(); }}),
      clients_(config_, &references_, &clock_, &report_,
               {.is_server_there = [this] { return scheduler_.has_value(); },
                .submit =
                    [this](const ScheduledRequest& request) {
                      return scheduler_->Submit(request, clock_.now_us());
                    },
                .cancel_request =
                    [this](uint64_t request) {
                      if (scheduler_.has_value()) scheduler_->Cancel(request);
                    },
                .cancel_choice =
                    [this](const SequenceKey& key) {
                      if (scheduler_.has_value()) scheduler_->Cancel(key);
                    },
                .done = [this] { Pump(); }}),
      first_step_(config_.scheduler.first_step),
      last_step_(first_step_ - 1),
      last_done_step_(last_step_),
      random_(config_.seed, /*stream=*/7) {
  ranks_.AttachPool(pool_epoch_, config_.scheduler.num_blocks);
}

void Instance::Run() {
  clients_.Start();
  ScheduleFaults();
  const int64_t last_us = config_.arrivals_us() + kMaxIdleUs;
  while (report_.ok() && clock_.RunNext()) {
    if (++report_.counters.events > kMaxEvents || clock_.now_us() > last_us) {
      report_.Violation("I8", "the run does not come to an end");
    }
    for (const SimulationConfig::PlannedFailure& failure : config_.planned_failures) {
      if (report_.counters.events == failure.event) ranks_.Fail(failure.rank, failure.failure);
    }
    if (report_.counters.events == config_.cache_dies_at_event) cache_.Die();
    if (report_.counters.events == config_.server_dies_at_event) KillServer();
  }
  if (report_.ok()) CheckQuiescent();
  AddSchedulerTotals();
  cache_.AddTotals(&report_.counters);
}

void Instance::AddSchedulerTotals() {
  if (!scheduler_.has_value()) return;
  const SchedulerStats stats = scheduler_->stats();
  report_.counters.preemptions += stats.preemptions;
  report_.counters.overshoot_rows += stats.overshoot_rows;
  report_.counters.device_hit_tokens += stats.device_hit_tokens;
  report_.counters.host_hit_tokens += stats.host_hit_tokens;
  report_.counters.resumed_sequences += stats.resumed_sequences;
  report_.counters.recomputed_sequences += stats.recomputed_sequences;
}

void Instance::ScheduleFaults() {
  Random random(config_.seed, /*stream=*/5);
  const int64_t last_us = config_.arrivals_us() * 5 / 4 + 20 * config_.step_us;
  for (int i = 0; i < config_.num_drops; ++i) {
    clock_.At(random.Between(0, last_us), [this] { cache_.BreakSession(); });
  }
  for (int i = 0; i < config_.num_deaths; ++i) {
    clock_.At(random.Between(0, last_us), [this] { cache_.Die(); });
  }
  for (int i = 0; i < config_.num_flushes; ++i) {
    std::optional<std::string> salt;
    if (random.Chance(0.5)) salt = config_.num_salts > 1 ? "s1" : "";
    clock_.At(random.Between(0, last_us), [this, salt] { cache_.Flush(salt); });
  }
  const auto fail_workers = [&](int count, WorkerFailure failure) {
    for (int i = 0; i < count; ++i) {
      const auto rank = static_cast<int>(random.Between(0, config_.num_ranks - 1));
      clock_.At(random.Between(0, last_us), [this, rank, failure] { ranks_.Fail(rank, failure); });
    }
  };
  fail_workers(config_.num_worker_kills, WorkerFailure::kKilled);
  fail_workers(config_.num_worker_crashes, WorkerFailure::kCrashed);
  fail_workers(config_.num_worker_hangs, WorkerFailure::kHangs);
  for (int i = 0; i < config_.num_server_deaths; ++i) {
    clock_.At(random.Between(0, last_us), [this] { KillServer(); });
  }
}

// Of a cache manager that is out of reach as well, the next API server would only hear that the
// pool is gone.
void Instance::KillServer() {
  if (!scheduler_.has_value() || !has_session_ || !cache_.LoseServer()) return;
  report_.Trace("the API server dies");
  ++report_.counters.server_deaths;
  AddSchedulerTotals();
  scheduler_.reset();
  has_session_ = false;
  clients_.OnServerLost();
  ledger_.OnServerLost();
  // What it may not have got round to say, its successor assumes.
  kv_trusted_without_server_ = !first_bad_step_.has_value();
  first_bad_step_.reset();
  num_distrusts_unanswered_ = 0;
  // Workers leave their group by themselves, and attach to the next API server then.
  ranks_.Abort();
  is_adopting_ = !ranks_.aborting();
  if (is_adopting_) cache_.Adopt();
}

void Instance::OnPoolAdopted(uint32_t num_available) {
  ++report_.counters.adoptions;
  has_session_ = true;
  if (config_.mistake != Mistake::kNoFenceOfAdopted) cache_.Send(FenceRequest{});
  // By the clock, which is always ahead of the number of steps.
  last_step_ += static_cast<uint64_t>(random_.Between(1, 1000));
  last_done_step_ = last_step_;
  first_step_ = last_step_ + 1;
  const bool kv_trusted = kv_trusted_without_server_ || config_.mistake == Mistake::kTrustAdopted;
  if (!kv_trusted) DistrustLastSteps();
  SchedulerConfig config = config_.scheduler;
  config.first_step = first_step_;
  scheduler_.emplace(config);
  scheduler_->OnAvailable(num_available);
  UpdatePause();
  Pump();
}

void Instance::Pump() {
  if (!scheduler_.has_value()) return;
  for (int i = 0; report_.ok(); ++i) {
    if (i == kMaxPlansAtOnce) report_.Violation("I8", "{} plans at once", i);
    SchedulerOutput output = scheduler_->Schedule(clock_.now_us());
    CheckScheduler();
    for (const CacheCommand& command : output.cache) Send(command);
    const bool made_plan = output.plan.has_value();
    if (made_plan) Send(*std::move(output.plan));
    for (const SequenceStart& start : output.started) {
      report_.Trace("sequence {}.{} starts with {} tokens cached", start.sequence.request,
                    start.sequence.choice, start.num_cached_tokens);
      clients_.OnStarted(start);
    }
    for (const SequenceFailure& failure : output.failed) {
      report_.Trace("sequence {}.{} fails", failure.sequence.request, failure.sequence.choice);
      clients_.OnFailed(failure);
    }
    if (!made_plan) break;
  }
  clients_.CheckDeadlines();
  ArmDeadline();
}

void Instance::Send(const CacheCommand& command) {
  if (report_.tracing()) report_.Trace("-> cache: {}", Describe(command));
  ledger_.OnCommand(command, has_session_);
  if (has_session_) cache_.Send(command);
}

void Instance::Send(StepPlan plan) {
  if (report_.tracing()) report_.Trace("-> ranks: {}", Describe(plan));
  if (IsPaused()) report_.Violation("plan", "step {} is made while paused", plan.step);
  if (plan.step != ++last_step_) {
    report_.Violation("I6", "step {} is made after step {}", plan.step, last_step_ - 1);
  }
  plan.pool_epoch = pool_epoch_;
  ++report_.counters.plans;
  ledger_.OnPlan(plan);
  ranks_.Send(std::move(plan));
  const size_t allowed = 1 + static_cast<size_t>(config_.scheduler.async_depth);
  if (ranks_.num_plans_in_flight() > allowed) {
    report_.Violation("plan", "{} plans are in flight, allowed are {}",
                      ranks_.num_plans_in_flight(), allowed);
  }
}

void Instance::ArmDeadline() {
  const std::optional<int64_t> next_us = scheduler_->NextDeadlineUs();
  if (!next_us.has_value() || (armed_deadline_us_ && *armed_deadline_us_ <= *next_us)) return;
  if (*next_us < clock_.now_us()) {
    report_.Violation("I8", "the deadline {} has passed and its sequence goes on", *next_us);
    return;
  }
  armed_deadline_us_ = next_us;
  // One microsecond later, so that a deadline has passed by any reading of it.
  clock_.At(*next_us + 1, [this, armed_us = *next_us] {
    if (armed_deadline_us_ == armed_us) armed_deadline_us_.reset();
    Pump();
  });
}

void Instance::OnCacheReply(const CacheReply& reply, uint32_t num_available) {
  if (report_.tracing()) report_.Trace("<- cache: {}", Describe(reply));
  if (!has_session_) report_.Violation("simulator", "a reply without a session");
  if (const auto* matched = std::get_if<Matched>(&reply)) {
    const MatchCommand* match = ledger_.FindMatch(matched->tag);
    if (match == nullptr) {
      report_.Violation("simulator", "an answer to match {}, which was not asked", matched->tag);
      return;
    }
    if (!clients_.IsWanted(match->salt, match->tokens)) ++report_.counters.tombstones;
  }
  if (std::holds_alternative<Distrusted>(reply) && --num_distrusts_unanswered_ == 0) {
    first_bad_step_.reset();
  }
  scheduler_->OnAvailable(num_available);
  ledger_.OnReply(reply);
  if (const auto* peeked = std::get_if<Peeked>(&reply)) {
    scheduler_->OnPeeked(peeked->tag, peeked->result);
  } else if (const auto* matched = std::get_if<Matched>(&reply)) {
    scheduler_->OnMatched(matched->tag, matched->result);
  } else if (const auto* leased = std::get_if<Leased>(&reply)) {
    scheduler_->OnLeased(leased->tag, leased->blocks);
  } else if (const auto* committed = std::get_if<Committed>(&reply)) {
    scheduler_->OnCommitted(committed->tag, committed->blocks);
  } else if (const auto* copy_out = std::get_if<CopyOut>(&reply)) {
    scheduler_->OnCopyOut(copy_out->copies);
  }
  Pump();
}

void Instance::OnCacheLost() {
  report_.Trace("the session is lost");
  if (!ranks_.ready()) ++report_.counters.cache_losses_in_recovery;
  has_session_ = false;
  num_distrusts_unanswered_ = 0;
  if (config_.mistake == Mistake::kForgetDistrust) first_bad_step_.reset();
  waiting_ = Waiting::kForNothing;
  UpdatePause();
  ledger_.OnSessionLost();
  scheduler_->OnCacheLost();
  Pump();
}

void Instance::OnCacheResumed() {
  waiting_ = Waiting::kToResume;
  UpdatePause();
  CarryOnIfDrained();
}

void Instance::OnPoolGone() {
  waiting_ = Waiting::kToOpenPool;
  UpdatePause();
  CarryOnIfDrained();
}

void Instance::CarryOnIfDrained() {
  if (ranks_.num_plans_in_flight() > 0 || ranks_.aborting()) return;
  if (waiting_ == Waiting::kToOpenPool) {
    waiting_ = Waiting::kForPool;
    cache_.OpenPool();
  } else if (waiting_ == Waiting::kToResume) {
    waiting_ = Waiting::kForNothing;
    HeldBlocks held = scheduler_->OnCacheResumed();
    if (report_.tracing()) report_.Trace("-> cache: {}, fence", Describe(held));
    ledger_.OnSessionResumed(held);
    has_session_ = true;
    cache_.Send(std::move(held));
    if (first_bad_step_.has_value()) Distrust();
    cache_.Send(FenceRequest{});
    UpdatePause();
    Pump();
  }
}

void Instance::OnPoolOpened(int num_blocks) {
  ++report_.counters.pools_replaced;
  waiting_ = Waiting::kForNothing;
  ranks_.AttachPool(++pool_epoch_, num_blocks);
  ledger_.OnPoolReplaced(num_blocks);
  scheduler_->OnPoolReplaced(num_blocks);
  has_session_ = true;
  first_bad_step_.reset();
  UpdatePause();
  Pump();
}

void Instance::OnGroupFrozen() {
  UpdatePause();
  Pump();
}

// The order matters: the cache manager hears of the bad steps before it is asked for anything else,
// and the scheduler gives nothing back before the ranks are fenced.
void Instance::OnGroupFenced(bool kv_trusted) {
  if (config_.mistake == Mistake::kTrustCrashes) kv_trusted = true;
  if (!kv_trusted) {
    ++report_.counters.groups_distrusted;
    if (!scheduler_.has_value()) {
      kv_trusted_without_server_ = false;
    } else {
      DistrustLastSteps();
    }
  }
  ledger_.OnGroupLost(kv_trusted);
  if (!scheduler_.has_value()) {
    // What every rank has left can be taken over; it may be heard of again.
    if (!is_adopting_) cache_.Adopt();
    is_adopting_ = true;
    return;
  }
  if (!kv_trusted) {
    const std::vector<uint64_t> suspects = scheduler_->RequestsInFlight();
    if (!suspects.empty() && random_.Chance(config_.isolation_chance)) {
      scheduler_->SetIsolated(random_.Pick(suspects));
      if (scheduler_->isolated().has_value()) ++report_.counters.isolations;
    }
  }
  scheduler_->OnGroupLost(kv_trusted);
  CarryOnIfDrained();
  Pump();
}

void Instance::DistrustLastSteps() {
  const uint64_t window = config_.num_bad_steps;
  // Where the last steps may be those of another API server, all are taken for bad.
  const uint64_t least = config_.mistake == Mistake::kDistrustByNumber ? 1 : first_step_;
  const uint64_t first = last_done_step_ + 1 >= least + window ? last_done_step_ - window + 1 : 1;
  first_bad_step_ = std::min(first, first_bad_step_.value_or(first));
  if (has_session_) Distrust();
}

void Instance::Distrust() {
  if (config_.mistake == Mistake::kNoDistrust) return;
  report_.Trace("-> cache: steps from {} on are not trusted", *first_bad_step_);
  ++num_distrusts_unanswered_;
  cache_.Send(DistrustRequest{*first_bad_step_});
}

void Instance::OnGroupReady() {
  UpdatePause();
  Pump();
}

void Instance::OnStepDone(uint64_t step, RankResult result, int64_t step_us) {
  if (!scheduler_.has_value()) return;
  report_.Trace("<- ranks: step {} is done", step);
  ledger_.OnPlanDone(step);
  last_done_step_ = step;
  absl::StatusOr<std::vector<SequenceToken>> tokens = scheduler_->OnStepDone(
      step, result.sampled, step_us, clock_.now_us(), std::move(result.prompt_logprobs));
  if (!tokens.ok()) {
    report_.Violation("I6", "step {}: {}", step, tokens.status().ToString());
    return;
  }
  for (const SequenceToken& token : *tokens) clients_.OnToken(token);
  Pump();
  CarryOnIfDrained();
}

void Instance::CheckScheduler() {
  const absl::Status status = scheduler_->CheckInvariants();
  if (!status.ok()) report_.Violation("scheduler", "{}", status.ToString());
  if (static_cast<size_t>(scheduler_->num_plans_in_flight()) < ranks_.num_plans_in_flight()) {
    report_.Violation("scheduler", "{} plans are in flight, the scheduler knows {}",
                      ranks_.num_plans_in_flight(), scheduler_->num_plans_in_flight());
  }
}

void Instance::CheckQuiescent() {
  clients_.CheckAllEnded();
  if (!ranks_.ready()) report_.Violation("I8", "nothing is left to do, and no rank group is there");
  const SchedulerStats stats = scheduler_->stats();
  if (stats.num_running != 0 || stats.num_waiting != 0 || stats.num_waiting_tokens != 0 ||
      stats.num_matching != 0 || stats.num_restoring != 0 || stats.num_plans_in_flight != 0 ||
      stats.num_blocks_held != stats.num_blocks_leased_ahead) {
    report_.Violation("I8",
                      "nothing is left to do, but the scheduler has {} running, {} waiting "
                      "of {} tokens, {} matching, {} restoring, {} plans, {} blocks of which {} "
                      "are in stock",
                      stats.num_running, stats.num_waiting, stats.num_waiting_tokens,
                      stats.num_matching, stats.num_restoring, stats.num_plans_in_flight,
                      stats.num_blocks_held, stats.num_blocks_leased_ahead);
  }
  ledger_.CheckQuiescent(stats.num_blocks_leased_ahead);
  if (cache_.pool() == nullptr || !has_session_) {
    report_.Violation("simulator", "the cache manager never came back");
    return;
  }
  const PrefixCacheStats pool = cache_.pool()->stats();
  if (pool.num_committed_pinned != 0 || pool.num_restoring != 0 || pool.num_copying_out != 0 ||
      pool.num_quarantined != 0 || pool.num_host_filling != 0 || pool.num_host_quarantined != 0 ||
      pool.num_leased != static_cast<uint32_t>(stats.num_blocks_leased_ahead)) {
    report_.Violation("I2",
                      "nothing is left to do, but the cache manager has {} pinned, {} "
                      "restoring, {} copying out, {} quarantined, {} leased blocks (the scheduler "
                      "has {}), {} filling and {} quarantined host slots",
                      pool.num_committed_pinned, pool.num_restoring, pool.num_copying_out,
                      pool.num_quarantined, pool.num_leased, stats.num_blocks_leased_ahead,
                      pool.num_host_filling, pool.num_host_quarantined);
  }
}

}  // namespace wintserve::simulation
