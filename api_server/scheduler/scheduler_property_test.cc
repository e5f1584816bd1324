// Random arrivals, cancellations, delays and losses, on tiny pools. A failing seed is run alone
// with SCHEDULER_SEED=<seed>; SCHEDULER_SEEDS=<count> runs more of them.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <random>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

constexpr int kBlockSize = 4;

class Simulation {
 public:
  explicit Simulation(uint32_t seed) : rng_(seed) {
    SchedulerConfig config;
    config.max_num_seqs = 1 + Below(6);
    config.max_num_batched_tokens = config.max_num_seqs + Below(30);
    config.block_size_tokens = kBlockSize;
    config.num_blocks = 3 + Below(20);
    config.async_depth = Below(3);
    config.chunked_prefill = Below(4) != 0;
    config.prefix_caching = Below(4) != 0;
    config.max_partial_prefills = 1 + Below(3);
    config.max_long_partial_prefills = 1 + Below(2);
    config.long_prefill_token_threshold = Below(3) == 0 ? 1 + Below(10) : 0;
    config.max_seqs_per_tenant = Below(3) == 0 ? 1 + Below(3) : 0;
    config.max_queue_requests = Below(4) == 0 ? 1 + Below(10) : 0;
    config.max_queue_tokens = Below(4) == 0 ? 1 + Below(100) : 0;
    config.first_step = Below(2) == 0 ? 1 : 1 + Below(1000);
    world_ = std::make_unique<FakeWorld>(config, Below(2) == 0 ? Below(12) : 0);
    loses_cache_ = Below(3) == 0;
    loses_group_ = Below(2) == 0;
  }

  void Run(int num_events) {
    for (int i = 0; i < num_events && !testing::Test::HasFailure(); ++i) Event();
    if (lost_) ComeBack();
    world_->scheduler().SetPaused(false);
    world_->RunToEnd();
    world_->ExpectAllBlocksBack();
    world_->ExpectAllTokens();
  }

 private:
  int Below(int bound) { return static_cast<int>(rng_() % bound); }

  void Event() {
    switch (Below(15)) {
      case 0:
      case 1:
        if (last_id_ < 60) Arrive();
        break;
      case 2:
        if (last_id_ > 0 && Below(3) == 0) world_->Cancel(1 + Below(last_id_));
        break;
      case 3:
        if (loses_cache_ && Below(10) == 0) LoseOrComeBack();
        break;
      case 4:
        if (Below(20) == 0) world_->cache().Flush();
        break;
      case 14:
        if (loses_group_ && Below(6) == 0) LoseGroup();
        if (Below(20) == 0) Isolate();
        break;
      case 5:
        world_->now_us += Below(3000);
        break;
      case 6:
      case 7:
      case 8:
        if (!world_->plans().empty()) world_->FinishPlan(1 + Below(2000));
        break;
      default:
        world_->AnswerOne();
    }
    if (Below(4) != 0) world_->Schedule();
  }

