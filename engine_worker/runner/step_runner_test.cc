#include "engine_worker/runner/step_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "common/check.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/step_runner_test_util.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {
namespace {

using testing::HasSubstr;
using testing_fakes::FakeModel;

struct Request {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  std::vector<BlockId> blocks;  // enough for all its tokens
  int num_output_tokens = 0;
};

// In `slot` with its first blocks, after `generated`.
SlotInit InitOf(uint32_t slot, const Request& request, std::vector<BlockId> blocks,
                std::vector<int32_t> generated = {}) {
  return {slot, request.sampling, std::move(blocks), request.prompt, std::move(generated)};
}

std::vector<int32_t> RunAlone(const Request& request, Rank& rank) {
  std::vector<int32_t> output;
  StepPlan plan = {.slot_init = {InitOf(2, request, request.blocks)},
                   .rows = {PrefillRow(2, 0, request.prompt, true)}};
  for (int i = 0; i < request.num_output_tokens; ++i) {
    output.push_back(rank.MustApply(plan).sampled.at(0).token);
    const auto position = static_cast<uint32_t>(request.prompt.size() + i);
    plan = {.rows = {DecodeRow(2, position)}};
  }
  rank.MustApply({.slot_release = {2}});
  return output;
}

std::vector<Request> ThreeRequests() {
  // Interleaved blocks, out of order; lengths that end inside and at the edge of blocks.
  return {
      {Prompt(1, 70),
       {.temperature = 0.8f,
        .seed = 5,
        .min_p = 0.01f,
        .repetition_penalty = 1.2f,
        .frequency_penalty = 0.5f,
        .logit_biases = {{3, -100}, {20, 2.5f}, {21, 2.5f}}},
       Blocks({7, 2, 30}),
       80},
      {Prompt(2, 128), {.top_p = 0.9f, .seed = 6, .choice_index = 1}, Blocks({3, 9, 8, 31}), 90},
      {Prompt(3, 1), {.temperature = 0, .presence_penalty = 1.5f}, Blocks({1, 0}), 100}};
}

// All three together: chunked prefills of any length, decodes, late blocks, in random order.
std::map<uint32_t, std::vector<int32_t>> RunTogether(const std::vector<Request>& requests,
                                                     Rank& rank, uint32_t seed) {
  std::mt19937 random(seed);
  std::map<uint32_t, std::vector<int32_t>> outputs;
  std::map<uint32_t, uint32_t> computed;
  std::map<uint32_t, size_t> num_blocks;
  size_t num_finished = 0;
  while (num_finished < requests.size()) {
    StepPlan plan;
    for (uint32_t slot = 0; slot < requests.size(); ++slot) {
      const Request& request = requests[slot];
      std::vector<int32_t>& output = outputs[slot];
      if (std::ssize(output) == request.num_output_tokens || random() % 4 == 0) continue;
      const auto prompt_size = static_cast<uint32_t>(request.prompt.size());
      const uint32_t position = computed[slot];
      PlanRow row = DecodeRow(slot, position);
      if (position < prompt_size) {
        const uint32_t length = 1 + random() % (prompt_size - position);
        const auto first = request.prompt.begin() + position;
        row = PrefillRow(slot, position, {first, first + length}, position + length == prompt_size);
      }
      const size_t needed = (position + row.length + 63) / 64;
      const std::vector<BlockId> added(request.blocks.begin() + num_blocks[slot],
                                       request.blocks.begin() + std::max(needed, num_blocks[slot]));
      if (position == 0) {
        plan.slot_init.push_back(InitOf(slot, request, added));
      } else if (!added.empty()) {
        plan.block_append.push_back({slot, added});
      }
      num_blocks[slot] += added.size();
      computed[slot] += row.length;
      plan.rows.push_back(std::move(row));
    }
    for (const SampledToken& sampled : rank.MustApply(plan).sampled) {
      outputs[sampled.slot].push_back(sampled.token);
      num_finished += std::ssize(outputs[sampled.slot]) == requests[sampled.slot].num_output_tokens;
    }
  }
  return outputs;
}

TEST(StepRunner, RequestsBatchedTogetherGetTheTokensThatEachGetsAlone) {
  const std::vector<Request> requests = ThreeRequests();
  for (uint32_t seed = 0; seed < 10; ++seed) {
    Rank together;
    auto outputs = RunTogether(requests, together, seed);
    for (uint32_t slot = 0; slot < requests.size(); ++slot) {
      Rank alone;
      EXPECT_EQ(outputs[slot], RunAlone(requests[slot], alone)) << "slot " << slot;
    }
  }
}

Rank RankWithGraphs() {
  StepRunnerConfig config = kConfig;
  config.use_graphs = true;
  return Rank(MakeSingleRankCollective(), 512, config);
}

TEST(StepRunner, DecodesThatRunAsGraphsGetTheTokensOfThoseThatDoNot) {
  const std::vector<Request> requests = ThreeRequests();
  for (uint32_t seed = 0; seed < 10; ++seed) {
    Rank without;
    Rank with = RankWithGraphs();
    ASSERT_TRUE(with.runner().WarmUp().ok());
    EXPECT_EQ(with.runner().graphs().size(), 3);  // of 1, 2 and 4 rows
    const int64_t num_padding_rows = with.model().num_padding_rows();
    EXPECT_EQ(RunTogether(requests, with, seed), RunTogether(requests, without, seed));
    EXPECT_GT(with.model().num_padding_rows(), num_padding_rows);
    EXPECT_EQ(without.model().num_padding_rows(), 0);
  }
}

// Three rows are one of padding in a graph of four.
TEST(StepRunner, OnlyStepsOfNothingButDecodesRunAsGraphs) {
  Rank rank = RankWithGraphs();
  ASSERT_TRUE(rank.runner().WarmUp().ok());
  StepPlan plan;
  for (uint32_t slot = 0; slot < 4; ++slot) {
    const std::vector<int32_t> prompt = Prompt(slot, 10);
    plan.slot_init.push_back({slot, {}, Blocks({static_cast<int>(slot)}), prompt});
    if (slot < 3) plan.rows.push_back(PrefillRow(slot, 0, prompt, true));
  }
  const auto padding_of = [&](const StepPlan& of) {
    const int64_t before = rank.model().num_padding_rows();
    rank.MustApply(of);
    return rank.model().num_padding_rows() - before;
  };
  EXPECT_EQ(padding_of(plan), 0);
  EXPECT_EQ(padding_of({.rows = {DecodeRow(0, 10), DecodeRow(1, 10), DecodeRow(2, 10)}}), 1);
  // A chunk of a prompt, of several tokens or of one.
  EXPECT_EQ(padding_of(
                {.rows = {DecodeRow(0, 11), DecodeRow(1, 11), PrefillRow(3, 0, {1, 2, 3}, false)}}),
            0);
  EXPECT_EQ(
      padding_of({.rows = {DecodeRow(0, 12), DecodeRow(1, 12), PrefillRow(3, 3, {4}, false)}}), 0);
  // The last token of a prompt is a row like any other.
  EXPECT_EQ(padding_of({.rows = {DecodeRow(0, 13), DecodeRow(1, 13), PrefillRow(3, 4, {5}, true)}}),
            1);
  rank.runner().ClearGraphs();
  EXPECT_EQ(padding_of({.rows = {DecodeRow(0, 14), DecodeRow(1, 14), DecodeRow(3, 5)}}), 0);
}

TEST(StepRunner, GraphsCanBeMadeAnewWhenEverySlotIsFree) {
  const std::vector<Request> requests = ThreeRequests();
  Rank rank = RankWithGraphs();
  ASSERT_TRUE(rank.runner().WarmUp().ok());
  const std::vector<int32_t> expected = RunAlone(requests[0], rank);
  rank.runner().ClearGraphs();
  EXPECT_EQ(rank.runner().graphs().size(), 0);
  EXPECT_EQ(RunAlone(requests[0], rank), expected);
  ASSERT_TRUE(rank.runner().CaptureGraphs().ok());
  EXPECT_EQ(rank.runner().graphs().size(), 3);
  EXPECT_EQ(RunAlone(requests[0], rank), expected);
}

TEST(StepRunner, ALogitThatIsNoNumberEndsAStepThatRanAsAGraph) {
  Rank rank = RankWithGraphs();
  ASSERT_TRUE(rank.runner().WarmUp().ok());
  rank.MustApply({.slot_init = {{0, {}, Blocks({5}), Prompt(1, 3)}},
                  .rows = {PrefillRow(0, 0, Prompt(1, 3), true)}});
  rank.model().BreakLogits();
  const auto done = rank.Apply({.rows = {DecodeRow(0, 3)}});
  EXPECT_EQ(done.status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(done.status().message()), HasSubstr("slot 0 at position 4"));
}

TEST(StepRunner, AReusedSlotKeepsNothingOfItsLastSequence) {
  const std::vector<Request> requests = ThreeRequests();
  Rank used;
  RunAlone(requests[0], used);
  Rank fresh;
  EXPECT_EQ(RunAlone(requests[1], used), RunAlone(requests[1], fresh));
}

TEST(StepRunner, PlansLongerThanABatchGiveTheTokensOfOneBatch) {
  const std::vector<Request> requests = {
      {Prompt(1, 300), {.seed = 1}, Blocks({0, 1, 2, 3, 4, 5}), 1},
      {Prompt(2, 200), {.seed = 2}, Blocks({6, 7, 8, 9}), 1},
      {Prompt(3, 3), {.seed = 3}, Blocks({10}), 1}};
  const auto run = [&](int max_batch_tokens, int* num_forwards) {
    Rank rank(MakeSingleRankCollective(), max_batch_tokens);
    StepPlan plan;
    for (uint32_t slot = 0; slot < requests.size(); ++slot) {
      plan.slot_init.push_back({slot, requests[slot].sampling, requests[slot].blocks});
      plan.rows.push_back(PrefillRow(slot, 0, requests[slot].prompt, slot != 1));
    }
    std::vector<int32_t> ids;
    for (const SampledToken& sampled : rank.MustApply(plan).sampled) {
      ids.push_back(static_cast<int32_t>(sampled.slot));
      ids.push_back(sampled.token);
    }
    *num_forwards = rank.model().num_forwards();
    return ids;
  };
  int num_forwards = 0;
  const std::vector<int32_t> whole = run(503, &num_forwards);
  EXPECT_EQ(num_forwards, 1);
  EXPECT_EQ(whole.size(), 4u);
  EXPECT_EQ(run(502, &num_forwards), whole);
  EXPECT_EQ(num_forwards, 2);
  EXPECT_EQ(run(100, &num_forwards), whole);
  EXPECT_EQ(num_forwards, 6);
  EXPECT_EQ(run(1, &num_forwards), whole);
  EXPECT_EQ(num_forwards, 503);
}

TEST(StepRunner, ACachedPrefixLetsTheFirstRowStartLater) {
  const Request request = ThreeRequests()[1];
  Rank rank;
  const std::vector<int32_t> expected = RunAlone(request, rank);
  const auto rest = request.prompt.begin() + 64;
  const StepDone done =
      rank.MustApply({.slot_init = {{0, request.sampling, request.blocks}},
                      .rows = {PrefillRow(0, 64, {rest, request.prompt.end()}, true)}});
  EXPECT_EQ(done.sampled.at(0).token, expected[0]);
}

TEST(StepRunner, AResumedSequenceContinuesWithAnExplicitToken) {
  const Request request = ThreeRequests()[0];
  Rank rank;
  const std::vector<int32_t> expected = RunAlone(request, rank);
  std::vector<int32_t> history = request.prompt;
  history.insert(history.end(), expected.begin(), expected.begin() + 10);
  const auto last = static_cast<uint32_t>(history.size()) - 1;
  const std::vector<int32_t> generated(expected.begin(), expected.begin() + 10);
  const StepDone done =
      rank.MustApply({.slot_init = {InitOf(3, request, request.blocks, generated)},
                      .rows = {PrefillRow(3, last, {history.back()}, true)}});
  EXPECT_EQ(done.sampled.at(0).token, expected[10]);
}

TEST(StepRunner, SamplesOnlyBelowTheSampledVocabulary) {
  Rank rank;
  StepPlan plan = {.slot_init = {{0, {.temperature = 100}, Blocks({0, 1, 2, 3, 4})}},
                   .rows = {PrefillRow(0, 0, {1}, true)}};
  for (uint32_t i = 1; i < 300; ++i) {
    EXPECT_LT(rank.MustApply(plan).sampled.at(0).token, 900);
    plan = {.rows = {DecodeRow(0, i)}};
  }
}

TEST(StepRunner, CopiesRunBeforeTheRowsInTheirOrder) {
  const Request request = ThreeRequests()[1];
  Rank rank;
  const std::vector<int32_t> expected = RunAlone(request, rank);  // blocks 3, 9, 8, 31
  rank.MustApply({.copies = {{.to_device = false, .block = BlockId{3}, .host_slot = 2}}});
  std::ranges::fill(rank.block(3), 0);
  EXPECT_EQ(rank.model().num_forwards(), 90);  // a plan of copies alone runs no model
  // Block 9 goes out and comes back to block 20 in the plan whose rows need both.
  const auto rest = request.prompt.begin() + 127;
  const StepDone done =
      rank.MustApply({.slot_init = {{0, request.sampling, Blocks({21, 20, 8})}},
                      .rows = {PrefillRow(0, 127, {rest, request.prompt.end()}, true)},
                      .copies = {{.to_device = true, .block = BlockId{21}, .host_slot = 2},
                                 {.to_device = false, .block = BlockId{9}, .host_slot = 0},
                                 {.to_device = true, .block = BlockId{20}, .host_slot = 0}}});
  EXPECT_EQ(done.sampled.at(0).token, expected[0]);
}

TEST(StepRunner, ABadPlanCopiesNothing) {
  Rank rank;
  std::ranges::fill(rank.block(5), 11);
  EXPECT_FALSE(rank.Apply({.rows = {DecodeRow(3, 0)},
                           .copies = {{.to_device = true, .block = BlockId{5}, .host_slot = 0}}})
                   .ok());
  EXPECT_THAT(rank.block(5), testing::Each(11));
}

TEST(StepRunner, ABlockMayBeATargetAgainInTheNextPlan) {
  Rank rank;
  const StepPlan plan = {.copies = {{.to_device = true, .block = BlockId{5}, .host_slot = 0}}};
  rank.MustApply(plan);
  rank.MustApply(plan);
}

TEST(StepRunner, RefusesCopiesWithoutAHostTier) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  StepRunnerConfig config = kConfig;
  config.num_host_slots = 0;
  auto runner = StepRunner::Create(config, &model, collective.get(), pool.data(), nullptr);
  ASSERT_TRUE(runner.ok());
  const StepPlan plan = {.group_epoch = 0xa,
                         .pool_epoch = 0xb,
                         .step = 1,
                         .copies = {{.to_device = true, .block = BlockId{5}, .host_slot = 0}}};
  EXPECT_EQ((*runner)->Apply(plan, 1).status().message(),
            "copies: host slot 0, but this pool has no host tier");
}

