// One rank of StepRunner on a FakeModel, and the parts of plans for it.
#pragma once

#include <initializer_list>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/step_runner.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {

inline const StepRunnerConfig kConfig = {.group_epoch = 0xa,
                                         .pool_epoch = 0xb,
                                         .num_blocks = 40,
                                         .num_host_slots = 3,
                                         .max_slots = 4,
                                         .max_tokens = 600,
                                         .max_sequence_tokens = 600,
                                         .sampled_vocab_size = 900};

// One rank with a pool of its own; numbers and chains the plans that it is given.
class Rank {
 public:
  explicit Rank(std::unique_ptr<Collective> collective = MakeSingleRankCollective(),
                int max_batch_tokens = 512, StepRunnerConfig config = kConfig,
                int max_logit_rows = 0)
      : collective_(std::move(collective)),
        model_(collective_.get(), max_batch_tokens, max_logit_rows),
        pool_(kConfig.num_blocks * testing_fakes::FakeModel::kBlockTokens),
        host_tier_(kConfig.num_host_slots * testing_fakes::FakeModel::kBlockTokens) {
    auto runner =
        StepRunner::Create(config, &model_, collective_.get(), pool_.data(), host_tier_.data());
    CHECK(runner.ok(), "{}", runner.status().ToString());
    runner_ = *std::move(runner);
  }

  absl::StatusOr<StepDone> Apply(StepPlan plan) {
    plan.group_epoch = kConfig.group_epoch;
    plan.pool_epoch = kConfig.pool_epoch;
    plan.step = ++step_;
    plan.previous_plan_hash = hash_;
    hash_ = 1000 + step_;
    return runner_->Apply(plan, hash_);
  }

  StepDone MustApply(const StepPlan& plan) {
    auto done = Apply(plan);
    CHECK(done.ok(), "{}", done.status().ToString());
    return *std::move(done);
  }

  StepRunner& runner() { return *runner_; }
  testing_fakes::FakeModel& model() { return model_; }
  // What block `id` holds.
  std::span<int32_t> block(int id) {
    return std::span(pool_).subspan(id * testing_fakes::FakeModel::kBlockTokens,
                                    testing_fakes::FakeModel::kBlockTokens);
  }

 private:
  const std::unique_ptr<Collective> collective_;
  testing_fakes::FakeModel model_;
  std::vector<int32_t> pool_;
  std::vector<int32_t> host_tier_;
  std::unique_ptr<StepRunner> runner_;
  uint64_t step_ = 0;
  uint64_t hash_ = 0;
};

inline std::vector<BlockId> Blocks(std::initializer_list<int> ids) {
  std::vector<BlockId> blocks;
  for (const int id : ids) blocks.push_back(BlockId{id});
  return blocks;
}

inline std::vector<int32_t> Prompt(uint32_t seed, int length) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(length);
  for (int32_t& token : tokens)
    token = static_cast<int32_t>(random() % testing_fakes::FakeModel::kVocabSize);
  return tokens;
}

inline PlanRow PrefillRow(uint32_t slot, uint32_t position, std::vector<int32_t> tokens,
                          bool sample) {
  const auto length = static_cast<uint32_t>(tokens.size());
  return {slot, position, length, sample, std::move(tokens)};
}

// One whose followers' log-probabilities are asked for.
inline PlanRow PromptRow(uint32_t slot, uint32_t position, std::vector<int32_t> tokens, bool sample,
                         int32_t next_token) {
  PlanRow row = PrefillRow(slot, position, std::move(tokens), sample);
  row.prompt_logprobs = true;
  row.next_token = next_token;
  return row;
}

inline PlanRow DecodeRow(uint32_t slot, uint32_t position) { return {slot, position, 1, true, {}}; }

}  // namespace wintserve
