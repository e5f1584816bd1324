// Random arrivals, cancellations and lease delays against a naive model of workers and pool.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "api_server/scheduler/scheduler.h"

namespace wintserve {
namespace {

constexpr int32_t kVocabSize = 1000;
constexpr int32_t kEos = 2;
constexpr int kBlockSize = 4;

// The token that a request's choice has at a position: every seventh or so is a stop token.
int32_t NaiveToken(const SequenceKey& key, int position) {
  const uint64_t mixed =
      (key.request * 1'000'003 + key.choice * 7919 + position) * 0x9e3779b97f4a7c15u;
  return mixed >> 61 == 0 ? kEos : static_cast<int32_t>(3 + (mixed >> 33) % (kVocabSize - 3));
}

struct ModelRequest {
  int prompt_len = 0;
  int max_tokens = 0;
  bool cancelled = false;
  std::vector<std::vector<int32_t>> tokens = {};  // by choice
  std::vector<std::optional<SequenceEnd>> ends = {};
};

struct ModelSlot {
  bool in_use = false;
  SequenceKey owner;
  int computed = 0;
  std::vector<BlockId> table;
};

class Simulation {
 public:
  explicit Simulation(uint32_t seed) : rng_(seed) {
    config_.max_num_seqs = 1 + Below(6);
    config_.max_num_batched_tokens = config_.max_num_seqs + Below(30);
    config_.block_size_tokens = kBlockSize;
    config_.num_blocks = 10 + Below(20);
    config_.vocab_size = kVocabSize;
    config_.eos_ids = {kEos};
    scheduler_ = std::make_unique<Scheduler>(config_);
    slots_.resize(config_.max_num_seqs);
    for (int i = 0; i < config_.num_blocks; ++i) free_.push_back({BlockId{i}, 0});
    block_owner_.resize(config_.num_blocks);
    generations_.resize(config_.num_blocks);
  }

  void Run(int num_events) {
    for (int i = 0; i < num_events && !testing::Test::HasFatalFailure(); ++i) {
      switch (Below(6)) {
        case 0:
          if (requests_.size() < 60) Arrive();
          break;
        case 1:
          if (Below(4) == 0) CancelSomething();
          break;
        case 2:
          AnswerLease(/*may_refuse=*/true);
          break;
        default:
          FinishStep();
          break;
      }
      Advance();
    }
    // Nothing more arrives: all has to end within a bounded number of steps.
    for (int i = 0; i < 20'000 && Busy() && !testing::Test::HasFatalFailure(); ++i) {
      AnswerLease(/*may_refuse=*/false);
      FinishStep();
      Advance();
    }
    ASSERT_FALSE(Busy()) << "requests are stuck";
    CheckTheEnd();
  }

 private:
  int Below(int bound) { return static_cast<int>(rng_() % bound); }
  bool Busy() const { return in_flight_.has_value() || lease_.has_value() || progress_; }

  void Arrive() {
    const uint64_t id = requests_.size() + 1;
    ModelRequest request{.prompt_len = 1 + Below(40), .max_tokens = 1 + Below(20)};
    const int num_choices = 1 + Below(3);
    request.tokens.resize(num_choices);
    request.ends.resize(num_choices);
    const absl::Status status =
        scheduler_->Submit({.id = id,
                            .prompt_ids = std::vector<int32_t>(request.prompt_len, 5),
                            .sampling = {.seed = static_cast<int64_t>(id)},
                            .num_choices = num_choices,
                            .max_tokens = request.max_tokens});
    const int blocks = (request.prompt_len + request.max_tokens - 2) / kBlockSize + 1;
    ASSERT_EQ(status.ok(), blocks <= config_.num_blocks) << status;
    request.cancelled = !status.ok();
    requests_.push_back(request);
  }

  void CancelSomething() {
    if (requests_.empty()) return;
    const uint64_t id = 1 + Below(static_cast<int>(requests_.size()));
    requests_[id - 1].cancelled = true;
    scheduler_->Cancel(id);
  }

  void AnswerLease(bool may_refuse) {
    if (!lease_.has_value() || (may_refuse && Below(3) == 0)) return;
    const BlockLeaseRequest lease = *std::exchange(lease_, std::nullopt);
    // A refusal for no reason, but only where some block is still to come back.
    const bool refuse = may_refuse && Below(5) == 0 && scheduler_->stats().num_blocks_held > 0;
    std::vector<LeasedBlock> granted;
    if (!refuse && lease.count <= free_.size()) {
      std::shuffle(free_.begin(), free_.end(), rng_);
      granted.assign(free_.end() - lease.count, free_.end());
      free_.resize(free_.size() - lease.count);
    }
    scheduler_->OnBlocksLeased(lease.tag, granted);
  }

  void FinishStep() {
    if (!in_flight_.has_value()) return;
    const StepPlan plan = *std::exchange(in_flight_, std::nullopt);
    std::vector<SampledToken> sampled;
    for (const PlanRow& row : plan.rows) {
      ModelSlot& slot = slots_[row.slot];
      slot.computed += static_cast<int>(row.length);
      sampled.push_back({row.slot, NaiveToken(slot.owner, slot.computed)});
    }
    for (const uint32_t released : plan.slot_release) {
      ASSERT_TRUE(slots_[released].in_use);
      for (const BlockId block : slots_[released].table) {
        if (auto& owner = block_owner_[static_cast<int>(block)]; owner == slots_[released].owner) {
          owner.reset();
        }
      }
      slots_[released].in_use = false;
    }
    const auto tokens = scheduler_->OnStepDone(plan.step, sampled);
    ASSERT_TRUE(tokens.ok()) << tokens.status();
    for (const SequenceToken& news : *tokens) {
      ModelRequest& request = requests_[news.sequence.request - 1];
      ASSERT_FALSE(request.cancelled);
      ASSERT_FALSE(request.ends[news.sequence.choice].has_value());
      request.tokens[news.sequence.choice].push_back(news.token);
      request.ends[news.sequence.choice] = news.end;
    }
  }