TEST(StepRunner, GoesOnWithTheChainOfTheRunnerBefore) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  StepRunnerConfig config = kConfig;
  config.num_host_slots = 0;
  config.chain = {.step = 7, .plan_hash = 0xfeed};
  auto runner = StepRunner::Create(config, &model, collective.get(), pool.data(), nullptr);
  ASSERT_TRUE(runner.ok());
  EXPECT_TRUE((*runner)->WarmUp().ok());
  const StepPlan plan = {
      .group_epoch = 0xa, .pool_epoch = 0xb, .step = 8, .previous_plan_hash = 0xfeed};
  EXPECT_TRUE((*runner)->Apply(plan, 0xbeef).ok());
  EXPECT_EQ((*runner)->chain().step, 8u);
  EXPECT_EQ((*runner)->chain().plan_hash, 0xbeefu);
}

TEST(StepRunner, NoStopIdIsSampledBeforeItsPosition) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  StepRunnerConfig config = kConfig;
  config.num_host_slots = 0;
  const auto greedy_tokens = [&](std::vector<int32_t> stop_ids, uint32_t first_stop_position) {
    config.stop_ids = std::move(stop_ids);
    auto runner = StepRunner::Create(config, &model, collective.get(), pool.data(), nullptr);
    CHECK(runner.ok());
    const SamplingParams sampling = {.temperature = 0, .first_stop_position = first_stop_position};
    StepPlan plan = {.group_epoch = 0xa,
                     .pool_epoch = 0xb,
                     .slot_init = {{0, sampling, Blocks({4})}},
                     .rows = {PrefillRow(0, 0, {1, 2, 3}, true)}};
    std::vector<int32_t> tokens;
    for (uint32_t step = 1; step <= 4; ++step) {
      plan.step = step;
      const auto done = (*runner)->Apply(plan, 0);
      CHECK(done.ok(), "{}", done.status().ToString());
      tokens.push_back(done->sampled.at(0).token);
      plan.slot_init.clear();
      plan.rows = {DecodeRow(0, 2 + step)};
    }
    return tokens;
  };
  const std::vector<int32_t> unmasked = greedy_tokens({}, 0);
  // The first sampled token has position 3: it may be a stop id from first_stop_position 3 on.
  EXPECT_EQ(greedy_tokens({unmasked[0]}, 3), unmasked);
  const std::vector<int32_t> masked = greedy_tokens({unmasked[0]}, 4);
  EXPECT_NE(masked[0], unmasked[0]);
  // Twice, and in no order.
  const std::vector<int32_t> both = greedy_tokens({masked[0], unmasked[0], masked[0]}, 4);
  EXPECT_NE(both[0], unmasked[0]);
  EXPECT_NE(both[0], masked[0]);
}

