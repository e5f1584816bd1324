// The kernels around a product on the emulated device: pairs sorted by expert, and activations in
// the order and precision of the B operand.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cuda/matmul/emulated_launcher_test_util.h"
#include "kernels/cuda/matmul/product_input_test_util.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::KOrder;

constexpr double kEpsilon = 0x1p-24;

struct PreparedHost {
  std::vector<uint16_t> values;
  std::vector<float> inverse_scale;
  std::vector<ChunkCorrections> corrections;
};

// Parameters that prepare rows of x [rows][k] into `out`.
PrepareParams PrepareInto(const std::vector<float>& x, int64_t k, KOrder order,
                          plan::Offsets offsets, plan::OperandOrder operand_order,
                          PreparedHost* out) {
  const auto rows = static_cast<int64_t>(x.size()) / k;
  const int64_t chunks = plan::DivideUp<int64_t>(k, plan::kChunkRows);
  out->values.assign(rows * chunks * plan::kChunkRows, 0xFFFF);
  out->inverse_scale.assign(rows, std::nanf(""));
  out->corrections.resize(rows * chunks);
  PrepareParams params;
  params.x = x.data();
  params.x_stride = k;
  params.k = static_cast<int>(k);
  params.chunks = static_cast<int>(chunks);
  params.k_order = order;
  params.offsets = offsets;
  params.order = operand_order;
  params.out = {out->values.data(), out->inverse_scale.data(), out->corrections.data()};
  return params;
}

PreparedHost PrepareOnEmulation(const std::vector<float>& x, int64_t k, KOrder order,
                                plan::Offsets offsets, int threads,
                                plan::OperandOrder operand_order = plan::OperandOrder::kMma) {
  PreparedHost out;
  const PrepareParams params = PrepareInto(x, k, order, offsets, operand_order, &out);
  EmulatedLauncher(5, threads).Prepare(params, static_cast<int64_t>(x.size()) / k);
  return out;
}

TEST(SortAndPrepare, PlacesPairsByExpertInAscendingOrderForAnyNumberOfPairs) {
  std::mt19937 rng(3);
  for (const int num_pairs : {1, 8, 255, 256, 257, 1000}) {
    constexpr int kExperts = 37;
    constexpr int kTopK = 4;
    std::vector<int32_t> ids(num_pairs), first(kExperts + 1, -1), source(num_pairs, -1),
        place(num_pairs, -1);
    for (int32_t& id : ids) id = static_cast<int32_t>(rng() % 5 == 0 ? rng() % kExperts : 17);
    SortParams params;
    params.expert_ids = ids.data();
    params.num_pairs = num_pairs;
    params.num_experts = kExperts;
    params.top_k = kTopK;
    params.first_token = first.data();
    params.source_row = source.data();
    params.place_of_pair = place.data();
    PreparedHost prepared;
    const std::vector<float> x = RandomRows(3 * 200, &rng);
    const PrepareParams prepare =
        PrepareInto(x, 200, KOrder::kMma64, {544, 96}, plan::OperandOrder::kMma, &prepared);
    EmulatedLauncher(rng(), num_pairs % 2 == 0 ? 0 : 96).SortAndPrepare(params, prepare, 3);
    const PreparedHost expected = PrepareOnEmulation(x, 200, KOrder::kMma64, {544, 96}, 0);
    ASSERT_EQ(prepared.values, expected.values);
    ASSERT_EQ(prepared.inverse_scale, expected.inverse_scale);
    int next = 0;
    for (int e = 0; e < kExperts; ++e) {
      ASSERT_EQ(first[e], next);
      for (int pair = 0; pair < num_pairs; ++pair) {
        if (ids[pair] != e) continue;
        ASSERT_EQ(place[pair], next);
        ASSERT_EQ(source[next], pair / kTopK);
        ++next;
      }
    }
    ASSERT_EQ(first[kExperts], num_pairs);
  }
}

