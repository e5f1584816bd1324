#include "kernels/cpu/sampling.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "kernels/cpu/sampling_test_util.h"
#include "kernels/sampling/philox.h"

namespace wintserve::kernels::cpu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(UniformDraw, TakesSeedHalvesAsKeyAndTheUpper24BitsOfTheFirstWord) {
  const PhiloxCounter words = Philox4x32({17, 3, 0, 0}, {0x89abcdef, 0x81234567});
  EXPECT_EQ(UniformDraw(static_cast<int64_t>(0x8123456789abcdef), 17, 3),
            static_cast<float>(words[0] >> 8) / 16777216.0f);
}

int32_t MustSample(std::span<const float> logits, const SampleRequest& request) {
  Sampler sampler;
  const auto id = sampler.Sample(logits, request);
  EXPECT_TRUE(id.ok()) << id.status();
  return id.value_or(-1);
}

std::vector<float> LogitsOf(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)) + 3.0f);
  return logits;
}

TEST(Sampler, GreedyTakesTheLowestIdOfEqualLogits) {
  for (const size_t size : {1u, 7u, 16u, 40u, 1000u}) {
    std::vector<float> logits(size, -2.0f);
    EXPECT_EQ(MustSample(logits, {.temperature = 0}), 0) << size;
    logits[size - 1] = logits[size / 2] = 5.0f;
    EXPECT_EQ(MustSample(logits, {.temperature = 0}), size / 2) << size;
  }
}

TEST(Sampler, TemperatureSoSmallThatItOverflowsIsGreedy) {
  const std::vector<float> logits = {1, 3, 2};
  for (const float temperature : {1e-3f, 1e-38f, std::numeric_limits<float>::denorm_min()}) {
    for (uint32_t position = 0; position < 50; ++position) {
      ASSERT_EQ(MustSample(logits, {.temperature = temperature, .position = position}), 1);
    }
  }
}

struct Cut {
  const char* name;
  std::vector<double> probabilities;
  float temperature;
  float top_p;
  int32_t top_k;
  std::set<int32_t> expected;
  float min_p = 0;
};

class SamplerCut : public testing::TestWithParam<Cut> {};
TEST_P(SamplerCut, DrawsEachIdOfTheSetAndNoOther) {
  const std::vector<float> logits = LogitsOf(GetParam().probabilities);
  std::set<int32_t> seen;
  for (uint32_t position = 0; position < 2000; ++position) {
    seen.insert(MustSample(logits, {.temperature = GetParam().temperature,
                                    .top_p = GetParam().top_p,
                                    .top_k = GetParam().top_k,
                                    .seed = 42,
                                    .position = position,
                                    .min_p = GetParam().min_p}));
  }
  EXPECT_EQ(seen, GetParam().expected);
}
INSTANTIATE_TEST_SUITE_P(
    Sets, SamplerCut,
    testing::Values(
        Cut{"KeepsAll", {0.1, 0.2, 0.3, 0.4}, 1, 1, 0, {0, 1, 2, 3}},
        Cut{"TopK2", {0.1, 0.2, 0.3, 0.4}, 1, 1, 2, {2, 3}},
        Cut{"TopKBeyondTheVocabularyKeepsAll", {0.1, 0.2, 0.3, 0.4}, 1, 1, 9, {0, 1, 2, 3}},
        Cut{"TopKTieGoesToTheLowerIds", {0.2, 0.2, 0.2, 0.2, 0.2}, 1, 1, 2, {0, 1}},
        Cut{"TopPReachedExactly", {0.5, 0.3, 0.2}, 1, 0.8f, 0, {0, 1}},
        Cut{"TopPJustAboveTakesOneMore", {0.5, 0.3, 0.2}, 1, 0.81f, 0, {0, 1, 2}},
        Cut{"TopPBelowTheLargestKeepsOne", {0.2, 0.5, 0.3}, 1, 0.4f, 0, {1}},
        Cut{"TopPTiniestKeepsOne", {0.2, 0.5, 0.3}, 1, 1e-30f, 0, {1}},
        Cut{"TopPTieGoesToTheLowerIds", {0.25, 0.25, 0.25, 0.25}, 1, 0.5f, 0, {0, 1}},
        Cut{"TopPCountsAfterTopK", {0.4, 0.3, 0.2, 0.1}, 1, 0.5f, 2, {0}},
        Cut{"TopPWithinTopKNeedsBoth", {0.4, 0.3, 0.2, 0.1}, 1, 0.6f, 2, {0, 1}},
        Cut{"TemperatureComesBeforeTopP", {0.5, 0.3, 0.2}, 0.25f, 0.8f, 0, {0}},
        Cut{"TopPSpansBandsOfWeights", {0.9, 0.05, 0.03, 0.015, 0.005}, 1, 0.99f, 0, {0, 1, 2, 3}},
        Cut{"MinPCountsFromTheLargest", {0.1, 0.5, 0.15, 0.25}, 1, 1, 0, {1, 2, 3}, 0.29f},
        Cut{"MinPOfOneKeepsTheLargestOnly", {0.3, 0.2, 0.3, 0.2}, 1, 1, 0, {0, 2}, 1.0f},
        Cut{"TemperatureComesBeforeMinP", {0.5, 0.3, 0.2}, 0.25f, 1, 0, {0}, 0.5f},
        Cut{"TopKCountsAfterMinP", {0.4, 0.3, 0.2, 0.1}, 1, 1, 3, {0, 1}, 0.6f},
        Cut{"TopKWithinMinP", {0.4, 0.3, 0.2, 0.1}, 1, 1, 1, {0}, 0.6f},
        Cut{"TopPCountsAfterMinP", {0.4, 0.3, 0.2, 0.1}, 1, 0.5f, 0, {0}, 0.6f},
        Cut{"TopPAfterMinPNeedsMore", {0.4, 0.3, 0.2, 0.1}, 1, 0.6f, 0, {0, 1}, 0.6f}),
    [](const auto& info) { return info.param.name; });

