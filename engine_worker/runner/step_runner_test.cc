#include "engine_worker/runner/step_runner.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <thread>

#include "common/check.h"
#include "engine_worker/collectives/shm/shm_collective.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {
namespace {

using testing::HasSubstr;
using testing_fakes::FakeModel;

constexpr StepRunnerConfig kConfig = {.group_epoch = 0xa,
                                      .pool_epoch = 0xb,
                                      .num_blocks = 40,
                                      .max_slots = 4,
                                      .max_tokens = 600,
                                      .max_sequence_tokens = 600,
                                      .sampled_vocab_size = 900};

// One rank with a pool of its own; numbers and chains the plans that it is given.
class Rank {
 public:
  explicit Rank(std::unique_ptr<Collective> collective = MakeSingleRankCollective(),
                int max_batch_tokens = 512)
      : collective_(std::move(collective)),
        model_(collective_.get(), max_batch_tokens),
        pool_(kConfig.num_blocks * FakeModel::kBlockTokens) {
    auto runner = StepRunner::Create(kConfig, &model_, collective_.get(), pool_.data());
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
  FakeModel& model() { return model_; }

 private:
  const std::unique_ptr<Collective> collective_;
  FakeModel model_;
  std::vector<int32_t> pool_;
  std::unique_ptr<StepRunner> runner_;
  uint64_t step_ = 0;
  uint64_t hash_ = 0;
};

std::vector<BlockId> Blocks(std::initializer_list<int> ids) {
  std::vector<BlockId> blocks;
  for (const int id : ids) blocks.push_back(BlockId{id});
  return blocks;
}

std::vector<int32_t> Prompt(uint32_t seed, int length) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(length);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % FakeModel::kVocabSize);
  return tokens;
}

PlanRow PrefillRow(uint32_t slot, uint32_t position, std::vector<int32_t> tokens, bool sample) {
  const auto length = static_cast<uint32_t>(tokens.size());
  return {slot, position, length, sample, std::move(tokens)};
}

PlanRow DecodeRow(uint32_t slot, uint32_t position) { return {slot, position, 1, true, {}}; }

struct Request {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  std::vector<BlockId> blocks;  // enough for all its tokens
  int num_output_tokens = 0;
};