TEST(StepRunner, APlanWithoutRowsIsAStep) {
  Rank rank;
  const StepDone done = rank.MustApply({});
  EXPECT_EQ(done.step, 1u);
  EXPECT_EQ(done.plan_hash, 1001u);
  EXPECT_TRUE(done.sampled.empty());
  EXPECT_EQ(rank.model().num_forwards(), 0);
}

TEST(StepRunner, TheFirstPlanOfAGroupMayBeOfAnyStepButTheNextFollowsIt) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  StepRunnerConfig config = kConfig;
  config.num_host_slots = 0;
  auto runner = StepRunner::Create(config, &model, collective.get(), pool.data(), nullptr);
  ASSERT_TRUE(runner.ok());
  StepPlan plan = {.group_epoch = 0xa, .pool_epoch = 0xb, .step = 0};
  EXPECT_EQ((*runner)->Apply(plan, 1).status().message(), "plan of step 0 after step 0");
  plan.step = 1000;
  plan.previous_plan_hash = 5;
  EXPECT_EQ((*runner)->Apply(plan, 1).status().message(),
            "step 1000 follows a plan with hash 5, this rank executed one with 0");
  plan.previous_plan_hash = 0;
  EXPECT_TRUE((*runner)->Apply(plan, 0xbeef).ok());
  plan = {.group_epoch = 0xa, .pool_epoch = 0xb, .step = 1002, .previous_plan_hash = 0xbeef};
  EXPECT_EQ((*runner)->Apply(plan, 1).status().message(), "plan of step 1002 after step 1000");
}