// Every 24-bit grid point is as likely as any other, so the counts of many draws follow the
// probabilities. Chi-square with df degrees of freedom exceeds df + 5 sqrt(2 df) + 14 with
// probability below 1e-6 (Laurent and Massart's bound with x = 14); the seed is fixed anyway.
void ExpectDistribution(const std::vector<float>& logits, const SampleRequest& request,
                        const std::vector<double>& expected) {
  constexpr int kDraws = 200'000;
  std::vector<int> counts(expected.size());
  Sampler sampler;
  SampleRequest draw = request;
  for (int i = 0; i < kDraws; ++i) {
    draw.position = i;
    ++counts[*sampler.Sample(logits, draw)];
  }
  double chi_square = 0;
  int degrees = -1;
  for (size_t id = 0; id < expected.size(); ++id) {
    if (expected[id] == 0) {
      EXPECT_EQ(counts[id], 0) << id;
      continue;
    }
    ++degrees;
    const double mean = expected[id] * kDraws;
    chi_square += (counts[id] - mean) * (counts[id] - mean) / mean;
  }
  EXPECT_LT(chi_square, degrees + 2 * std::sqrt(14.0 * degrees) + 2 * 14);
}

TEST(Sampler, DrawsFollowTheSoftmaxInIdOrder) {
  const std::vector<double> p = {0.05, 0.4, 0.1, 0.25, 0.2};
  ExpectDistribution(LogitsOf(p), {.seed = 1}, p);
}

TEST(Sampler, DrawsFollowTheTemperedSoftmax) {
  // Temperature 0.5 squares the probabilities.
  ExpectDistribution(LogitsOf({0.5, 0.25, 0.25}), {.temperature = 0.5f, .seed = 2},
                     {4.0 / 6, 1.0 / 6, 1.0 / 6});
}

TEST(Sampler, DrawsFollowTheRenormalisedTopP) {
  ExpectDistribution(LogitsOf({0.1, 0.2, 0.4, 0.3}), {.top_p = 0.85f, .seed = 3},
                     {0, 0.2 / 0.9, 0.4 / 0.9, 0.3 / 0.9});
}

TEST(Sampler, DrawsFollowTheRenormalisedTopK) {
  ExpectDistribution(LogitsOf({0.1, 0.2, 0.4, 0.3}), {.top_k = 2, .seed = 4},
                     {0, 0, 0.4 / 0.7, 0.3 / 0.7});
}

TEST(Sampler, DrawsFollowALargeVocabulary) {
  constexpr size_t kVocabulary = 1111;  // several blocks and a ragged end
  const std::vector<float> logits = RandomLogits(kVocabulary, 1.0f, 5);
  std::vector<double> p(kVocabulary);
  double total = 0;
  for (size_t id = 0; id < kVocabulary; ++id) total += p[id] = std::exp(double{logits[id]});
  for (double& value : p) value /= total;
  ExpectDistribution(logits, {.seed = 6}, p);
}

