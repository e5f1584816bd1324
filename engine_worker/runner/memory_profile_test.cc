#include "engine_worker/runner/memory_profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve {
namespace {

constexpr int64_t kGib = int64_t{1} << 30;

// Of 100 GiB 90 may be used and 70 are.
MemoryProfile Profile() {
  return {.total = 100 * kGib,
          .utilization = 0.9,
          .other = kGib,
          .weights = 60 * kGib,
          .workspace = 4 * kGib,
          .scratch = 3 * kGib,
          .graphs = 2 * kGib};
}

// A sequence needs 5 blocks of 1 GiB.
KvDemand Demand() { return {.block_bytes = kGib, .max_model_len = 257}; }

TEST(MemoryProfile, KvBlocksGetWhatIsLeftOfTheAllowedShare) {
  EXPECT_EQ(KvBytes(Profile(), Demand()), 20 * kGib);
  EXPECT_TRUE(CheckKvFits(Profile(), Demand()).ok());
  EXPECT_TRUE(CheckWeightsFit(Profile()).ok());
}

TEST(MemoryProfile, AnOverrideMayTakeAllThatIsLeft) {
  KvDemand demand = Demand();
  demand.num_blocks_override = 30;
  EXPECT_EQ(KvBytes(Profile(), demand), 30 * kGib);
  EXPECT_TRUE(CheckKvFits(Profile(), demand).ok());
  demand.num_blocks_override = 31;
  demand.has_8_bit_cache = true;
  EXPECT_EQ(CheckKvFits(Profile(), demand).message(),
            "--num-gpu-blocks-override 31 does not fit: blocks of 1048576 KiB, 70.00 GiB of 100.00 "
            "GiB are taken (weights 60.00 GiB, workspace 4.00 GiB, scratch 3.00 GiB, CUDA graphs "
            "2.00 GiB, others 1.00 GiB): 1.00 GiB too much; lower it, lower "
            "--max-num-batched-tokens or --max-num-seqs, or use more ranks "
            "(--tensor-parallel-size)");
}

TEST(MemoryProfile, TooLittleForASequenceSaysByHowMuchAndWhatToChange) {
  MemoryProfile profile = Profile();
  profile.weights += 15 * kGib;
  EXPECT_TRUE(CheckKvFits(profile, Demand()).ok());  // exactly
  profile.weights += kGib / 2;
  const absl::Status status = CheckKvFits(profile, Demand());
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_EQ(status.message(),
            "no room for the KV cache of one sequence of --max-model-len 257, 5.00 GiB: "
            "--gpu-memory-utilization 0.9 of 100.00 GiB allows 90.00 GiB, of which 85.50 GiB are "
            "taken (weights 75.50 GiB, workspace 4.00 GiB, scratch 3.00 GiB, CUDA graphs 2.00 GiB, "
            "others 1.00 GiB): 0.50 GiB too little; raise --gpu-memory-utilization, lower "
            "--max-model-len, lower --max-num-batched-tokens or --max-num-seqs, set "
            "--kv-cache-dtype int8, or use more ranks (--tensor-parallel-size)");
}

TEST(MemoryProfile, WeightsThatDoNotFitAreToldBeforeTheyAreLoaded) {
  MemoryProfile profile = {.total = 80 * kGib, .utilization = 0.92, .other = kGib / 2};
  profile.weights = 87 * kGib;
  EXPECT_EQ(CheckWeightsFit(profile).message(),
            "the model's weights do not fit: 87.00 GiB a rank beside 0.50 GiB that is taken "
            "already, --gpu-memory-utilization 0.92 of 80.00 GiB allows 73.60 GiB: 13.90 GiB too "
            "much; use more ranks (--tensor-parallel-size) or raise --gpu-memory-utilization");
  profile.weights = 73 * kGib;
  EXPECT_TRUE(CheckWeightsFit(profile).ok());
}

TEST(MemoryProfile, StepsThatDoNotFitSayWhatMakesThemSmaller) {
  const absl::Status status =
      ExplainStepsThatDoNotFit(absl::ResourceExhaustedError("allocating 77 bytes"), Profile());
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_EQ(status.message(),
            "the largest step does not fit on the device beside weights 60.00 GiB, workspace 4.00 "
            "GiB, others 1.00 GiB of 100.00 GiB: allocating 77 bytes; lower "
            "--max-num-batched-tokens or --max-num-seqs, or use more ranks "
            "(--tensor-parallel-size)");
  EXPECT_TRUE(ExplainStepsThatDoNotFit(absl::OkStatus(), Profile()).ok());
  const absl::Status other = absl::InternalError("a fault");
  EXPECT_EQ(ExplainStepsThatDoNotFit(other, Profile()), other);
}

// Where the least that operators take is more than what is free, it is an error whatever is asked.
TEST(MemoryProfile, MoreTakenThanThereIsFitsNoDemand) {
  MemoryProfile profile = Profile();
  profile.scratch = profile.total - profile.other - profile.weights - profile.workspace + 1;
  for (const double utilization : {0.1, 0.9, 1.0}) {
    profile.utilization = utilization;
    KvDemand demand = {.block_bytes = 1, .max_model_len = 1};
    EXPECT_FALSE(CheckKvFits(profile, demand).ok());
    demand.num_blocks_override = 1;
    EXPECT_FALSE(CheckKvFits(profile, demand).ok());
  }
}

TEST(MemoryProfile, AGroupOfRanksTakesItsPart) {
  MemoryProfile profile = Profile();
  profile.group = 16 * kGib;
  EXPECT_EQ(KvBytes(profile, Demand()), 4 * kGib);
  EXPECT_THAT(
      CheckKvFits(profile, Demand()).message(),
      testing::HasSubstr("CUDA graphs 2.00 GiB, group of ranks 16.00 GiB, others 1.00 GiB"));
  EXPECT_THAT(DescribeMemory(profile, Demand()),
              testing::Contains("memory: 16.00 GiB kept for the group of ranks"));
}

TEST(MemoryProfile, TheLogSaysWhatTheMemoryGoesTo) {
  EXPECT_THAT(
      DescribeMemory(Profile(), Demand()),
      testing::ElementsAre(
          "memory: 100.00 GiB of the device, --gpu-memory-utilization 0.9 of "
          "100.00 GiB allows 90.00 GiB",
          "memory: 1.00 GiB taken before (driver, other processes)", "memory: 60.00 GiB weights",
          "memory: 4.00 GiB workspace of the largest step",
          "memory: 3.00 GiB scratch of its operators", "memory: 2.00 GiB kept for CUDA graphs",
          "memory: 20.00 GiB left for KV blocks, 20 of 1048576 KiB"));
}

}  // namespace
}  // namespace wintserve