TEST(PrepareRow, RoundsOnceAndPermutesAndSumsWhatTheProductsSubtract) {
  std::mt19937 rng(4);
  const plan::Offsets offsets = {544, 96};
  for (const int64_t k : {1, 64, 99, 100, 384, 2560}) {
    for (const KOrder order : {KOrder::kNatural, KOrder::kMma64}) {
      for (const int threads : {0, 32, 64}) {  // with few, not all of a long row is kept
        const std::vector<float> x = RandomRows(2 * k, &rng);
        const PreparedHost out = PrepareOnEmulation(x, k, order, offsets, threads);
        const int64_t padded = plan::DivideUp<int64_t>(k, plan::kChunkRows) * plan::kChunkRows;
        for (int64_t r = 0; r < 2; ++r) {
          const std::vector<double> row = RoundRow(&x[r * k], k);
          for (int64_t group = 0; group < padded / 64; ++group) {
            double correction = 0;
            double magnitude = 0;
            for (int i = 0; i < 64; ++i) {
              const plan::Position p = plan::PositionOfIndex(i);
              const int64_t source = group * 64 + plan::GroupRowOfPosition(p, order);
              const double expected = source < k ? row[source] : 0;
              const double got = plan::Float16ToFloat(out.values[r * padded + group * 64 + i]);
              ASSERT_EQ(got * out.inverse_scale[r], expected) << k << " " << source;
              correction -= (p.b == 0 ? offsets.b0 : offsets.b1) * got;
              magnitude += (p.b == 0 ? offsets.b0 : offsets.b1) * std::fabs(got);
            }
            const ChunkCorrections& got = out.corrections[(r * padded / 64 + group) / 2];
            const uint32_t halves = got.halves[group % 2];
            ASSERT_NEAR(got.values[group % 2], correction, 11 * kEpsilon * magnitude);
            ASSERT_EQ(got.values[group % 2],
                      0x1p14 * plan::Float16ToFloat(static_cast<uint16_t>(halves)) +
                          0x1p3 * plan::Float16ToFloat(static_cast<uint16_t>(halves >> 16)));
          }
        }
      }
    }
  }
}

TEST(PrepareRow, PutsTheSamePairsWhereAWgmmaReadsThem) {
  std::mt19937 rng(9);
  for (const int64_t k : {64, 384, 2560}) {
    const std::vector<float> x = RandomRows(3 * k, &rng);
    const PreparedHost mma = PrepareOnEmulation(x, k, KOrder::kMma64, {544, 96}, 0);
    const PreparedHost wgmma =
        PrepareOnEmulation(x, k, KOrder::kMma64, {544, 96}, 0, plan::OperandOrder::kWgmma);
    for (size_t i = 0; i < mma.values.size(); ++i) {
      const plan::Position p = plan::PositionOfIndex(i % 64);
      const int piece = 2 * (2 * p.pair + p.select) + p.b;  // of 8 values
      ASSERT_EQ(wgmma.values[i / 64 * 64 + piece * 8 + 2 * p.t + p.half], mma.values[i]) << i;
    }
    EXPECT_EQ(wgmma.inverse_scale, mma.inverse_scale);
    for (size_t i = 0; i < mma.corrections.size(); ++i) {
      for (int group = 0; group < 2; ++group) {
        ASSERT_EQ(wgmma.corrections[i].halves[group], mma.corrections[i].halves[group]) << i;
        ASSERT_EQ(wgmma.corrections[i].values[group], mma.corrections[i].values[group]) << i;
      }
    }
  }
}

TEST(PrepareRow, TakesZerosTinyAndHugeRowsAndKeepsANanInItsRow) {
  constexpr int64_t kK = 64;
  std::vector<float> x(5 * kK, 0.0f);
  for (int64_t i = 0; i < kK; ++i) {
    x[kK + i] = 0x1p-140f;
    x[2 * kK + i] = 0x1.FFFp127f;
    x[3 * kK + i] = 1.0f;
    x[4 * kK + i] = 1.0f;
  }
  x[3 * kK + 5] = std::nanf("");
  const PreparedHost out = PrepareOnEmulation(x, kK, KOrder::kNatural, {1, 1}, 0);
  const auto value = [&](int64_t row, int64_t i) {
    return plan::Float16ToFloat(out.values[row * plan::kChunkRows + i]) *
           double{out.inverse_scale[row]};
  };
  EXPECT_EQ(value(0, 0), 0);
  EXPECT_EQ(value(1, 0), 0x1p-140);
  EXPECT_NEAR(value(2, 0), 0x1.FFFp127, 0x1p116);
  int num_nans = 0;
  for (int64_t i = 0; i < kK; ++i) {
    num_nans += std::isnan(value(3, i)) ? 1 : 0;
    EXPECT_EQ(value(4, i), 1);
  }
  EXPECT_EQ(num_nans, 1);
  EXPECT_TRUE(std::isnan(out.corrections[3].values[0]));
  EXPECT_FALSE(std::isnan(out.corrections[4].values[0]));
}

}  // namespace
}  // namespace wintserve::kernels::cuda