std::vector<int32_t> RunAlone(const Request& request, Rank& rank) {
  std::vector<int32_t> output;
  StepPlan plan = {.slot_init = {{2, request.sampling, request.blocks}},
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
      {Prompt(1, 70), {.temperature = 0.8f, .seed = 5}, Blocks({7, 2, 30}), 80},
      {Prompt(2, 128), {.top_p = 0.9f, .seed = 6, .choice_index = 1}, Blocks({3, 9, 8, 31}), 90},
      {Prompt(3, 1), {.temperature = 0}, Blocks({1, 0}), 100}};
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
        plan.slot_init.push_back({slot, request.sampling, added});
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
  const StepDone done = rank.MustApply({.slot_init = {{3, request.sampling, request.blocks}},
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

TEST(StepRunner, APlanWithoutRowsIsAStep) {
  Rank rank;
  const StepDone done = rank.MustApply({});
  EXPECT_EQ(done.step, 1u);
  EXPECT_EQ(done.plan_hash, 1001u);
  EXPECT_TRUE(done.sampled.empty());
  EXPECT_EQ(rank.model().num_forwards(), 0);
}

TEST(StepRunner, WarmUpDoesNotCountAsAStep) {
  Rank rank;
  ASSERT_TRUE(rank.runner().WarmUp().ok());
  EXPECT_EQ(rank.model().num_forwards(), 1);
  EXPECT_EQ(rank.MustApply({}).step, 1u);
}

TEST(StepRunner, EveryRankFeedsItselfTheIdsOfRank0) {
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
    Rank rank(*std::move(collective));
    CHECK(rank.runner().WarmUp().ok());
    StepPlan plan = {.slot_init = {{0, requests[0].sampling, requests[0].blocks},
                                   {1, requests[1].sampling, requests[1].blocks}},
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

TEST(StepRunner, LogitsThatAreNotFiniteNameSlotAndPosition) {
  Rank rank;
  rank.model().BreakLogits();
  const absl::Status status =
      rank.Apply({.slot_init = {{1, {}, Blocks({0})}}, .rows = {PrefillRow(1, 0, {5, 6}, true)}})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(status.message(), HasSubstr("slot 1 at position 2: the logit of token 0 is nan"));
}

// A plan that breaks one rule, after this sequence of good ones: slot 0 has 3 tokens computed and
// one sampled, slot 1 has 2 tokens computed and none sampled; both own one block.
struct BadPlan {
  const char* name;
  StepPlan plan;
  const char* message;
};

class BadPlanTest : public testing::TestWithParam<BadPlan> {};

TEST_P(BadPlanTest, IsRefusedBeforeTheModelRuns) {
  Rank rank;
  rank.MustApply({.slot_init = {{0, {}, Blocks({4})}, {1, {}, Blocks({5})}},
                  .rows = {PrefillRow(0, 0, {1, 2, 3}, true), PrefillRow(1, 0, {1, 2}, false)}});
  const absl::Status status = rank.Apply(GetParam().plan).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), GetParam().message);
  EXPECT_EQ(rank.model().num_forwards(), 1);
}

std::vector<BadPlan> BadPlans() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  return {
      {"InitOfASlotBeyondTheTable",
       {.slot_init = {{4, {}, {}}}},
       "slot_init: slot 4 is not in 0 … 3"},
      {"InitOfASlotInUse", {.slot_init = {{1, {}, {}}}}, "slot_init: slot 1 was not released"},
      {"InitTwice",
       {.slot_init = {{2, {}, {}}, {2, {}, {}}}},
       "slot_init: slot 2 was not released"},
      {"BlockBeyondThePool",
       {.slot_init = {{2, {}, Blocks({40})}}},
       "slot 2: block 40 is not in 0 … 39"},
      {"NegativeBlock",
       {.slot_init = {{2, {}, Blocks({-1})}}},
       "slot 2: block -1 is not in 0 … 39"},
      {"TooManyBlocks",
       {.slot_init = {{2, {}, std::vector<BlockId>(11)}}},
       "slot 2: a block table of 11 blocks, 600 tokens need at most 10"},
      {"NegativeTemperature",
       {.slot_init = {{2, {.temperature = -1}, {}}}},
       "slot 2: temperature -1 is not a finite number >= 0"},
      {"NanTemperature",
       {.slot_init = {{2, {.temperature = kNan}, {}}}},
       "slot 2: temperature nan is not a finite number >= 0"},
      {"TopPOfZero", {.slot_init = {{2, {.top_p = 0}, {}}}}, "slot 2: top_p 0 is not in (0, 1]"},
      {"NanTopP", {.slot_init = {{2, {.top_p = kNan}, {}}}}, "slot 2: top_p nan is not in (0, 1]"},
      {"NegativeTopK", {.slot_init = {{2, {.top_k = -2}, {}}}}, "slot 2: top_k -2 is negative"},
      {"AppendToAFreeSlot",
       {.block_append = {{2, Blocks({1})}}},
       "block_append: slot 2 is not in use"},
      {"AppendOfABadBlock",
       {.block_append = {{0, Blocks({99})}}},
       "slot 0: block 99 is not in 0 … 39"},
      {"RowOfAFreeSlot", {.rows = {DecodeRow(3, 0)}}, "row: slot 3 is not in use"},
      {"RowOfASlotBeyondTheTable",
       {.rows = {DecodeRow(1u << 31, 0)}},
       "row: slot 2147483648 is not in use"},
      {"TwoRowsOfASlot",
       {.rows = {DecodeRow(0, 3), DecodeRow(0, 4)}},
       "rows: slot 0 is named twice"},
      {"RowWithoutTokens", {.rows = {PrefillRow(0, 3, {}, true)}}, "slot 0: a row without tokens"},
      {"PositionAhead",
       {.rows = {DecodeRow(0, 4)}},
       "slot 0: a row at position 4, the sequence is at 3"},
      {"PositionBehind",
       {.rows = {DecodeRow(0, 2)}},
       "slot 0: a row at position 2, the sequence is at 3"},
      {"BlockTableTooShort",
       {.rows = {PrefillRow(0, 3, std::vector<int32_t>(62), true)}},
       "slot 0: a row up to position 65, its block table covers 64"},
      {"SequenceTooLong",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}}, .rows = {PrefillRow(2, 600, {1}, true)}},
       "slot 2: a row up to position 601, sequences have at most 600 tokens"},
      {"PositionThatWraps",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}},
        .rows = {PrefillRow(2, 0xffffffff, {1}, true)}},
       "slot 2: a row up to position 4294967296, sequences have at most 600 tokens"},
      {"SeveralTokensFromTheSlot",
       {.rows = {{0, 3, 2, true, {}}}},
       "slot 0: a row of 2 tokens without any id; only one can come from the slot"},
      {"NothingSampledInTheSlot",
       {.rows = {DecodeRow(1, 2)}},
       "slot 1: no token was sampled there that a row could take up"},
      {"FewerIdsThanTokens",
       {.rows = {{0, 3, 2, true, {1}}}},
       "slot 0: a row of 2 tokens with 1 ids"},
      {"TokenBeyondTheVocabulary",
       {.rows = {PrefillRow(0, 3, {1000}, true)}},
       "slot 0: token 1000 is not in 0 … 999"},
      {"NegativeToken",
       {.rows = {PrefillRow(0, 3, {-1}, true)}},
       "slot 0: token -1 is not in 0 … 999"},
      {"TooManyTokens",
       {.slot_init = {{2, {}, std::vector<BlockId>(10)}},
        .rows = {DecodeRow(0, 3), PrefillRow(2, 0, std::vector<int32_t>(600), true)}},
       "the plan has 601 tokens, allowed are 600"},
      {"ReleaseOfAFreeSlot", {.slot_release = {2}}, "slot_release: slot 2 is not in use"},
      {"ReleaseTwice", {.slot_release = {0, 0}}, "slot_release: slot 0 is named twice"},
  };
}
INSTANTIATE_TEST_SUITE_P(Rules, BadPlanTest, testing::ValuesIn(BadPlans()),
                         [](const auto& info) { return info.param.name; });

