#include "kernels/sampling/definition.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/sampling/philox.h"

namespace wintserve::kernels::sampling {
namespace {

struct PhiloxVector {
  const char* name;
  PhiloxCounter counter;
  PhiloxKey key;
  PhiloxCounter expected;
};

// The known answers that the generator's authors publish.
class Philox : public testing::TestWithParam<PhiloxVector> {};
TEST_P(Philox, GivesThePublishedAnswer) {
  EXPECT_EQ(Philox4x32(GetParam().counter, GetParam().key), GetParam().expected);
}
INSTANTIATE_TEST_SUITE_P(
    KnownAnswers, Philox,
    testing::Values(PhiloxVector{"Zeros",
                                 {0, 0, 0, 0},
                                 {0, 0},
                                 {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                    PhiloxVector{"Ones",
                                 {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                                 {0xffffffff, 0xffffffff},
                                 {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                    PhiloxVector{"DigitsOfPi",
                                 {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                                 {0xa4093822, 0x299f31d0},
                                 {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}),
    [](const auto& info) { return info.param.name; });

float RandomFiniteFloat(std::mt19937* random) {
  while (true) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>((*random)()));
    if (std::isfinite(value)) return value;
  }
}

TEST(FallingKey, SortsByFallingLogitThenByRisingId) {
  std::mt19937 random(1);
  std::vector<float> logits = {0.0f,
                               -0.0f,
                               1.0f,
                               -1.0f,
                               FLT_MAX,
                               -FLT_MAX,
                               std::numeric_limits<float>::denorm_min(),
                               -std::numeric_limits<float>::denorm_min(),
                               -std::numeric_limits<float>::infinity()};
  for (int i = 0; i < 500; ++i) logits.push_back(RandomFiniteFloat(&random));
  for (size_t a = 0; a < logits.size(); ++a) {
    for (size_t b = 0; b < logits.size(); ++b) {
      const bool before = logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
      const Candidate first = CandidateOf(FallingKey(logits[a]), static_cast<uint32_t>(a));
      const Candidate second = CandidateOf(FallingKey(logits[b]), static_cast<uint32_t>(b));
      ASSERT_EQ(first < second, before) << logits[a] << " " << logits[b];
    }
    const Candidate candidate = CandidateOf(FallingKey(logits[a]), static_cast<uint32_t>(a));
    EXPECT_EQ(LogitOf(candidate), logits[a]);
    EXPECT_EQ(IdOf(candidate), static_cast<int32_t>(a));
  }
}

TEST(Weight, IsWithinTwoUlpOfTheExponential) {
  for (uint32_t bits = std::bit_cast<uint32_t>(-0.0f);
       bits <= std::bit_cast<uint32_t>(kMinScaledLogit); bits += 997) {
    const auto x = std::bit_cast<float>(bits);
    const double expected = std::exp(double{x});
    ASSERT_LE(std::fabs(Weight(x, kMinScaledLogit) - expected), expected * 0x1p-22) << x;
  }
  EXPECT_EQ(Weight(0.0f, kMinScaledLogit), 1.0f);
  EXPECT_EQ(Weight(-0.0f, 0.0f), 1.0f);
}

TEST(Weight, IsNoneBelowTheLeastScaledLogit) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float below = std::nextafter(kMinScaledLogit, -kInfinity);
  for (const float x : {below, -87.0f, -1e30f, -FLT_MAX, -kInfinity}) {
    EXPECT_EQ(Weight(x, kMinScaledLogit), 0.0f) << x;
  }
  EXPECT_EQ(Mass(Weight(kMinScaledLogit, kMinScaledLogit)), 1u);
  EXPECT_GT(Weight(-0.5f, -0.5f), 0.0f);
  EXPECT_EQ(Weight(std::nextafter(-0.5f, -1.0f), -0.5f), 0.0f);
}

TEST(Mass, IsTheWeightInUnitsRoundedToTheNearestEven) {
  EXPECT_EQ(Mass(1.0f), uint64_t{1} << kMassBits);
  EXPECT_EQ(Mass(0.0f), 0u);
  EXPECT_EQ(Mass(0x1p-46f), 1u);
  EXPECT_EQ(Mass(0.5f * 0x1p-46f), 0u);
  EXPECT_EQ(Mass(1.5f * 0x1p-46f), 2u);
  EXPECT_EQ(Mass(2.5f * 0x1p-46f), 2u);
  std::mt19937 random(2);
  for (int i = 0; i < 100'000; ++i) {
    const float weight = std::exp(-40.0f * static_cast<float>(random()) * 0x1p-32f);
    ASSERT_EQ(Mass(weight), static_cast<uint64_t>(std::nearbyint(double{weight} * 0x1p46)));
  }
}

TEST(Mass, OfALargestVocabularyFitsInto63Bits) {
  static_assert(kMaxVocabulary * (uint64_t{1} << kMassBits) <= uint64_t{1} << 63);
}

TEST(TargetMass, IsTheExactFloorOfTheFraction) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 100'000; ++i) {
    const auto bits = static_cast<uint32_t>(random() >> 40);
    const uint64_t total = std::max<uint64_t>(1, random() >> (1 + random() % 60));
    const auto expected = static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * total >> 24);
    ASSERT_EQ(TargetMass(bits, total), expected) << bits << " " << total;
    ASSERT_LT(TargetMass(bits, total), total);
  }
  EXPECT_EQ(TargetMass(0, 5), 0u);
  EXPECT_EQ(TargetMass(0xffffff, 1), 0u);
}

TEST(EnoughMass, IsAtLeastOneUnitAndAtMostAll) {
  for (const uint64_t total :
       {uint64_t{1}, uint64_t{3}, uint64_t{1} << 46, (uint64_t{1} << 63) - 1}) {
    for (const float top_p : {std::numeric_limits<float>::denorm_min(), 1e-6f, 0.25f, 0.8f,
                              std::nextafter(1.0f, 0.0f)}) {
      const uint64_t enough = EnoughMass(top_p, total);
      EXPECT_GE(enough, 1u) << top_p << " " << total;
      EXPECT_LE(enough, total) << top_p << " " << total;
    }
  }
  EXPECT_EQ(EnoughMass(0.5f, uint64_t{1} << 46), (uint64_t{1} << 45) - (uint64_t{1} << 25));
}

TEST(MinScaledLogit, IsTheLogarithmOfMinP) {
  EXPECT_EQ(MinScaledLogit(0.0f), kMinScaledLogit);
  EXPECT_EQ(MinScaledLogit(1e-30f), kMinScaledLogit);
  EXPECT_EQ(MinScaledLogit(1.0f), 0.0f);
  EXPECT_EQ(MinScaledLogit(0.5f), static_cast<float>(std::log(0.5)));
}

struct PenaltyCase {
  const char* name;
  float logit;
  float bias;
  Occurrence occurrence;
  Penalties penalties;
  float expected;
};

class ProcessedLogitCase : public testing::TestWithParam<PenaltyCase> {};
TEST_P(ProcessedLogitCase, HasTheValueOfTheDefinition) {
  const PenaltyCase& p = GetParam();
  EXPECT_EQ(ProcessedLogit(p.logit, p.bias, p.occurrence, p.penalties), p.expected);
}
constexpr Penalties kAll = {.repetition = 2, .presence = 0.5f, .frequency = 0.25f};
INSTANTIATE_TEST_SUITE_P(
    Table, ProcessedLogitCase,
    testing::Values(
        PenaltyCase{"NothingHappensToAnIdThatDoesNotOccur", 3, 0, 0, kAll, 3},
        PenaltyCase{"ABiasIsAdded", 3, -1.5f, 0, kAll, 1.5f},
        PenaltyCase{"RepetitionDividesAPositiveLogit", 3, 0, kInPrompt, kAll, 1.5f},
        PenaltyCase{"RepetitionMultipliesANegativeLogit", -3, 0, kInPrompt, kAll, -6},
        PenaltyCase{"TheBiasComesBeforeRepetition", 3, -4, kInPrompt, kAll, -2},
        PenaltyCase{"FrequencyCountsGeneratedTokens", 3, 0, 4, {.frequency = 0.25f}, 2},
        PenaltyCase{"PresenceDoesNotCount", 3, 0, 4, {.presence = 0.5f}, 2.5f},
        PenaltyCase{
            "NeitherCountsThePrompt", 3, 0, kInPrompt, {.presence = 0.5f, .frequency = 0.25f}, 3},
        PenaltyCase{"PromptAndGeneratedTogether", 3, 0, kInPrompt + 2, kAll, 0.5f},
        PenaltyCase{
            "NegativePenaltiesReward", 3, 0, 2, {.presence = -0.5f, .frequency = -0.25f}, 4},
        PenaltyCase{"BeyondTheRangeIsTheLargest", 1e30f, 0, 1, {.repetition = 1e-30f}, FLT_MAX},
        PenaltyCase{"BeyondTheRangeIsTheLowest", -1e30f, 0, 1, {.repetition = 1e30f}, -FLT_MAX},
        PenaltyCase{"ABannedIdIsTheLowest", 1e30f, kBanned, 0, kAll, -FLT_MAX},
        PenaltyCase{"RewardsDoNotSaveABannedId",
                    1e30f,
                    kBanned,
                    kInPrompt + 7,
                    {.repetition = 1e-30f, .presence = -2, .frequency = -2},
                    -FLT_MAX}),
    [](const auto& info) { return info.param.name; });

TEST(LogProbability, IsTheLogarithmOfTheSoftmax) {
  const uint64_t total = Mass(1.0f) + Mass(0.5f) + Mass(0.5f);
  EXPECT_FLOAT_EQ(LogProbability(7, 7, total), static_cast<float>(std::log(0.5)));
  EXPECT_FLOAT_EQ(LogProbability(-1e30f, 7, total), -1e30f);
}

}  // namespace
}  // namespace wintserve::kernels::sampling