TEST(StepRunner, AWarmUpLeavesThePoolAsItIs) {
  for (const bool use_graphs : {false, true}) {
    SCOPED_TRACE(use_graphs);
    StepRunnerConfig config = kConfig;
    config.use_graphs = use_graphs;
    Rank rank(MakeSingleRankCollective(), 512, config);
    for (uint32_t id = 0; id < kConfig.num_blocks; ++id) {
      std::fill(rank.block(id).begin(), rank.block(id).end(), 77);
    }
    ASSERT_TRUE(rank.runner().WarmUp().ok());
    EXPECT_GT(rank.model().num_forwards(), 0);
    for (uint32_t id = 0; id < kConfig.num_blocks; ++id) {
      EXPECT_THAT(rank.block(id), testing::Each(77)) << "block " << id;
    }
  }
}

TEST(StepRunner, WarmUpDoesNotCountAsAStep) {
  Rank rank;
  ASSERT_TRUE(rank.runner().WarmUp().ok());
  EXPECT_EQ(rank.model().num_forwards(), 1);
  EXPECT_EQ(rank.MustApply({}).step, 1u);
}

class RanksTest : public testing::TestWithParam<bool> {};  // use_graphs

TEST_P(RanksTest, EveryRankFeedsItselfTheIdsOfRank0) {
  StepRunnerConfig config = kConfig;
  config.use_graphs = GetParam();
  constexpr int64_t kSlotBytes = 4096;
  const std::vector<Request> requests = ThreeRequests();
  Rank alone;
  auto memory = MappedMemory::Create("step_runner_test", ShmGroupMemoryBytes(2, kSlotBytes));
  ASSERT_TRUE(memory.ok());
  const auto shared = std::make_shared<MappedMemory>(*std::move(memory));
  std::vector<std::vector<uint64_t>> digests(2);
  std::vector<int32_t> tokens;
  const auto run = [&](int index) {
    auto collective = ShmCollective::Create(shared, {.group_epoch = kConfig.group_epoch,
                                                     .rank = index,
                                                     .world_size = 2,
                                                     .slot_bytes = kSlotBytes});
    CHECK(collective.ok());
    Rank rank(*std::move(collective), 512, config);
    CHECK(rank.runner().WarmUp().ok());
    StepPlan plan = {.slot_init = {InitOf(0, requests[0], requests[0].blocks),
                                   InitOf(1, requests[1], requests[1].blocks)},
                     .rows = {PrefillRow(0, 0, requests[0].prompt, true),
                              PrefillRow(1, 0, requests[1].prompt, true)}};
    for (uint32_t i = 0; i < 50; ++i) {
      const StepDone done = rank.MustApply(plan);
      digests[index].push_back(done.sampled_digest);
      EXPECT_EQ(done.sampled.size(), index == 0 ? 2u : 0u);
      if (index == 0) tokens.push_back(done.sampled[0].token);
      plan = {.rows = {DecodeRow(0, 70 + i), DecodeRow(1, 128 + i)}};
    }
  };
  std::thread second(run, 1);
  run(0);
  second.join();
  EXPECT_EQ(digests[0], digests[1]);
  EXPECT_NE(digests[0][0], digests[0][1]);
  const std::vector<int32_t> expected = RunAlone(requests[0], alone);
  EXPECT_EQ(tokens, std::vector<int32_t>(expected.begin(), expected.begin() + 50));
}

