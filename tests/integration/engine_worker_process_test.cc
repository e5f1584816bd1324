// What engine-worker processes compute, and what ends them.
#include "tests/integration/engine_worker_process.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "common/exit_code.h"

namespace wintserve::testing_engine_worker {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

struct GoldenCase {
  std::vector<int32_t> prompt;
  std::vector<int32_t> greedy;
};

std::vector<GoldenCase> ReadGolden() {
  std::ifstream file("tests/golden/poet-wint2.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  std::vector<GoldenCase> cases;
  for (const auto& entry : golden.at("cases")) {
    cases.push_back({entry.at("ids").get<std::vector<int32_t>>(),
                     entry.at("greedy").at("ids").get<std::vector<int32_t>>()});
  }
  return cases;
}

class GreedyGolden : public EngineWorkerProcess, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, GreedyGolden, testing::Values(1, 2, 4),
                         [](const auto& info) { return fmt::format("{}", info.param); });

TEST_P(GreedyGolden, AllPromptsTogetherGetTheReferencesTokens) {
  const std::vector<GoldenCase> cases = ReadGolden();
  ASSERT_GE(cases.size(), 2u);
  Start(GetParam());
  MakeReady(GetParam());
  constexpr uint32_t kBlocksEach = 4;
  ASSERT_LE(cases.size() * kBlocksEach, kNumBlocks);

  std::vector<std::vector<int32_t>> outputs(cases.size());
  StepPlan plan;
  for (uint32_t slot = 0; slot < cases.size(); ++slot) {
    const std::vector<int32_t>& prompt = cases[slot].prompt;
    ASSERT_LE(prompt.size() + cases[slot].greedy.size(), kBlocksEach * kBlockTokens);
    std::vector<BlockId> blocks;  // interleaved with the other sequences'
    for (uint32_t i = 0; i < kBlocksEach; ++i) {
      blocks.push_back(BlockId{static_cast<int32_t>(i * cases.size() + slot)});
    }
    plan.slot_init.push_back({slot, {.temperature = 0}, blocks});
    plan.rows.push_back({slot, 0, static_cast<uint32_t>(prompt.size()), true, prompt});
  }
  while (!plan.rows.empty()) {
    const StepDone done = Execute(plan);
    plan = {};
    for (const SampledToken& sampled : done.sampled) {
      std::vector<int32_t>& output = outputs[sampled.slot];
      output.push_back(sampled.token);
      const bool finished =
          sampled.token == kEndOfSequence || output.size() == cases[sampled.slot].greedy.size();
      if (finished) continue;
      const auto position =
          static_cast<uint32_t>(cases[sampled.slot].prompt.size() + output.size() - 1);
      plan.rows.push_back({sampled.slot, position, 1, true, {}});
    }
  }
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(outputs[i], cases[i].greedy) << "case " << i;

  server_->Send(ShutdownWorker{});
  for (int rank = 0; rank < GetParam(); ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
}

std::vector<BlockId> BlocksFrom(int first, int count) {
  std::vector<BlockId> blocks;
  for (int i = 0; i < count; ++i) blocks.push_back(BlockId{first + i});
  return blocks;
}

// 230 tokens: three whole blocks and a part.
std::vector<int32_t> LongPrompt() {
  std::vector<int32_t> ids;
  while (ids.size() < 230) {
    for (const GoldenCase& golden : ReadGolden()) {
      ids.insert(ids.end(), golden.prompt.begin(), golden.prompt.end());
      ids.insert(ids.end(), golden.greedy.begin(), golden.greedy.end());
    }
  }
  ids.resize(230);
  return ids;
}

class LongPrompts : public EngineWorkerProcess, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, LongPrompts, testing::Values(1, 2),
                         [](const auto& info) { return fmt::format("{}", info.param); });

TEST_P(LongPrompts, GetTheSameTokensHoweverTheyAreChunkedCachedOrCopied) {
  Start(GetParam());
  MakeReady(GetParam());
  const std::vector<int32_t> prompt = LongPrompt();
  const std::vector<int32_t> expected = Generate(prompt, 0, prompt.size(), BlocksFrom(4, 4));
  for (const size_t chunk : {1, 7, 64, 100}) {
    EXPECT_EQ(Generate(prompt, 0, chunk, BlocksFrom(10, 4)), expected) << "chunks of " << chunk;
  }
  // The first three blocks are those of the first run.
  for (const size_t num_shared : {1, 2, 3}) {
    std::vector<BlockId> blocks = BlocksFrom(20, 4);
    std::copy_n(BlocksFrom(4, 4).begin(), num_shared, blocks.begin());
    EXPECT_EQ(Generate(prompt, num_shared * kBlockTokens, 50, blocks), expected)
        << num_shared << " blocks shared";
  }
  // Out to the host tier, and back to other blocks after the first have been overwritten.
  StepPlan write_back;
  for (uint32_t i = 0; i < 3; ++i) {
    write_back.copies.push_back(
        {.to_device = false, .block = BlocksFrom(4, 4)[i], .host_slot = 3 - i});
  }
  Execute(write_back);
  Generate(std::vector<int32_t>(230, 3), 0, 230, BlocksFrom(4, 4));
  std::vector<BlockCopy> restore;
  for (uint32_t i = 0; i < 3; ++i) {
    restore.push_back({.to_device = true, .block = BlocksFrom(30, 4)[i], .host_slot = 3 - i});
  }
  EXPECT_EQ(Generate(prompt, 3 * kBlockTokens, 50, BlocksFrom(30, 4), restore), expected);
}

TEST_P(LongPrompts, GetTheSameTokensOnANewPool) {
  Start(GetParam());
  MakeReady(GetParam());
  const std::vector<int32_t> prompt = LongPrompt();
  const std::vector<int32_t> expected = Generate(prompt, 0, 230, BlocksFrom(4, 4));
  SendPlan({.slot_init = {{0, {}, BlocksFrom(0, 1)}}});  // a slot that only the detachment empties
  server_->Send(DetachPool{kPoolEpoch});
  inbox_.WaitForDetached(GetParam());
  PublishPool(kPoolEpoch + 1);
  SendAttachPool();
  inbox_.WaitForReady(2 * GetParam());
  EXPECT_EQ(Generate(prompt, 0, 100, BlocksFrom(9, 4)), expected);
  server_->Send(ShutdownWorker{});
  for (int rank = 0; rank < GetParam(); ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
}

// The cache manager that created the pool died before the workers could map it; its successor is
// on the same socket.
TEST_P(LongPrompts, WaitForAPoolToReplaceTheOneThatIsGone) {
  Start(GetParam());
  Configure(GetParam());
  PublishPool(kPoolEpoch);
  memory_server_->Withdraw();
  SendAttachPool();
  server_->Send(DetachPool{kPoolEpoch});
  inbox_.WaitForDetached(GetParam());
  PublishPool(kPoolEpoch + 1);
  SendAttachPool();
  inbox_.WaitForReady(GetParam());
  server_->Send(ShutdownWorker{});
  for (int rank = 0; rank < GetParam(); ++rank) {
    EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
    EXPECT_THAT(Log(rank), HasSubstr("is lost with its cache manager"));
  }
}

TEST_P(LongPrompts, RunAheadOnTokensFromTheSlotInPlansThatAreSentTogether) {
  Start(GetParam());
  MakeReady(GetParam());
  const std::vector<int32_t> prompt = LongPrompt();
  const std::vector<int32_t> expected = Generate(prompt, 0, 230, BlocksFrom(4, 4));
  std::vector<uint64_t> steps = {SendPlan(
      {.slot_init = {{0, kSampling, BlocksFrom(8, 4)}}, .rows = {{0, 0, 230, true, prompt}}})};
  for (uint32_t i = 1; i < kNumSampled; ++i) {
    steps.push_back(SendPlan({.rows = {{0, 229 + i, 1, true, {}}}}));
  }
  server_->Send(ShutdownWorker{});  // behind all of them
  std::vector<int32_t> output;
  for (const uint64_t step : steps) {
    output.push_back(inbox_.WaitForStep(step, GetParam()).at(0).sampled.at(0).token);
  }
  EXPECT_EQ(output, expected);
  for (int rank = 0; rank < GetParam(); ++rank) EXPECT_EQ(WaitForExit(), kExitOk) << Log(rank);
}

TEST_F(EngineWorkerProcess, AStopDoesNotWaitForThePlansBehindTheOneInHand) {
  Start(1);
  MakeReady(1);
  const std::vector<int32_t> tokens(512, 3);
  constexpr uint32_t kPlans = 4;
  for (uint32_t i = 0; i < kPlans; ++i) {
    StepPlan plan{.rows = {{0, 512 * i, 512, false, tokens}}};
    if (i == 0) plan.slot_init = {{0, {}, BlocksFrom(0, 32)}};
    SendPlan(plan);
  }
  inbox_.WaitForStep(1, 1);
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk) << Log(0);
  EXPECT_THAT(Log(0), testing::Not(HasSubstr("ERROR")));
  EXPECT_FALSE(inbox_.HasStep(kPlans));
}

TEST_F(EngineWorkerProcess, HoldsStopIdsBackUntilTheirPosition) {
  Start(1);
  MakeReady(1);
  const GoldenCase golden = ReadGolden().at(0);  // ends with the end of the sequence
  ASSERT_EQ(golden.greedy.back(), kEndOfSequence);
  const auto first_stop = static_cast<uint32_t>(golden.prompt.size() + golden.greedy.size() + 5);
  std::vector<int32_t> output;
  StepPlan plan{
      .slot_init = {{0, {.temperature = 0, .first_stop_position = first_stop}, BlocksFrom(0, 4)}},
      .rows = {{0, 0, static_cast<uint32_t>(golden.prompt.size()), true, golden.prompt}}};
  while (output.size() < golden.greedy.size() + 5) {
    output.push_back(Execute(plan).sampled.at(0).token);
    const auto position = static_cast<uint32_t>(golden.prompt.size() + output.size() - 1);
    plan = {.rows = {{0, position, 1, true, {}}}};
  }
  const auto last = golden.greedy.end() - 1;
  EXPECT_TRUE(std::equal(golden.greedy.begin(), last, output.begin()));
  EXPECT_THAT(output, testing::Not(testing::Contains(kEndOfSequence)));
}

TEST_F(EngineWorkerProcess, ExitsCleanlyOnSigtermBetweenPlans) {
  Start(1);
  MakeReady(1);
  Execute({});
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
  EXPECT_THAT(Log(0), HasSubstr("stopped"));
}

TEST_F(EngineWorkerProcess, ALostServerEndsItWithTheReasonWhenNoOtherComes) {
  instance_.options.orphan_timeout_ms = 300;
  Start(1);
  MakeReady(1);
  server_->Stop(0);
  EXPECT_EQ(WaitForExit(), kExitInternal);
  EXPECT_THAT(Log(0), HasSubstr("work_queue.sock is gone"));
  EXPECT_THAT(Log(0), HasSubstr("no other came within 300 ms"));
}

TEST_F(EngineWorkerProcess, WhatGrpcLogsStandsInOurLogForDebugging) {
  ::setenv("GRPC_VERBOSITY", "debug", /*overwrite=*/1);
  instance_.options.log_level = "debug";
  Start(1);
  ::unsetenv("GRPC_VERBOSITY");
  inbox_.WaitForHellos(1);
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
  EXPECT_THAT(Log(0), HasSubstr(" engine_worker.0: grpc: "));
  std::istringstream log(Log(0));
  for (std::string line; std::getline(log, line);) {
    EXPECT_THAT(line, testing::AnyOf(StartsWith("DEBUG "), StartsWith("INFO "),
                                     StartsWith("WARNING "), StartsWith("ERROR ")));
  }
}

TEST_F(EngineWorkerProcess, ABadPlanEndsItWithTheReason) {
  Start(1);
  MakeReady(1);
  server_->SendPlan({.group_epoch = kGroupEpoch,
                     .pool_epoch = kPoolEpoch,
                     .step = 1,
                     .slot_init = {{0, {}, {BlockId{99}}}}});
  EXPECT_EQ(inbox_.WaitForFault(), "slot 0: block 99 is not in 0 … 63");
  EXPECT_EQ(WaitForExit(), kExitInternal);
  EXPECT_THAT(Log(0), HasSubstr("slot 0: block 99 is not in 0 … 63"));
}

TEST_F(EngineWorkerProcess, AMissingModelExitsWithTheCheckpointsCode) {
  instance_.options.model = "models/none";
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitCheckpoint);
  EXPECT_THAT(Log(0), HasSubstr("models/none"));
}

