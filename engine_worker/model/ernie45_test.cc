// The forward pass against the goldens of a checkpoint, alone and as a tensor-parallel group.
#include "engine_worker/model/ernie45.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "common/check.h"
#include "engine_worker/model/thread_group.h"
#include "hwy/highway.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

using kernels::Batch;

std::string model_dir = "models/poet";
std::string golden_file = "tests/golden/poet-wint2.json";

constexpr int kEndOfSequence = 2;
constexpr int kMaxBlocks = 64;

const nlohmann::json& Golden() {
  static const nlohmann::json* golden = [] {
    std::ifstream file(golden_file);
    CHECK(file.good(), "cannot read {}", golden_file);
    return new nlohmann::json(nlohmann::json::parse(file));
  }();
  return *golden;
}

struct Config {
  int world_size = 1;
  int num_threads = 1;
  int max_batch_tokens = 256;
};

// A group of ranks with a KV pool each. Sequence s owns blocks 4s … 4s + 3.
class Group {
 public:
  explicit Group(const Config& group_config)
      : members_(group_config.world_size), ranks_(group_config.world_size) {
    absl::StatusOr<ModelConfig> config = LoadModelConfig(model_dir);
    CHECK(config.ok(), "{}", config.status().ToString());
    auto checkpoint = Checkpoint::Open(model_dir, *config, KOrderChoice::kAuto);
    CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
    for (size_t r = 0; r < ranks_.size(); ++r) {
      Rank& rank = ranks_[r];
      rank.backend = kernels::cpu::CreateCpuBackend({.num_threads = group_config.num_threads});
      auto model = LoadErnie45(*config, **checkpoint, rank.backend.get(),
                               ranks_.size() == 1 ? nullptr : members_.rank(static_cast<int>(r)),
                               {.max_batch_tokens = group_config.max_batch_tokens});
      CHECK(model.ok(), "{}", model.status().ToString());
      rank.model = *std::move(model);
      rank.pool = *rank.backend->Allocate(kMaxBlocks * rank.model->kv_block_bytes());
      rank.batch = *rank.backend->CreateBatch({.max_tokens = group_config.max_batch_tokens,
                                               .max_rows = kMaxBlocks,
                                               .max_blocks_per_row = kMaxBlocks,
                                               .num_slots = 1});
      // Whatever a block held before must not show.
      std::memset(rank.pool->data(), 0xFF, rank.pool->size_bytes());
    }
  }

  Model& model() { return *ranks_[0].model; }
  std::string_view pool(int rank) const {
    const kernels::Buffer& pool = *ranks_[rank].pool;
    return {static_cast<const char*>(pool.data()), static_cast<size_t>(pool.size_bytes())};
  }

  // Logits of the batch's rows that want them, one vector a row.
  std::vector<std::vector<float>> Forward(const Batch& batch) {
    return Rows([&batch](Rank* rank) { return rank->Forward(batch); },
                [this] { return ranks_[0].batch->num_logit_rows(); });
  }

  // Of these tokens of the last batch.
  std::vector<std::vector<float>> TokenLogits(int64_t first_token, int64_t num_tokens) {
    return Rows([=](Rank* rank) { return rank->model->TokenLogits(first_token, num_tokens); },
                [=] { return num_tokens; });
  }

 private:
  struct Rank;

  template <typename Call, typename NumRows>
  std::vector<std::vector<float>> Rows(const Call& call, const NumRows& num_rows) {
    std::vector<std::thread> threads;
    for (size_t r = 1; r < ranks_.size(); ++r) {
      threads.emplace_back([this, r, &call] {
        const auto logits = call(&ranks_[r]);
        CHECK(logits.ok() && logits->data == nullptr);
      });
    }
    const auto logits = call(&ranks_[0]);
    for (std::thread& thread : threads) thread.join();
    CHECK(logits.ok(), "{}", logits.status().ToString());
    std::vector<std::vector<float>> rows(num_rows());
    for (size_t r = 0; r < rows.size(); ++r) {
      rows[r].resize(model().vocab_size());
      CHECK(ranks_[0]
                .backend->CopyToHost(rows[r].data(), logits->row(r), rows[r].size() * sizeof(float))
                .ok());
    }
    return rows;
  }

  struct Rank {
    std::unique_ptr<kernels::Backend> backend;
    std::unique_ptr<Model> model;
    std::unique_ptr<kernels::Buffer> pool;
    std::unique_ptr<kernels::DeviceBatch> batch;

