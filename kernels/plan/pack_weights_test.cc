// Every weight of a packed matrix, read the way that a lane of an mma reads it, against the
// format's definition.
#include "kernels/plan/pack_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/code_line.h"
#include "kernels/plan/float16.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::plan {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

uint32_t WordAt(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

struct Packed {
  WeightLayout layout;
  std::vector<uint8_t> bytes;
  CodeLineErrors errors;

  const ColumnInfo& info(int64_t tile, int row) const {
    return reinterpret_cast<const ColumnInfo*>(bytes.data())[tile * kTileColumns + row];
  }
  const uint8_t* record(int64_t tile, int64_t chunk) const {
    return bytes.data() + layout.records_offset() +
           (tile * layout.chunks() + chunk) * ChunkBytes(layout.format);
  }
};

Packed Pack(const HostMatrix& matrix, bool gate_up) {
  const auto layout = LayOutWeights(matrix, gate_up);
  EXPECT_TRUE(layout.ok()) << layout.status();
  Packed packed = {*layout, std::vector<uint8_t>(layout->size_bytes(), 0xAB), {}};
  packed.errors = PackWeights(matrix, packed.layout, packed.bytes.data());
  return packed;
}

// The weight that lane 4g + t finds for A register 2 * b + upper, half `half`, of mma
// 2 * pair + select of a group; in float64, without rounding.
double WeightOfLane(const Packed& packed, int64_t tile, int64_t chunk, int group, int g, int upper,
                    const Position& p) {
  const int lane = 4 * g + p.t;
  const uint8_t* units = packed.record(tile, chunk);
  const ColumnInfo& info = packed.info(tile, g + 8 * upper);
  const auto word = [&](int unit, int index) {
    return WordAt(units + unit * kUnitBytes + lane * 16 + index * 4);
  };
  switch (packed.layout.format) {
    case WeightFormat::kWint2: {
      const auto byte =
          static_cast<uint8_t>(word(0, 2 * group + upper) >> (8 * (2 * p.pair + p.half)));
      const uint32_t code = CodeOfLine(byte, info.multiplier, info.offset);
      const uint8_t* scales = units + kUnitBytes;
      const int local_scale = (scales[2 * g + upper] >> (4 * group)) & 15;
      const int weight = 3 - 2 * p.select - p.b;
      const int value = static_cast<int>((code >> (9 - 3 * weight)) & 63) - 32;
      return double{info.scale} * local_scale * value;
    }
    case WeightFormat::kWint4: {
      const int nibble = 4 * p.half + 2 * p.select + p.b;
      const uint32_t code = (word(group, 2 * upper + p.pair) >> (4 * nibble)) & 15;
      return double{info.scale} * (static_cast<int>(code) - 8);
    }
    case WeightFormat::kWint8: {
      const uint32_t code =
          (word(2 * group + p.pair, 2 * upper + p.select) >> (8 * (2 * p.b + p.half))) & 255;
      return double{info.scale} * (static_cast<int>(code) - 128);
    }
    default: {
      const uint32_t pair = word(4 * group + 2 * p.pair + p.select, 2 * p.b + upper);
      return double{info.scale} * Float16ToFloat(static_cast<uint16_t>(pair >> (16 * p.half)));
    }
  }
}

void ExpectEveryWeight(const HostMatrix& matrix, bool gate_up) {
  const Packed packed = Pack(matrix, gate_up);
  ASSERT_EQ(packed.errors.num_bytes, 0);  // callers draw maps that have a line
  const std::vector<double> weights = UnroundedWeights(matrix);
  for (int64_t tile = 0; tile < packed.layout.tiles(); ++tile) {
    for (int64_t group = 0; group < packed.layout.chunks() * kGroupsPerChunk; ++group) {
      for (int row = 0; row < kTileColumns; ++row) {
        const int64_t column = packed.layout.ColumnOfTileRow(tile, row);
        for (int index = 0; index < kGroupRows; ++index) {
          const Position p = PositionOfIndex(index);
          const int64_t k = group * kGroupRows + GroupRowOfPosition(p, packed.layout.k_order);
          const double expected =
              column >= 0 && k < matrix.k ? weights[k * matrix.n + column] : 0.0;
          const double got = WeightOfLane(packed, tile, group / 2, static_cast<int>(group % 2),
                                          row % 8, row / 8, p);
          ASSERT_EQ(got, expected) << "k=" << k << " column=" << column;
        }
      }
    }
  }
}

struct Case {
  std::string name;
  WeightFormat format;
  KOrder k_order = KOrder::kMma64;
};

class PackWeightsTest : public testing::TestWithParam<Case> {};

TEST_P(PackWeightsTest, EveryLaneFindsItsWeightsAtEveryTailOfKAndOddWidth) {
  const auto seed = std::random_device{}();
  std::mt19937 rng(seed);
  for (const int64_t k : {64, 128, 256, 384, 448}) {
    for (const int64_t n : {1, 15, 33, 64}) {
      SCOPED_TRACE(fmt::format("seed={} k={} n={}", seed, k, n));
      ExpectEveryWeight(ExactlyPackedMatrix(GetParam().format, k, n, GetParam().k_order, &rng),
                        false);
    }
  }
}

TEST_P(PackWeightsTest, AGateUpTileHoldsEightGateAndTheSameEightUpColumns) {
  std::mt19937 rng(2);
  for (const int64_t width : {1, 7, 8, 20, 36}) {
    SCOPED_TRACE(width);
    const HostMatrix matrix =
        ExactlyPackedMatrix(GetParam().format, 192, 2 * width, GetParam().k_order, &rng);
    ExpectEveryWeight(matrix, true);
    const Packed packed = Pack(matrix, true);
    EXPECT_EQ(packed.layout.ColumnOfTileRow(0, 0), 0);
    EXPECT_EQ(packed.layout.ColumnOfTileRow(0, 8), width);
  }
}

TEST_P(PackWeightsTest, TheBytesDoNotDependOnTheNumberOfThreads) {
  std::mt19937 rng(6);
  for (const bool gate_up : {false, true}) {
    const HostMatrix matrix = RandomWeights(GetParam().format, 448, 1030, GetParam().k_order, &rng);
    const Packed alone = Pack(matrix, gate_up);
    for (const int threads : {1, 2, 5}) {
      SCOPED_TRACE(threads);
      cpu::ThreadPool pool(threads);
      std::vector<uint8_t> bytes(alone.bytes.size(), 0x5A);
      const CodeLineErrors errors = PackWeights(matrix, alone.layout, bytes.data(), &pool);
      EXPECT_EQ(bytes, alone.bytes);
      EXPECT_EQ(errors.num_columns, alone.errors.num_columns);
      EXPECT_EQ(errors.num_bytes, alone.errors.num_bytes);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, PackWeightsTest,
    testing::Values(Case{"Bfloat16", WeightFormat::kBfloat16}, Case{"Wint8", WeightFormat::kWint8},
                    Case{"Wint4", WeightFormat::kWint4},
                    Case{"Wint2Natural", WeightFormat::kWint2, KOrder::kNatural},
                    Case{"Wint2Mma64", WeightFormat::kWint2, KOrder::kMma64}),
    [](const auto& info) { return info.param.name; });

TEST(PackWeights, KOfAnyLengthIsAllowedWhereTheFormatHasNoGroups) {
  std::mt19937 rng(3);
  ExpectEveryWeight(ExactlyPackedMatrix(WeightFormat::kBfloat16, 100, 24, KOrder::kMma64, &rng),
                    false);
  ExpectEveryWeight(ExactlyPackedMatrix(WeightFormat::kWint8, 67, 3, KOrder::kMma64, &rng), false);
}

TEST(PackWeights, CountsTheColumnsWithoutAnExactLine) {
  std::mt19937 rng(4);
  HostMatrix matrix = RandomWeights(WeightFormat::kWint2, 64, 20000, KOrder::kMma64, &rng);
  const Packed packed = Pack(matrix, false);
  int64_t columns = 0;
  int64_t bytes = 0;
  for (int64_t column = 0; column < matrix.n; ++column) {
    const CodeLine line = FindCodeLine(matrix.code_scale[column], matrix.code_zp[column]);
    columns += line.num_wrong_bytes > 0 ? 1 : 0;
    bytes += line.num_wrong_bytes;
  }
  EXPECT_GT(columns, 0);
  EXPECT_EQ(packed.errors.num_columns, columns);
  EXPECT_EQ(packed.errors.num_bytes, bytes);
}

TEST(PackWeights, Bfloat16WeightsFarBelowTheLargestOfTheirColumnLoseLittle) {
  HostMatrix matrix = formats::MakeHostMatrix(WeightFormat::kBfloat16, 64, 1);
  for (int64_t k = 0; k < matrix.k; ++k) {
    matrix.values_bf16[k] =
        formats::FloatToBfloat16(std::ldexp(1.9921875f, static_cast<int>(40 - k)));
  }
  const Packed packed = Pack(matrix, false);
  for (int index = 0; index < kGroupRows; ++index) {
    const Position p = PositionOfIndex(index);
    const int k = GroupRowOfPosition(p, KOrder::kMma64);
    const double expected = formats::Bfloat16ToFloat(matrix.values_bf16[k]);
    const double got = WeightOfLane(packed, 0, 0, 0, 0, 0, p);
    const double largest = std::ldexp(1.9921875, 40);
    if (k <= 31) {
      EXPECT_EQ(got, expected) << k;
    } else {
      EXPECT_LE(std::fabs(got - expected), std::ldexp(largest, -39)) << k;
    }
  }
}

TEST(PackWeights, Bfloat16TakesInfinitiesAndTheWholeRangeOfExponents) {
  for (const float weight : {0.0f, 0x1p-133f, 0x1p-126f, 0x1p100f, 0x1.FEp127f}) {
    HostMatrix matrix = formats::MakeHostMatrix(WeightFormat::kBfloat16, 64, 1);
    for (uint16_t& bits : matrix.values_bf16) bits = formats::FloatToBfloat16(weight);
    EXPECT_EQ(WeightOfLane(Pack(matrix, false), 0, 0, 0, 0, 0, Position{}), weight);
  }
  HostMatrix matrix = formats::MakeHostMatrix(WeightFormat::kBfloat16, 64, 1);
  for (uint16_t& bits : matrix.values_bf16) bits = 0x7F80;
  EXPECT_TRUE(std::isinf(WeightOfLane(Pack(matrix, false), 0, 0, 0, 0, 0, Position{})));
}

TEST(Position, EveryGroupRowStandsAtOnePositionAndAByteStaysWithOneLane) {
  for (const KOrder order : {KOrder::kNatural, KOrder::kMma64}) {
    std::set<int> rows;
    for (int index = 0; index < kGroupRows; ++index) {
      const Position p = PositionOfIndex(index);
      ASSERT_EQ(p.index(), index);
      rows.insert(GroupRowOfPosition(p, order));
      ASSERT_EQ(GroupRowOfPosition(p, order), formats::Wint2TrueRow(StoredRowOfPosition(p), order));
      ASSERT_EQ(StoredRowOfPosition(p) / 16, p.t);
    }
    EXPECT_EQ(rows.size(), static_cast<size_t>(kGroupRows));
  }
}

struct BadMatrix {
  const char* name;
  WeightFormat format;
  void (*spoil)(HostMatrix*);
  bool gate_up;
  const char* message;
};

class LayOutWeightsErrors : public testing::TestWithParam<BadMatrix> {};

TEST_P(LayOutWeightsErrors, NameTheValueAndWhatIsAllowed) {
  std::mt19937 rng(8);
  HostMatrix matrix = RandomWeights(GetParam().format, 128, 32, KOrder::kMma64, &rng);
  GetParam().spoil(&matrix);
  const auto layout = LayOutWeights(matrix, GetParam().gate_up);
  ASSERT_FALSE(layout.ok());
  EXPECT_EQ(layout.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(layout.status().message()), testing::HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, LayOutWeightsErrors,
    testing::Values(BadMatrix{"OddK", WeightFormat::kWint2, [](HostMatrix* m) { m->k = 96; }, false,
                              "a wint2 matrix has k = 96; it must be a positive multiple of 64"},
                    BadMatrix{"OddGateUp", WeightFormat::kWint8, [](HostMatrix* m) { m->n = 31; },
                              true,
                              "a wint8 gate-up matrix has n = 31; it must be even and positive"},
                    BadMatrix{"Float32", WeightFormat::kFloat32, [](HostMatrix*) {}, false,
                              "a float32 matrix has no CUDA product"},
                    BadMatrix{"NanScale", WeightFormat::kWint4,
                              [](HostMatrix* m) { m->channel_scale[3] = std::nanf(""); }, false,
                              "wint4 scale of column 3 is nan; allowed are magnitudes up to 2^70"},
                    BadMatrix{"HugeCodes", WeightFormat::kWint2,
                              [](HostMatrix* m) { m->code_scale[2] = 1e9f; }, false,
                              "wint2 codes of column 2"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::kernels::plan