TEST(Sampler, DrawsFollowTheRenormalisedMinP) {
  ExpectDistribution(LogitsOf({0.1, 0.2, 0.4, 0.3}), {.seed = 7, .min_p = 0.4f},
                     {0, 0.2 / 0.9, 0.4 / 0.9, 0.3 / 0.9});
}

TEST(Sampler, DrawsFollowEveryCutTogether) {
  // min_p leaves all but the last, top_k three of them, top_p 0.75 of those the first two.
  ExpectDistribution(LogitsOf({0.1, 0.2, 0.35, 0.3, 0.05}),
                     {.top_p = 0.75f, .top_k = 3, .seed = 8, .min_p = 0.2f},
                     {0, 0, 0.35 / 0.65, 0.3 / 0.65, 0});
}

TEST(Sampler, DrawsFollowPenaltiesAndBias) {
  // Logits log(p): presence and frequency divide a probability by exp of what they subtract, a
  // repetition penalty of 2 squares it, for it is below 1.
  const std::vector<double> p = {0.1, 0.2, 0.3, 0.4};
  std::vector<float> logits;
  for (const double value : p) logits.push_back(static_cast<float>(std::log(value)));
  const std::vector<TokenOccurrence> occurrences = {{0, 3}, {2, sampling::kInPrompt}};
  const std::vector<sampling::LogitBias> bias = {{1, 0.5f}};
  std::vector<double> expected = {0.1 * 0.1 * std::exp(-1.25), 0.2 * std::exp(0.5), 0.09, 0.4};
  const double total = std::accumulate(expected.begin(), expected.end(), 0.0);
  for (double& value : expected) value /= total;
  ExpectDistribution(logits,
                     {.seed = 9,
                      .logit_bias = bias,
                      .penalties = {.repetition = 2, .presence = 0.5f, .frequency = 0.25f},
                      .occurrences = occurrences},
                     expected);
}

TEST(Sampler, ABiasOf100DecidesEitherWay) {
  const std::vector<float> logits = {1, 3, 2, 3};
  const std::vector<sampling::LogitBias> bias = {{0, 100}, {1, -100}, {9, 50}};
  for (const float temperature : {0.0f, 1.0f}) {
    for (uint32_t position = 0; position < 100; ++position) {
      EXPECT_EQ(MustSample(logits,
                           {.temperature = temperature, .position = position, .logit_bias = bias}),
                0);
    }
  }
}

TEST(Sampler, ABannedIdIsNotDrawnUnlessItIsAllThatThereIs) {
  const std::vector<float> logits = {9, 1, 0};
  const std::vector<sampling::LogitBias> first = {{0, sampling::kBanned}};
  const std::vector<TokenOccurrence> often = {{.id = 0, .occurrence = 100}};
  for (uint32_t position = 0; position < 500; ++position) {
    for (const float temperature : {0.0f, 100.0f}) {
      EXPECT_NE(MustSample(logits, {.temperature = temperature,
                                    .position = position,
                                    .logit_bias = first,
                                    .penalties = {.repetition = 1e-30f, .frequency = -2},
                                    .occurrences = often}),
                0);
    }
  }
  EXPECT_EQ(MustSample(std::vector<float>{9}, {.logit_bias = first}), 0);
}

TEST(Sampler, PenaltiesDecideGreedyToo) {
  const std::vector<float> logits = {1, 3, 2.5f};
  const std::vector<TokenOccurrence> occurrences = {{1, 1}, {7, 1}};
  const auto greedy = [&](const sampling::Penalties& penalties) {
    return MustSample(logits,
                      {.temperature = 0, .penalties = penalties, .occurrences = occurrences});
  };
  EXPECT_EQ(greedy({}), 1);
  EXPECT_EQ(greedy({.repetition = 1.5f}), 2);
  EXPECT_EQ(greedy({.presence = 1}), 2);
  EXPECT_EQ(greedy({.frequency = 0.25f}), 1);
}