  void Advance() {
    SchedulerOutput output = scheduler_->Schedule();
    ASSERT_TRUE(output.failed.empty());
    for (const LeasedBlock& block : output.return_blocks) {
      const int id = static_cast<int>(block.id);
      ASSERT_EQ(block.generation, generations_[id]) << "block " << id << " was returned twice";
      if (in_flight_.has_value()) {
        for (const PlanRow& row : in_flight_->rows) {
          for (const BlockId used : slots_[row.slot].table) ASSERT_NE(static_cast<int>(used), id);
        }
      }
      block_owner_[id].reset();
      free_.push_back({block.id, ++generations_[id]});
    }
    if (output.lease.has_value()) {
      ASSERT_FALSE(lease_.has_value());
      lease_ = output.lease;
    }
    progress_ = output.plan.has_value() || output.lease.has_value();
    if (output.plan.has_value()) Accept(*std::move(output.plan), output.started);
    const int leased_out = config_.num_blocks - static_cast<int>(free_.size());
    ASSERT_EQ(leased_out, scheduler_->stats().num_blocks_held);
  }

  // Checks the plan as a worker would, then holds it in flight.
  void Accept(StepPlan plan, const std::vector<SequenceKey>& started) {
    ASSERT_FALSE(in_flight_.has_value());
    ASSERT_EQ(plan.step, ++last_step_);
    ASSERT_EQ(plan.slot_init.size(), started.size());
    ASSERT_FALSE(plan.rows.empty() && plan.slot_release.empty());
    for (size_t i = 0; i < plan.slot_init.size(); ++i) {
      const SlotInit& init = plan.slot_init[i];
      ASSERT_LT(init.slot, slots_.size());
      ModelSlot& slot = slots_[init.slot];
      ASSERT_FALSE(slot.in_use) << "slot " << init.slot << " is used twice";
      slot = {.in_use = true, .owner = started[i], .computed = 0, .table = init.block_table};
      for (const BlockId block : init.block_table) {
        auto& owner = block_owner_[static_cast<int>(block)];
        ASSERT_FALSE(owner.has_value()) << "block " << static_cast<int>(block) << " is used twice";
        owner = started[i];
      }
    }
    int num_tokens = 0;
    std::set<uint32_t> slots_seen;
    for (const PlanRow& row : plan.rows) {
      ModelSlot& slot = slots_[row.slot];
      ASSERT_TRUE(slot.in_use);
      ASSERT_TRUE(slots_seen.insert(row.slot).second);
      ASSERT_EQ(static_cast<int>(row.position), slot.computed);
      ASSERT_LE((row.position + row.length - 1) / kBlockSize, slot.table.size() - 1);
      num_tokens += static_cast<int>(row.length);
    }
    ASSERT_TRUE(num_tokens <= config_.max_num_batched_tokens || plan.rows.size() == 1);
    in_flight_ = std::move(plan);
  }

  void CheckTheEnd() {
    EXPECT_EQ(static_cast<int>(free_.size()), config_.num_blocks);
    EXPECT_EQ(scheduler_->stats().num_running, 0);
    EXPECT_EQ(scheduler_->stats().num_waiting, 0);
    for (const ModelSlot& slot : slots_) EXPECT_FALSE(slot.in_use);
    for (size_t i = 0; i < requests_.size(); ++i) {
      const ModelRequest& request = requests_[i];
      for (uint32_t choice = 0; choice < request.tokens.size(); ++choice) {
        const SequenceKey key{i + 1, choice};
        std::vector<int32_t> expected;
        while (static_cast<int>(expected.size()) < request.max_tokens &&
               (expected.empty() || expected.back() != kEos)) {
          const int position = request.prompt_len + static_cast<int>(expected.size());
          expected.push_back(NaiveToken(key, position));
        }
        // A cancelled request has got a beginning of its tokens.
        if (request.cancelled) {
          ASSERT_LE(request.tokens[choice].size(), expected.size());
          expected.resize(request.tokens[choice].size());
        } else {
          EXPECT_EQ(request.ends[choice],
                    expected.back() == kEos ? SequenceEnd::kStop : SequenceEnd::kLength);
        }
        EXPECT_EQ(request.tokens[choice], expected) << "request " << i + 1;
      }
    }
  }

  std::mt19937 rng_;
  SchedulerConfig config_;
  std::unique_ptr<Scheduler> scheduler_;
  std::vector<ModelRequest> requests_;
  std::vector<ModelSlot> slots_;
  std::vector<LeasedBlock> free_;
  std::vector<std::optional<SequenceKey>> block_owner_;  // by what plans say
  std::vector<uint32_t> generations_;
  std::optional<BlockLeaseRequest> lease_;
  std::optional<StepPlan> in_flight_;
  uint64_t last_step_ = 0;
  bool progress_ = false;
};

TEST(SchedulerProperty, EveryRequestGetsExactlyItsTokensAndEveryBlockComesBack) {
  const uint32_t first_seed = std::random_device{}();
  for (uint32_t i = 0; i < 200; ++i) {
    SCOPED_TRACE(fmt::format("seed={}", first_seed + i));
    Simulation(first_seed + i).Run(/*num_events=*/600);
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace wintserve
