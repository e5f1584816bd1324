#include "engine_worker/weights/k_order.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/formats/wint2.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr int64_t kHidden = 128;
constexpr int64_t kWidth = 256;

HostMatrix RandomWint2(int64_t k, int64_t n, std::mt19937& rng) {
  HostMatrix matrix = formats::MakeHostMatrix(formats::WeightFormat::kWint2, k, n);
  for (uint8_t& code : matrix.codes_u8) code = static_cast<uint8_t>(rng());
  for (uint8_t& scale : matrix.local_scale) scale = 8;
  for (int64_t i = 0; i < n; ++i) {
    matrix.channel_scale[i] = 1e-3f;
    matrix.code_scale[i] = 120.961f;
    matrix.code_zp[i] = 1240;
  }
  return matrix;
}

// Makes a matrix whose row i in true order has gain[i], stored in `order`: for every byte the
// candidate that serves its four gains best.
void FitRows(const std::vector<double>& gain, KOrder order, std::mt19937& rng, HostMatrix& matrix) {
  std::normal_distribution<double> normal;
  for (int64_t byte_row = 0; byte_row < matrix.k / 4; ++byte_row) {
    for (int64_t column = 0; column < matrix.n; ++column) {
      double target[4];
      for (int slot = 0; slot < 4; ++slot) {
        const int64_t stored = byte_row * 4 + slot;
        const int64_t row =
            stored / 64 * 64 + formats::Wint2TrueRow(static_cast<int>(stored % 64), order);
        target[slot] = 8 * gain[row] * normal(rng);
      }
      double best = INFINITY;
      for (int byte = 0; byte < 256; ++byte) {
        const int32_t code = formats::Wint2Code(static_cast<uint8_t>(byte), 120.961f, 1240);
        double error = 0;
        for (int slot = 0; slot < 4; ++slot) {
          error += std::pow(formats::Wint2Value(code, slot) - target[slot], 2);
        }
        if (error >= best) continue;
        best = error;
        matrix.codes_u8[byte_row * matrix.n + column] = static_cast<uint8_t>(byte);
      }
    }
  }
}

std::vector<double> Gains(int64_t count, std::mt19937& rng) {
  std::normal_distribution<double> normal;
  std::vector<double> gain(count);
  for (double& g : gain) g = std::exp(0.5 * normal(rng));
  return gain;
}

HostMatrix RouterWithGains(const std::vector<double>& gain, std::mt19937& rng) {
  constexpr int64_t kExperts = 16;
  std::normal_distribution<double> normal;
  HostMatrix router = formats::MakeHostMatrix(formats::WeightFormat::kFloat32, kHidden, kExperts);
  for (int64_t i = 0; i < kHidden * kExperts; ++i) {
    router.values_f32[i] = static_cast<float>(gain[i / kExperts] * normal(rng));
  }
  return router;
}

// What differs in a layer that is made up.
struct Gained {
  bool neurons = false;
  bool hidden = false;
};

// Evidence of two layers of two experts.
KOrderEvidence EvidenceOf(Gained gained, KOrder neuron_order, KOrder hidden_order, uint32_t seed) {
  std::mt19937 rng(seed);
  KOrderVote vote;
  for (int i = 0; i < 2; ++i) {
    const std::vector<double> flat(kHidden, 1);
    const std::vector<double> hidden = gained.hidden ? Gains(kHidden, rng) : flat;
    KOrderVote::Layer layer = vote.BeginLayer(RouterWithGains(hidden, rng));
    for (int expert = 0; expert < 2; ++expert) {
      HostMatrix gate_up = RandomWint2(kHidden, 2 * kWidth, rng);
      HostMatrix down = RandomWint2(kWidth, kHidden, rng);
      if (gained.hidden) FitRows(hidden, hidden_order, rng, gate_up);
      if (gained.neurons) {
        const std::vector<double> neurons = Gains(kWidth, rng);
        FitRows(neurons, neuron_order, rng, down);
        for (int64_t column = 0; column < 2 * kWidth; ++column) {
          gate_up.channel_scale[column] = static_cast<float>(1e-3 * neurons[column % kWidth]);
        }
      }
      layer.AddExpert(gate_up, down);
    }
    vote.EndLayer(layer);
  }
  return vote.evidence();
}

class KOrderOfExperts : public ::testing::TestWithParam<KOrder> {
 protected:
  static double Right(const KOrderCorrelations& check) {
    return GetParam() == KOrder::kNatural ? check.natural : check.mma64;
  }
  static double Wrong(const KOrderCorrelations& check) {
    return GetParam() == KOrder::kNatural ? check.mma64 : check.natural;
  }
  // Four deviations.
  static double Chance(const KOrderCorrelations& check) {
    return 4 / std::sqrt(static_cast<double>(check.num_values));
  }
};

TEST_P(KOrderOfExperts, IsFoundFromTheNormsOfTheirNeurons) {
  const KOrderEvidence evidence = EvidenceOf({.neurons = true}, GetParam(), GetParam(), 11);
  EXPECT_EQ(evidence.Decide(), GetParam());
  EXPECT_EQ(evidence.num_experts, 4);
  EXPECT_EQ(evidence.num_layers, 2);
  EXPECT_EQ(evidence.neurons.num_values, 4 * kWidth);
  EXPECT_GT(Right(evidence.neurons), 0.5);
  EXPECT_LT(std::fabs(Wrong(evidence.neurons)), Chance(evidence.neurons));
  EXPECT_LT(std::fabs(evidence.hidden.LeadOfNatural()), 4);
  EXPECT_FALSE(evidence.contradicts_itself());
}