INSTANTIATE_TEST_SUITE_P(StepRunner, RanksTest, testing::Bool(), [](const auto& info) {
  return info.param ? "WithGraphs" : "WithoutGraphs";
});

// What arrives here of a broadcast of `damaged_ids` ids is not what rank 0 sent, from the fifth on.
class DamagedCollective : public Collective {
 public:
  DamagedCollective(std::unique_ptr<Collective> whole, int64_t damaged_ids)
      : whole_(std::move(whole)), damaged_ids_(damaged_ids) {}
  int rank() const override { return whole_->rank(); }
  int world_size() const override { return whole_->world_size(); }
  absl::Status AllReduceSum(float* data, int64_t count) override {
    return whole_->AllReduceSum(data, count);
  }
  absl::Status AllGather(const float* in, int64_t count, float* out) override {
    return whole_->AllGather(in, count, out);
  }
  absl::Status Broadcast(void* data, int64_t size_bytes) override {
    const absl::Status status = whole_->Broadcast(data, size_bytes);
    const bool is_damaged = size_bytes == damaged_ids_ * static_cast<int64_t>(sizeof(int32_t)) &&
                            ++num_broadcasts_ >= 5;
    if (is_damaged) static_cast<int32_t*>(data)[damaged_ids_ - 1] ^= 1;
    return status;
  }