  void Arrive() {
    ScheduledRequest request{.id = static_cast<uint64_t>(++last_id_)};
    // Few different prompts, and ones that share a beginning.
    const int prompt_len = 1 + Below(40);
    const int kind = Below(3);
    for (int i = 0; i < prompt_len; ++i) request.prompt_ids.push_back(10 + kind * (i / 10));
    request.sampling.seed = last_id_;
    request.sampling.repetition_penalty = last_id_ % 3 == 0 ? 1.5f : 1.0f;
    request.sampling.presence_penalty = last_id_ % 5 == 0 ? 0.5f : 0.0f;
    request.num_choices = 1 + (Below(3) == 0 ? Below(3) : 0);
    request.max_tokens = 1 + Below(25);
    request.min_tokens = Below(3) == 0 ? Below(5) : 0;
    request.ignore_eos = Below(4) == 0;
    request.priority = Below(3);
    request.tenant = Below(2) == 0 ? std::string(1, static_cast<char>('a' + Below(2))) : "";
    request.cache_salt = Below(4) == 0 ? "salt" : "";
    request.bypass_cache_match = Below(8) == 0;
    if (Below(3) == 0) request.sampling.num_prompt_top_logprobs = Below(3);
    if (Below(8) == 0) request.deadline_us = world_->now_us + Below(60'000);
    const int blocks = (prompt_len + request.max_tokens - 2) / kBlockSize + 1;
    const absl::Status status = world_->Submit(std::move(request));
    ASSERT_EQ(status.code() == absl::StatusCode::kInvalidArgument,
              blocks > world_->config().num_blocks)
        << status;
    ASSERT_GE(RetryAfterSeconds(status), 1);
  }

  void LoseOrComeBack() {
    if (lost_) return ComeBack();
    world_->LoseCache(Below(4));
    lost_ = true;
  }

  // At once, or after a freeze in which no plan is made and none ends.
  void LoseGroup() {
    if (Below(2) == 0) {
      world_->scheduler().SetPaused(true);
      for (int i = Below(6); i > 0; --i) {
        if (Below(3) != 0) world_->AnswerOne();
        if (Below(3) == 0 && last_id_ < 60) Arrive();
        if (Below(6) == 0 && last_id_ > 0) world_->Cancel(1 + Below(last_id_));
        world_->Schedule();
      }
    }
    if (Below(3) != 0) {
      world_->LoseGroup();
    } else {
      const auto back = static_cast<uint64_t>(Below(40));
      world_->LoseGroup(world_->last_step() > back ? world_->last_step() - back : 1);
    }
    EXPECT_TRUE(world_->scheduler().RequestsInFlight().empty());
    world_->scheduler().SetPaused(false);
  }

  void Isolate() {
    if (Below(4) == 0) return world_->scheduler().SetIsolated(std::nullopt);
    // It may have ended, or not been there at all.
    if (last_id_ > 0) world_->scheduler().SetIsolated(1 + Below(last_id_ + 1));
  }

  void ComeBack() {
    world_->scheduler().SetPaused(true);
    if (loses_group_ && Below(3) == 0) LoseGroup();
    world_->scheduler().SetPaused(true);
    while (!world_->plans().empty()) world_->FinishPlan();
    if (Below(2) == 0) {
      world_->ResumeCache();
    } else {
      world_->ReplacePool(std::max(1, world_->config().num_blocks - 1 + Below(3)));
    }
    lost_ = false;
    world_->scheduler().SetPaused(false);
  }

  std::mt19937 rng_;
  std::unique_ptr<FakeWorld> world_;
  int last_id_ = 0;
  bool loses_cache_ = false;
  bool loses_group_ = false;
  bool lost_ = false;
};

std::atomic<uint32_t> running_seed;

// So that a CHECK names its seed as well.
void PrintSeed(int) { fmt::print(stderr, "SCHEDULER_SEED={}\n", running_seed.load()); }

void RunSeed(uint32_t seed) {
  running_seed = seed;
  SCOPED_TRACE(fmt::format("SCHEDULER_SEED={}", seed));
  Simulation(seed).Run(/*num_events=*/1200);
}

TEST(SchedulerProperty, EveryRequestGetsExactlyItsTokensAndEveryBlockComesBack) {
  std::signal(SIGABRT, PrintSeed);
  if (const char* seed = std::getenv("SCHEDULER_SEED")) {
    return RunSeed(static_cast<uint32_t>(std::strtoul(seed, nullptr, 10)));
  }
  const char* count = std::getenv("SCHEDULER_SEEDS");
  const uint32_t num_seeds = count != nullptr ? std::strtoul(count, nullptr, 10) : 300;
  const uint32_t first_seed = std::random_device{}();
  for (uint32_t i = 0; i < num_seeds && !testing::Test::HasFailure(); ++i) RunSeed(first_seed + i);
}

}  // namespace
}  // namespace wintserve