    absl::StatusOr<kernels::ConstRows> Forward(const Batch& tokens) {
      backend->SetBatch(tokens, batch.get());
      return model->Forward(*batch, pool->data());
    }
  };
  ThreadGroup members_;
  std::vector<Rank> ranks_;
};

std::vector<int32_t> BlockTable(int sequence) {
  std::vector<int32_t> blocks;
  // Not in order, so that a block's index never passes for its place.
  for (int i = 3; i >= 0; --i) blocks.push_back(sequence * 4 + i);
  return blocks;
}

// Appends a row of `tokens` from `position` on.
void AddRow(const std::vector<int32_t>& tokens, int position, const std::vector<int32_t>& blocks,
            Batch* batch) {
  batch->tokens.insert(batch->tokens.end(), tokens.begin(), tokens.end());
  batch->rows.push_back({.position = position,
                         .length = static_cast<int32_t>(tokens.size()),
                         .block_table = blocks,
                         .want_logits = true});
}

std::vector<float> RunRow(Group* group, const std::vector<int32_t>& tokens, int position,
                          int sequence) {
  const std::vector<int32_t> blocks = BlockTable(sequence);
  Batch batch;
  AddRow(tokens, position, blocks, &batch);
  return group->Forward(batch)[0];
}

int32_t Best(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

std::vector<int32_t> Slice(const std::vector<int32_t>& v, size_t begin, size_t end) {
  return {v.begin() + begin, v.begin() + end};
}

void ExpectGoldenLogits(const nlohmann::json& golden, const std::vector<float>& logits) {
  const double tolerance = Golden()["tolerance"]["float32_activations_abs"];
  const std::vector<int32_t> ids = golden["top8_ids"];
  const std::vector<double> values = golden["top8"];
  EXPECT_EQ(Best(logits), ids[0]);
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_NEAR(logits[ids[i]], values[i], tolerance) << "token " << ids[i];
  }
}

std::vector<int32_t> Greedy(Group* group, const std::vector<int32_t>& prompt, size_t max_tokens,
                            std::vector<float> logits) {
  std::vector<int32_t> ids;
  while (true) {
    ids.push_back(Best(logits));
    if (ids.size() == max_tokens || ids.back() == kEndOfSequence) return ids;
    const auto position = static_cast<int>(prompt.size() + ids.size() - 1);
    logits = RunRow(group, {ids.back()}, position, /*sequence=*/0);
  }
}

class Goldens : public testing::TestWithParam<int> {};

TEST_P(Goldens, LogitsAndGreedyContinuationsMatch) {
  const ModelConfig config = *LoadModelConfig(model_dir);
  if (!CheckTensorParallel(config, GetParam()).ok()) GTEST_SKIP() << "does not divide";
  Group group({.world_size = GetParam()});
  ASSERT_FALSE(Golden()["cases"].empty());
  for (const auto& golden : Golden()["cases"]) {
    SCOPED_TRACE(golden["ids"].dump());
    const std::vector<int32_t> prompt = golden["ids"];
    std::vector<float> logits;
    size_t done = 0;
    for (const auto& position : golden["logits"]) {
      SCOPED_TRACE(position["position"].get<int>());
      const size_t end = position["position"].get<size_t>() + 1;
      logits = RunRow(&group, Slice(prompt, done, end), static_cast<int>(done), 0);
      ExpectGoldenLogits(position, logits);
      done = end;
    }
    ASSERT_EQ(done, prompt.size());
    EXPECT_THAT(Greedy(&group, prompt, golden["greedy"]["max_tokens"], logits),
                testing::ElementsAreArray(golden["greedy"]["ids"].get<std::vector<int32_t>>()));
  }
}

INSTANTIATE_TEST_SUITE_P(WorldSize, Goldens, testing::Values(1, 2, 4),
                         [](const auto& info) { return "Ranks" + std::to_string(info.param); });

// Prompts of different lengths, past one block.
std::vector<std::vector<int32_t>> Prompts() {
  std::vector<std::vector<int32_t>> prompts;
  for (const auto& golden : Golden()["cases"]) {
    std::vector<int32_t> ids = golden["ids"];
    const std::vector<int32_t> continuation = golden["greedy"]["ids"];
    ids.insert(ids.end(), continuation.begin(), continuation.end());
    if (ids.back() == kEndOfSequence) ids.pop_back();
    prompts.push_back(ids);
  }
  return prompts;
}

TEST(Ernie45, ARowHasTheSameBitsInAnyBatchAndHoweverItIsChunked) {
  Group group({.max_batch_tokens = 512});
  const auto prompts = Prompts();
  std::vector<std::vector<int32_t>> tables;
  for (size_t s = 0; s < prompts.size(); ++s) tables.push_back(BlockTable(static_cast<int>(s)));
  Batch together;
  for (size_t s = 0; s < prompts.size(); ++s) AddRow(prompts[s], 0, tables[s], &together);
  const auto expected = group.Forward(together);

  for (size_t s = 0; s < prompts.size(); ++s) {
    SCOPED_TRACE(s);
    const auto& prompt = prompts[s];
    EXPECT_EQ(RunRow(&group, prompt, 0, 15), expected[s]) << "alone";
    for (const size_t chunk : {1, 2, 3, 5, 7, 33, 64}) {
      std::vector<float> logits;
      for (size_t begin = 0; begin < prompt.size(); begin += chunk) {
        const size_t end = std::min(prompt.size(), begin + chunk);
        logits = RunRow(&group, Slice(prompt, begin, end), static_cast<int>(begin), 15);
      }
      EXPECT_EQ(logits, expected[s]) << "chunks of " << chunk;
    }
  }
}

TEST(Ernie45, PaddingRowsChangeNeitherAnotherRowNorABlock) {
  for (const int world_size : {1, 2}) {
    SCOPED_TRACE(world_size);
    Group plain({.world_size = world_size});
    Group padded({.world_size = world_size});
    const auto prompts = Prompts();
    std::vector<std::vector<int32_t>> tables;
    for (int s = 0; s < 3; ++s) tables.push_back(BlockTable(s));
    for (int step = 0; step < 4; ++step) {
      Batch batch;
      for (int s = 0; s < 3; ++s) {
        const int begin = step == 0 ? 0 : 19 + step;
        AddRow(Slice(prompts[s], begin, 20 + step), begin, tables[s], &batch);
      }
      const auto expected = plain.Forward(batch);
      batch.num_padding_rows = 5 - step;
      const auto got = padded.Forward(batch);
      ASSERT_EQ(got.size(), 3u + batch.num_padding_rows);
      for (int s = 0; s < 3; ++s) EXPECT_EQ(got[s], expected[s]) << "step " << step << " row " << s;
    }
    for (int rank = 0; rank < world_size; ++rank) {
      EXPECT_TRUE(padded.pool(rank) == plain.pool(rank)) << "rank " << rank;
    }
  }
}

// 230 tokens: three whole blocks and a part.
std::vector<int32_t> LongPrompt() {
  std::vector<int32_t> ids;
  for (const auto& prompt : Prompts()) ids.insert(ids.end(), prompt.begin(), prompt.end());
  CHECK(ids.size() >= 230);
  ids.resize(230);
  return ids;
}

TEST(Ernie45, ALongPromptHasTheSameBitsHoweverItIsChunked) {
  Group group({.max_batch_tokens = 512});
  const std::vector<int32_t> prompt = LongPrompt();
  const std::vector<float> expected = RunRow(&group, prompt, 0, /*sequence=*/0);
  for (const size_t chunk : {1, 7, 64, 100}) {
    SCOPED_TRACE(chunk);
    std::vector<float> logits;
    for (size_t begin = 0; begin < prompt.size(); begin += chunk) {
      const size_t end = std::min(prompt.size(), begin + chunk);
      logits = RunRow(&group, Slice(prompt, begin, end), static_cast<int>(begin), 1);
    }
    EXPECT_EQ(logits, expected);
  }
}

TEST(Ernie45, APrefixInTheBlocksOfAnotherSequenceGivesTheSameBits) {
  Group group({.max_batch_tokens = 512});
  const std::vector<int32_t> prompt = LongPrompt();
  const std::vector<float> expected = RunRow(&group, prompt, 0, /*sequence=*/0);
  const std::vector<int32_t> theirs = BlockTable(0);
  for (size_t num_shared = 1; num_shared <= 3; ++num_shared) {
    SCOPED_TRACE(num_shared);
    std::vector<int32_t> blocks = BlockTable(static_cast<int>(num_shared));
    std::copy_n(theirs.begin(), num_shared, blocks.begin());
    Batch batch;
    AddRow(Slice(prompt, num_shared * 64, prompt.size()), static_cast<int>(num_shared * 64), blocks,
           &batch);
    EXPECT_EQ(group.Forward(batch)[0], expected);
  }
}