TEST(Sampler, EveryPathAgreesWithTheDefinition) {
  std::mt19937 random(11);
  Sampler sampler;
  int differences = 0;
  constexpr int kCases = 3000;
  for (uint32_t i = 0; i < kCases; ++i) {
    const TestRequest r = RandomTestRequest(1 + random() % 500, i, &random);
    const auto id = sampler.Sample(r.logits, r.Request());
    ASSERT_TRUE(id.ok());
    differences += *id != ReferenceSample(r) ? 1 : 0;
  }
  // A draw may fall between a float32 and a float64 boundary. Each of at most 500 boundaries is off
  // by less than 2^-22 of the mass: below 0.36 such draws are expected in all.
  EXPECT_LE(differences, 2);
}

TEST(Sampler, MassesAddUpAlikeInAnyOrderOfIds) {
  // With logits in falling order the CDF by id and the one by falling logit are the same, but they
  // are added up in different blocks and bands. The last id has no mass, so cutting it cuts
  // nothing.
  constexpr int kSize = 20'000;
  for (const float spread : {0.01f, 1.0f, 5.0f}) {
    std::vector<float> logits = RandomLogits(kSize, spread, 41);
    std::sort(logits.begin(), logits.end(), std::greater<>());
    logits.push_back(-1000);
    for (uint32_t position = 0; position < 100; ++position) {
      const int32_t by_id = MustSample(logits, {.position = position});
      EXPECT_EQ(MustSample(logits, {.position = position, .min_p = 1e-20f}), by_id);
      EXPECT_EQ(MustSample(logits, {.top_k = kSize, .position = position}), by_id);
    }
  }
}

TEST(Sampler, MinPKeepsWhatReachesItExactly) {
  const auto half = static_cast<float>(std::log(0.5));
  const std::vector<float> logits = {half, std::nextafter(half, -1.0f), 0};
  std::set<int32_t> seen;
  for (uint32_t position = 0; position < 1000; ++position) {
    seen.insert(MustSample(logits, {.position = position, .min_p = 0.5f}));
  }
  EXPECT_THAT(seen, ElementsAre(0, 2));
}

TEST(Sampler, TheOrderOfEqualWeightsIsThatOfTheirLogits) {
  // At this temperature every weight is 1 to the last bit.
  const std::vector<float> logits = {1, 4, 2, 3};
  std::set<int32_t> top_k;
  std::set<int32_t> top_p;
  for (uint32_t position = 0; position < 200; ++position) {
    top_k.insert(MustSample(logits, {.temperature = 1e30f, .top_k = 2, .position = position}));
    top_p.insert(MustSample(logits, {.temperature = 1e30f, .top_p = 0.5f, .position = position}));
  }
  EXPECT_THAT(top_k, ElementsAre(1, 3));
  EXPECT_THAT(top_p, ElementsAre(1, 3));
}

TEST(Sampler, ADrawDoesNotDependOnWhatWasDrawnBefore) {
  const std::vector<float> logits = RandomLogits(5000, 2, 21);
  const std::vector<float> other = RandomLogits(9000, 5, 22);
  Sampler shared;
  for (uint32_t position = 0; position < 200; ++position) {
    const SampleRequest request = {.temperature = 0.9f,
                                   .top_p = position % 2 == 0 ? 0.9f : 1.0f,
                                   .top_k = position % 3 == 0 ? 40 : 0,
                                   .seed = -5,
                                   .position = position,
                                   .choice_index = 2};
    ASSERT_TRUE(shared.Sample(other, {.top_p = 0.5f, .position = position}).ok());
    EXPECT_EQ(*shared.Sample(logits, request), MustSample(logits, request));
  }
}