TEST_F(EngineWorkerProcess, ATruncatedCheckpointExitsWithTheCheckpointsCodeAndNamesTheFile) {
  const std::filesystem::path copy = std::filesystem::path(instance_.runtime_dir) / "model";
  std::filesystem::copy("models/poet", copy);
  const std::filesystem::path file = copy / "model-00002-of-00003.safetensors";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  instance_.options.model = copy.string();
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitCheckpoint);
  EXPECT_THAT(Log(0), HasSubstr("model-00002-of-00003.safetensors"));
}

TEST_F(EngineWorkerProcess, AnUnknownDeviceExitsAsUnavailable) {
  instance_.options.device = "cuda";
  Spawn(0);
  EXPECT_EQ(WaitForExit(), kExitUnavailable);
  EXPECT_THAT(Log(0), HasSubstr("--device cuda"));
}

TEST_F(EngineWorkerProcess, ASurvivorOfAKilledRankStillStopsCleanly) {
  Start(2);
  MakeReady(2);
  ::kill(children_[0], SIGKILL);
  EXPECT_EQ(WaitForExit(), 128 + SIGKILL);
  // The survivor takes the plan up and waits for its peer.
  server_->SendPlan({.group_epoch = kGroupEpoch,
                     .pool_epoch = kPoolEpoch,
                     .step = 1,
                     .slot_init = {{0, {.temperature = 0}, {BlockId{1}}}},
                     .rows = {{0, 0, 1, true, {3}}}});
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  ::kill(children_[0], SIGTERM);
  EXPECT_EQ(WaitForExit(), kExitOk);
}

}  // namespace
}  // namespace wintserve::testing_engine_worker
