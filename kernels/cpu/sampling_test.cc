#include "kernels/cpu/sampling.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "kernels/cpu/philox.h"

namespace wintserve::kernels::cpu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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

std::vector<float> RandomLogits(size_t size, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
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
                                    .position = position}));
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
        Cut{"TopPSpansBandsOfWeights", {0.9, 0.05, 0.03, 0.015, 0.005}, 1, 0.99f, 0, {0, 1, 2, 3}}),
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

// The definition, the slow way. Weights as double.
int32_t Reference(const std::vector<float>& logits, const SampleRequest& request) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const bool cut = request.top_p < 1 || (request.top_k > 0 && request.top_k < std::ssize(logits));
  if (cut) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    if (request.top_k > 0 && request.top_k < std::ssize(order)) order.resize(request.top_k);
  }
  const float maximum = *std::max_element(logits.begin(), logits.end());
  const auto weight = [&](int32_t id) {
    return std::exp((double{logits[id]} - maximum) / request.temperature);
  };
  double total = 0;
  for (const int32_t id : order) total += weight(id);
  if (request.top_p < 1) {
    double mass = 0;
    size_t kept = 0;
    while (mass < (request.top_p - 0x1p-21) * total) mass += weight(order[kept++]);
    order.resize(kept);
    total = mass;
  }
  const double target = total * UniformDraw(request.seed, request.position, request.choice_index);
  double mass = 0;
  for (const int32_t id : order) {
    mass += weight(id);
    if (mass > target) return id;
  }
  return order.back();
}

TEST(Sampler, EveryPathAgreesWithTheDefinition) {
  std::mt19937 random(11);
  Sampler sampler;
  int differences = 0;
  constexpr int kCases = 3000;
  for (int i = 0; i < kCases; ++i) {
    const size_t size = 1 + random() % 500;
    const float spread = 0.1f * static_cast<float>(1 + random() % 60);
    std::vector<float> logits = RandomLogits(size, spread, random());
    // On a grid logits are equal or clearly different, so float32 weights keep their order. The
    // coarse grid makes many ties.
    const float grid = i % 5 == 0 ? 1.0f : 64.0f;
    for (float& logit : logits) logit = std::round(logit * grid) / grid;
    constexpr float kTopP[] = {1.0f, 0.95f, 0.7f, 0.2f};
    const int32_t top_ks[] = {0, 0, 1, 5, 50, static_cast<int32_t>(size / 2)};
    const SampleRequest request = {.temperature = 0.3f + 0.1f * static_cast<float>(random() % 15),
                                   .top_p = kTopP[random() % 4],
                                   .top_k = top_ks[random() % 6],
                                   .seed = static_cast<int64_t>(random()),
                                   .position = static_cast<uint32_t>(i)};
    const auto id = sampler.Sample(logits, request);
    ASSERT_TRUE(id.ok());
    differences += *id != Reference(logits, request);
  }
  // A draw may fall between a float32 and a float64 boundary. Each of at most 500 boundaries is off
  // by less than 2^-22 of the mass: below 0.36 such draws are expected in all.
  EXPECT_LE(differences, 2);
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