TEST_P(KOrderOfExperts, IsFoundFromTheRouterWhereAllNeuronsAreAlike) {
  const KOrderEvidence evidence = EvidenceOf({.hidden = true}, GetParam(), GetParam(), 12);
  EXPECT_EQ(evidence.Decide(), GetParam());
  EXPECT_TRUE(evidence.is_conclusive());
  EXPECT_THAT(evidence.Describe(), Not(HasSubstr("by default")));
  EXPECT_LT(std::fabs(evidence.neurons.LeadOfNatural()), 4);
  EXPECT_EQ(evidence.hidden.num_values, 2 * kHidden);
  EXPECT_GT(Right(evidence.hidden), 0.5);
  EXPECT_LT(std::fabs(Wrong(evidence.hidden)), Chance(evidence.hidden));
}

INSTANTIATE_TEST_SUITE_P(Both, KOrderOfExperts, ::testing::Values(KOrder::kMma64, KOrder::kNatural),
                         [](const auto& info) {
                           return info.param == KOrder::kMma64 ? "Mma64" : "Natural";
                         });

TEST(KOrderEvidence, TheNeuronsDecideWhereTheRouterSaysOtherwiseAndTheContradictionIsTold) {
  const KOrderEvidence evidence =
      EvidenceOf({.neurons = true, .hidden = true}, KOrder::kNatural, KOrder::kMma64, 13);
  EXPECT_EQ(evidence.Decide(), KOrder::kNatural);
  EXPECT_TRUE(evidence.contradicts_itself());
}

TEST(KOrderEvidence, WhatChanceExplainsLeavesTheDefault) {
  EXPECT_EQ(KOrderVote().evidence().Decide(), KOrder::kMma64);
  const KOrderEvidence evidence = EvidenceOf({}, KOrder::kNatural, KOrder::kNatural, 3);
  EXPECT_EQ(evidence.Decide(), KOrder::kMma64);
  EXPECT_FALSE(evidence.is_conclusive());
  EXPECT_THAT(evidence.Describe(), StartsWith("mma64 by default ("));
}

TEST(KOrderEvidence, DifferencesBetweenGroupsAloneTellNothing) {
  std::mt19937 rng(6);
  std::vector<double> gain(kWidth);  // one for each 64-group
  for (int64_t i = 0; i < kWidth; ++i) gain[i] = std::pow(2, i / 64);
  HostMatrix gate_up = RandomWint2(kHidden, 2 * kWidth, rng);
  for (int64_t i = 0; i < 2 * kWidth; ++i) {
    gate_up.channel_scale[i] = static_cast<float>(1e-3 * gain[i % kWidth]);
  }
  HostMatrix down = RandomWint2(kWidth, kHidden, rng);
  for (int64_t group = 0; group < kWidth / 64; ++group) {
    for (int64_t n = 0; n < kHidden; ++n) down.local_scale[group * kHidden + n] = 1 << group;
  }
  KOrderVote vote;
  KOrderVote::Layer layer = vote.BeginLayer(RouterWithGains(std::vector<double>(kHidden, 1), rng));
  layer.AddExpert(gate_up, down);
  vote.EndLayer(layer);
  const KOrderCorrelations neurons = vote.evidence().neurons;
  EXPECT_LT(std::fabs(neurons.mma64), 4 / std::sqrt(kWidth));
  EXPECT_LT(std::fabs(neurons.natural), 4 / std::sqrt(kWidth));
}

TEST(KOrderEvidence, AllZeroExpertsCountAsNone) {
  std::mt19937 rng(5);
  HostMatrix gate_up = RandomWint2(kHidden, 2 * kWidth, rng);
  HostMatrix down = RandomWint2(kWidth, kHidden, rng);
  gate_up.local_scale.assign(gate_up.local_scale.size(), 0);
  down.local_scale.assign(down.local_scale.size(), 0);
  KOrderVote vote;
  KOrderVote::Layer layer =
      vote.BeginLayer(formats::MakeHostMatrix(formats::WeightFormat::kFloat32, kHidden, 4));
  layer.AddExpert(gate_up, down);
  vote.EndLayer(layer);
  const KOrderEvidence evidence = vote.evidence();
  for (const KOrderCorrelations& check : {evidence.neurons, evidence.hidden}) {
    EXPECT_EQ(check.natural, 0);
    EXPECT_EQ(check.mma64, 0);
  }
  EXPECT_EQ(evidence.Decide(), KOrder::kMma64);
}

TEST(KOrderEvidence, TheDemoModelCorrelatesInMma64OrderAndNotInNaturalOrder) {
  const auto config = LoadModelConfig("models/poet");
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open("models/poet", *config, KOrderChoice::kAuto);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const KOrderEvidence evidence = (*checkpoint)->k_order_evidence();
  EXPECT_EQ(evidence.num_experts, 64);
  EXPECT_EQ(evidence.num_layers, 6);
  const double chance = 4 / std::sqrt(static_cast<double>(evidence.neurons.num_values));
  EXPECT_GT(evidence.neurons.mma64, 2 * chance) << evidence.Describe();
  EXPECT_LT(std::fabs(evidence.neurons.natural), chance);
  EXPECT_EQ(evidence.Decide(), KOrder::kMma64);
  EXPECT_FALSE(evidence.contradicts_itself());
}

}  // namespace
}  // namespace wintserve
