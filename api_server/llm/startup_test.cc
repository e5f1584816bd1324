#include "api_server/llm/startup.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "tests/fakes/fake_worker.h"

namespace wintserve {
namespace {

StartupConfig Config() {
  return {.world_size = 2,
          .max_model_len = 2048,
          .max_num_seqs = 16,
          .max_num_batched_tokens = 256,
          .block_size_tokens = 64,
          .tokenizer_vocab_size = 900,
          .stop_ids = {2, 950, 7},
          .model_digest = "abc",
          .host_bytes = 123};
}

TEST(GroupStartup, ThePoolSpecNamesWhatMakesKvComparable) {
  GroupStartup startup(Config());
  ASSERT_TRUE(startup.OnHello(FakeHello(0, 2)).ok());
  ASSERT_TRUE(startup.OnHello(FakeHello(1, 2)).ok());
  const PoolSpec spec = *startup.pool_spec();
  EXPECT_EQ(spec.num_blocks, 16u * 32);
  EXPECT_EQ(spec.host_bytes, 123u);
  EXPECT_EQ(spec.block_size_tokens, 64);
  EXPECT_FALSE(spec.resume_only);
  EXPECT_EQ(spec.root_seed,
            "weights=0000000000000007 kv_layout=0000000000000008 block_tokens=64 ranks=2 "
            "model=abc");
}

TEST(GroupStartup, WithoutChunkedPrefillTheWorkersTakeTheLongestPromptWhole) {
  StartupConfig config = Config();
  config.chunked_prefill = false;
  GroupStartup startup(config);
  WorkerHello hello = FakeHello(0, 2);
  hello.max_position = 1000;
  ASSERT_TRUE(startup.OnHello(hello).ok());
  ASSERT_TRUE(startup.OnHello(FakeHello(1, 2)).ok());
  const ConfigureWorker configure = startup.configuration(/*group_epoch=*/5);
  EXPECT_EQ(configure.max_sequence_tokens, 1000u);
  EXPECT_EQ(configure.max_tokens, 1000u);
  EXPECT_EQ(configure.max_slots, 16u);
  EXPECT_EQ(configure.sampled_vocab_size, 900u);  // the tokenizer's, not the model's 1000
  EXPECT_EQ(configure.group_epoch, 5u);
  EXPECT_THAT(configure.stop_ids, testing::ElementsAre(2, 7));  // 950 is never sampled
}

TEST(GroupStartup, WithChunkedPrefillTheBudgetIsTheMost) {
  GroupStartup startup(Config());
  ASSERT_TRUE(startup.OnHello(FakeHello(0, 2)).ok());
  ASSERT_TRUE(startup.OnHello(FakeHello(1, 2)).ok());
  EXPECT_EQ(startup.configuration(/*group_epoch=*/5).max_tokens, 256u);
}

TEST(GroupStartup, SizesThePoolByTheMemoryThatTheWorkersHaveFound) {
  GroupStartup startup(Config());
  WorkerHello hello = FakeHello(1, 2);
  hello.kv_bytes_available = uint64_t{4} * 100 * 2 * hello.kv_block_bytes;
  ASSERT_TRUE(startup.OnHello(FakeHello(0, 2)).ok());
  ASSERT_TRUE(startup.OnHello(hello).ok());
  EXPECT_EQ(startup.pool_spec()->num_blocks, 100u);
}

// Its measurement has the pool beside it, that is to be replaced.
TEST(GroupStartup, AReplacementDoesNotShrinkThePool) {
  GroupStartup startup(Config());
  WorkerHello hello = FakeHello(1, 2);
  hello.kv_bytes_available = uint64_t{4} * 100 * 2 * hello.kv_block_bytes;
  ASSERT_TRUE(startup.OnHello(FakeHello(0, 2)).ok());
  ASSERT_TRUE(startup.OnHello(hello).ok());
  hello.kv_bytes_available /= 2;
  ASSERT_TRUE(startup.OnHello(hello).ok());
  EXPECT_EQ(startup.pool_spec()->num_blocks, 100u);
}

// The checkpoint may have been exchanged meanwhile. With one rank nobody else is there to compare.
TEST(GroupStartup, AReplacementHasTheModelOfTheProcessBeforeIt) {
  const struct {
    std::function<void(WorkerHello*)> change;
    const char* error;
  } cases[] = {
      {[](auto* h) { ++h->weights_digest; }, "weights_digest 8, it was 7"},
      {[](auto* h) { ++h->kv_layout_digest; }, "kv_layout_digest 9, it was 8"},
      {[](auto* h) { h->kv_block_bytes *= 2; }, "kv_block_bytes 2000, it was 1000"},
      {[](auto* h) { --h->vocab_size; }, "vocab_size 3e7, it was 3e8"},
      {[](auto* h) { --h->max_position; }, "max_position 1fff, it was 2000"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.error);
    StartupConfig config = Config();
    config.world_size = 1;
    GroupStartup startup(config);
    WorkerHello hello = FakeHello(0, 1);
    ASSERT_TRUE(startup.OnHello(hello).ok());
    ASSERT_TRUE(startup.OnHello(hello).ok());
    c.change(&hello);
    const absl::Status status = startup.OnHello(hello);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()),
                testing::HasSubstr("engine worker 0: came back with another model"));
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(c.error));
  }
}

struct UnfitWorker {
  const char* name;
  std::function<void(WorkerHello*)> spoil;
  const char* error;
};

class UnfitWorkerTest : public testing::TestWithParam<UnfitWorker> {};

TEST_P(UnfitWorkerTest, IsRefusedByTheFlagThatItDoesNotMeet) {
  GroupStartup startup(Config());
  WorkerHello hello = FakeHello(1, 2);
  GetParam().spoil(&hello);
  const absl::Status status = startup.OnHello(hello);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, UnfitWorkerTest,
    testing::Values(
        UnfitWorker{"NoVocabulary", [](auto* h) { h->vocab_size = 0; },
                    "engine worker 1: vocab_size 0"},
        UnfitWorker{"NoBlockBytes", [](auto* h) { h->kv_block_bytes = 0; }, "kv_block_bytes 0"},
        UnfitWorker{"OtherBlockSize", [](auto* h) { h->block_size_tokens = 16; },
                    "its KV blocks hold 16 tokens, --block-size is 64"},
        UnfitWorker{"FewSlots", [](auto* h) { h->max_slots = 8; },
                    "holds 8 sequences, --max-num-seqs is 16"},
        UnfitWorker{"FewTokens", [](auto* h) { h->max_tokens = 128; },
                    "runs 128 tokens in a step, --max-num-batched-tokens 256 asks for 256"}),
    [](const auto& info) { return info.param.name; });

TEST(GroupStartup, RefusesAWorkerThatCannotTakeAWholePrompt) {
  StartupConfig config = Config();
  config.chunked_prefill = false;
  GroupStartup startup(config);
  WorkerHello hello = FakeHello(1, 2);
  hello.max_tokens = 1024;
  EXPECT_THAT(std::string(startup.OnHello(hello).message()),
              testing::HasSubstr("runs 1024 tokens in a step, without chunked prefill, "
                                 "--max-num-batched-tokens 256 and --max-model-len 2048 ask for "
                                 "2048"));
}

}  // namespace
}  // namespace wintserve