TEST(Sampler, ChoicesAndSeedsOfOneRequestDiffer) {
  const std::vector<float> logits(10'000, 0.0f);
  std::set<int32_t> ids;
  for (uint32_t choice = 0; choice < 8; ++choice) {
    ids.insert(MustSample(logits, {.seed = 7, .position = 3, .choice_index = choice}));
    ids.insert(MustSample(logits, {.seed = 8 + choice, .position = 3}));
    ids.insert(MustSample(logits, {.seed = (1 + int64_t{choice}) << 40, .position = 3}));
  }
  EXPECT_EQ(ids.size(), 24u);
}

TEST(Sampler, TokensBeyondTheSpanAreNeverDrawn) {
  std::vector<float> logits(300, 0.0f);
  std::fill(logits.begin() + 200, logits.end(), 50.0f);
  const std::span<const float> sampled = std::span(logits).first(200);
  for (uint32_t position = 0; position < 500; ++position) {
    for (const float top_p : {1.0f, 0.9f}) {
      ASSERT_LT(MustSample(sampled, {.top_p = top_p, .position = position}), 200);
    }
    ASSERT_LT(MustSample(sampled, {.top_k = 150, .position = position}), 200);
  }
  EXPECT_EQ(MustSample(sampled, {.temperature = 0}), 0);
}

TEST(Sampler, MaskedIdsDropOutAsIfTheVocabularyDidNotHaveThem) {
  std::mt19937 random(31);
  for (uint32_t i = 0; i < 500; ++i) {
    const size_t size = 2 + random() % 400;
    const std::vector<float> logits = RandomLogits(size, 2, random());
    std::vector<int32_t> masked;
    std::vector<int32_t> kept;
    for (int32_t id = 0; id < std::ssize(logits); ++id) {
      (random() % 8 == 0 ? masked : kept).push_back(id);
    }
    if (kept.empty()) continue;
    std::vector<float> kept_logits;
    for (const int32_t id : kept) kept_logits.push_back(logits[id]);
    masked.push_back(static_cast<int32_t>(size) + 5);  // no id of these logits
    SampleRequest request = {.temperature = i % 4 == 0 ? 0.0f : 0.8f,
                             .top_p = i % 3 == 0 ? 0.9f : 1.0f,
                             .top_k = i % 5 == 0 ? 7 : 0,
                             .seed = 9,
                             .position = i};
    const int32_t expected = kept[MustSample(kept_logits, request)];
    request.masked_ids = masked;
    ASSERT_EQ(MustSample(logits, request), expected) << i;
  }
}

TEST(Sampler, AMaskedIdIsNotDrawnHoweverLikelyItIsOrHotTheDraw) {
  const std::vector<float> logits = {0, 100, 0, 99, 0};
  const std::vector<int32_t> masked = {1, 3};
  for (const float temperature : {0.0f, 1.0f, 1e38f}) {
    for (uint32_t position = 0; position < 200; ++position) {
      const int32_t id = MustSample(
          logits, {.temperature = temperature, .position = position, .masked_ids = masked});
      ASSERT_TRUE(id == 0 || id == 2 || id == 4) << id;
    }
  }
}

TEST(Sampler, AMaskOfEveryIdCountsForNothing) {
  const std::vector<float> logits = {1, 3, 2};
  const std::vector<int32_t> all = {0, 1, 2};
  EXPECT_EQ(MustSample(logits, {.temperature = 0, .masked_ids = all}), 1);
  for (uint32_t position = 0; position < 50; ++position) {
    EXPECT_EQ(MustSample(logits, {.position = position, .masked_ids = all}),
              MustSample(logits, {.position = position}));
  }
}

TEST(Sampler, AMaskedLogitThatIsNotFiniteIsAnErrorAllTheSame) {
  const std::vector<float> logits = {1, std::numeric_limits<float>::quiet_NaN(), 2};
  const std::vector<int32_t> masked = {1};
  Sampler sampler;
  EXPECT_EQ(sampler.Sample(logits, {.masked_ids = masked}).status().message(),
            "the logit of token 1 is nan");
}

TEST(Sampler, ALogitThatIsNotFiniteIsAnErrorThatNamesTheToken) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const size_t id : {0u, 5u, 30u, 99u}) {
      std::vector<float> logits(100, 1.0f);
      logits[id] = bad;
      for (const SampleRequest& request :
           {SampleRequest{.temperature = 0}, SampleRequest{}, SampleRequest{.top_k = 3}}) {
        Sampler sampler;
        const absl::Status status = sampler.Sample(logits, request).status();
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
        EXPECT_THAT(status.message(), HasSubstr(fmt::format("token {} is {}", id, bad)));
      }
    }
  }
}

TEST(Sampler, LogitsAtTheEdgesOfFloatAreNoProblem) {
  constexpr float kHuge = std::numeric_limits<float>::max();
  const std::vector<float> logits = {-kHuge, kHuge, -kHuge, 0};
  for (const SampleRequest& request :
       {SampleRequest{.temperature = 0}, SampleRequest{}, SampleRequest{.top_p = 0.99f},
        SampleRequest{.top_k = 3}, SampleRequest{.temperature = 1e-30f, .top_p = 0.5f}}) {
    EXPECT_EQ(MustSample(logits, request), 1);
  }
}

}  // namespace
}  // namespace wintserve::kernels::cpu