 private:
  const std::unique_ptr<Collective> whole_;
  const int64_t damaged_ids_;
  int num_broadcasts_ = 0;
};

// Both have run the same plan, so its hash tells nothing.
TEST(StepRunner, ARankThatWentOnWithOtherIdsThanRank0SaysSo) {
  constexpr int64_t kSlotBytes = 4096;
  const std::vector<Request> requests = ThreeRequests();
  auto memory = MappedMemory::Create("step_runner_test", ShmGroupMemoryBytes(2, kSlotBytes));
  ASSERT_TRUE(memory.ok());
  const auto shared = std::make_shared<MappedMemory>(*std::move(memory));
  std::vector<std::vector<StepDone>> done(2);
  const auto run = [&](int index) {
    auto whole = ShmCollective::Create(shared, {.group_epoch = kConfig.group_epoch,
                                                .rank = index,
                                                .world_size = 2,
                                                .slot_bytes = kSlotBytes});
    CHECK(whole.ok());
    std::unique_ptr<Collective> collective = *std::move(whole);
    if (index == 1) collective = std::make_unique<DamagedCollective>(std::move(collective), 2);
    Rank rank(std::move(collective));
    StepPlan plan = {.slot_init = {InitOf(0, requests[0], requests[0].blocks),
                                   InitOf(1, requests[1], requests[1].blocks)},
                     .rows = {PrefillRow(0, 0, requests[0].prompt, true),
                              PrefillRow(1, 0, requests[1].prompt, true)}};
    for (uint32_t i = 0; i < 5; ++i) {
      done[index].push_back(rank.MustApply(plan));
      plan = {.rows = {DecodeRow(0, 70 + i), DecodeRow(1, 128 + i)}};
    }
  };
  std::thread second(run, 1);
  run(0);
  second.join();
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(done[0][i].plan_hash, done[1][i].plan_hash);
    EXPECT_EQ(done[0][i].sampled_digest == done[1][i].sampled_digest, i < 4) << "step " << i + 1;
  }
}

TEST(StepRunner, LogitsThatAreNotFiniteNameSlotAndPosition) {
  Rank rank;
  rank.model().BreakLogits();
  const absl::Status status =
      rank.Apply({.slot_init = {{1, {}, Blocks({0})}}, .rows = {PrefillRow(1, 0, {5, 6}, true)}})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(status.message(),
              HasSubstr("slot 1 at position 2: the logit of token 0 is not a finite number"));
}

}  // namespace
}  // namespace wintserve