TEST(Ernie45, ThreadsDoNotChangeBits) {
  const auto prompts = Prompts();
  std::vector<std::vector<float>> expected;
  for (const int threads : {1, 2, 3, 5}) {
    SCOPED_TRACE(threads);
    Group group({.num_threads = threads, .max_batch_tokens = 512});
    std::vector<std::vector<int32_t>> tables;
    for (size_t s = 0; s < prompts.size(); ++s) tables.push_back(BlockTable(static_cast<int>(s)));
    Batch batch;
    for (size_t s = 0; s < prompts.size(); ++s) AddRow(prompts[s], 0, tables[s], &batch);
    auto logits = group.Forward(batch);
    logits.push_back(RunRow(&group, {21}, static_cast<int>(prompts[0].size()), 0));
    if (expected.empty()) expected = logits;
    EXPECT_EQ(logits, expected);
  }
}

TEST(Ernie45, EverySimdTargetMatchesTheGoldens) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    Group group({});
    const auto& golden = Golden()["cases"][0];
    const std::vector<int32_t> prompt = golden["ids"];
    ExpectGoldenLogits(golden["logits"].back(), RunRow(&group, prompt, 0, 0));
    hwy::SetSupportedTargetsForTest(0);
  }
}

TEST(Ernie45, OnlyRowsThatWantLogitsGetThem) {
  Group group({});
  const auto prompts = Prompts();
  const auto first_table = BlockTable(0);
  const auto second_table = BlockTable(1);
  Batch batch;
  AddRow(prompts[0], 0, first_table, &batch);
  AddRow(prompts[1], 0, second_table, &batch);
  const auto both = group.Forward(batch);
  batch.rows[0].want_logits = false;
  const auto second = group.Forward(batch);
  ASSERT_EQ(second.size(), 1u);
  EXPECT_EQ(second[0], both[1]);
  batch.rows[1].want_logits = false;
  EXPECT_TRUE(group.Forward(batch).empty());
}

TEST(Ernie45, LogitsOfTokensAreThoseThatTheyHadWantedThemselves) {
  for (const int world_size : {1, 2}) {
    SCOPED_TRACE(world_size);
    Group group({.world_size = world_size, .max_batch_tokens = 512});
    const std::vector<int32_t> prompt = LongPrompt();
    std::vector<std::vector<float>> expected;  // token by token
    for (size_t i = 0; i < prompt.size(); ++i) {
      expected.push_back(RunRow(&group, {prompt[i]}, static_cast<int>(i), /*sequence=*/0));
    }
    // Behind another sequence's row, which wants its last token's.
    const std::vector<int32_t> other = Prompts()[0];
    const auto blocks = BlockTable(1);
    const auto other_blocks = BlockTable(2);
    Batch batch;
    AddRow(other, 0, other_blocks, &batch);
    AddRow(prompt, 0, blocks, &batch);
    const auto last = group.Forward(batch);
    EXPECT_EQ(last[1], expected.back());
    for (size_t begin = 0; begin + 1 < prompt.size(); begin += 64) {
      const size_t count = std::min<size_t>(64, prompt.size() - 1 - begin);
      const auto rows = group.TokenLogits(static_cast<int64_t>(other.size() + begin),
                                          static_cast<int64_t>(count));
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(rows[i], expected[begin + i]) << "position " << begin + i;
      }
    }
    EXPECT_EQ(group.Forward(batch), last);  // the next pass knows nothing of it
  }
}

TEST(Ernie45, DigestsTellLayoutsAndRoundingApart) {
  Group one({});
  Group two({.world_size = 2});
  EXPECT_NE(one.model().kv_layout_digest(), two.model().kv_layout_digest());
  EXPECT_EQ(one.model().weights_digest(), two.model().weights_digest());
  EXPECT_EQ(one.model().kv_block_bytes(), 2 * two.model().kv_block_bytes());
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    constexpr std::string_view kModel = "--model=";
    constexpr std::string_view kGolden = "--golden=";
    if (flag.starts_with(kModel)) {
      wintserve::model_dir = flag.substr(kModel.size());
    } else if (flag.starts_with(kGolden)) {
      wintserve::golden_file = flag.substr(kGolden.size());
    } else {
      CHECK(false, "unknown flag {}; allowed are --model=DIR and --golden=FILE", flag);
    }
  }
  return RUN_ALL_TESTS();
}