struct BadChain {
  const char* name;
  std::function<void(StepPlan*)> spoil;
  const char* message;
};

class BadChainTest : public testing::TestWithParam<BadChain> {};

TEST_P(BadChainTest, IsRefused) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  std::vector<int32_t> pool(kConfig.num_blocks * FakeModel::kBlockTokens);
  auto runner = StepRunner::Create(kConfig, &model, collective.get(), pool.data());
  ASSERT_TRUE(runner.ok());
  StepPlan plan = {.group_epoch = 0xa, .pool_epoch = 0xb, .step = 1};
  ASSERT_TRUE((*runner)->Apply(plan, 0xfeed).ok());
  plan.step = 2;
  plan.previous_plan_hash = 0xfeed;
  GetParam().spoil(&plan);
  const absl::Status status = (*runner)->Apply(plan, 0xbeef).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(
    Rules, BadChainTest,
    testing::Values(BadChain{"OtherGroup", [](StepPlan* plan) { plan->group_epoch = 0xc; },
                             "plan of group epoch c, this group is a"},
                    BadChain{"OtherPool", [](StepPlan* plan) { plan->pool_epoch = 0xc; },
                             "plan of pool epoch c, the mapped pool is b"},
                    BadChain{"StepRepeated", [](StepPlan* plan) { plan->step = 1; },
                             "plan of step 1 after step 1"},
                    BadChain{"StepSkipped", [](StepPlan* plan) { plan->step = 3; },
                             "plan of step 3 after step 1"},
                    BadChain{
                        "OtherHistory", [](StepPlan* plan) { plan->previous_plan_hash = 1; },
                        "step 2 follows a plan with hash 1, this rank executed one with feed"}),
    [](const auto& info) { return info.param.name; });

struct BadConfig {
  const char* name;
  std::function<void(StepRunnerConfig*)> spoil;
  const char* message;
};

class BadConfigTest : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, NamesTheNumberAndWhatTheWorkerCanDo) {
  const auto collective = MakeSingleRankCollective();
  FakeModel model(collective.get());
  StepRunnerConfig config = kConfig;
  GetParam().spoil(&config);
  const auto runner = StepRunner::Create(config, &model, collective.get(), nullptr);
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(runner.status().message(), GetParam().message);
}
INSTANTIATE_TEST_SUITE_P(
    Rules, BadConfigTest,
    testing::Values(BadConfig{"NoSlots", [](StepRunnerConfig* config) { config->max_slots = 0; },
                              "max_slots is 0, this worker can do 1 … 65536"},
                    BadConfig{"SequencesBeyondTheModel",
                              [](StepRunnerConfig* config) { config->max_sequence_tokens = 4097; },
                              "max_sequence_tokens is 4097, this worker can do 1 … 4096"},
                    BadConfig{"SamplingBeyondTheVocabulary",
                              [](StepRunnerConfig* config) { config->sampled_vocab_size = 1001; },
                              "sampled_vocab_size is 1001, this worker can do 1 … 1000"},
                    BadConfig{"NoBlocks", [](StepRunnerConfig* config) { config->num_blocks = 0; },
                              "num_blocks is 0, this worker can do 1 … 2147483647"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve
