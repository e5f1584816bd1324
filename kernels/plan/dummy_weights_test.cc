#include "kernels/plan/dummy_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <vector>

#include "kernels/formats/wint2.h"
#include "kernels/plan/code_line.h"
#include "kernels/plan/pack_weights.h"

namespace wintserve::kernels::plan {
namespace {

using formats::DummyMatrix;
using formats::HostMatrix;
using formats::WeightFormat;

constexpr WeightFormat kFormats[] = {WeightFormat::kFloat32, WeightFormat::kBfloat16,
                                     WeightFormat::kWint8, WeightFormat::kWint4,
                                     WeightFormat::kWint2};

DummyMatrix Whole(WeightFormat format, int64_t k, int64_t n) {
  DummyMatrix m;
  m.format = format;
  m.seed = 42;
  m.deviation = 1.0f / std::sqrt(static_cast<float>(k));
  m.k = k;
  m.n = n;
  m.num_ranges = 1;
  m.ranges[0] = {0, n};
  return m;
}

std::vector<uint8_t> PiecesOf(const DummyMatrix& matrix, const WeightLayout& layout) {
  const DummyWeights weights(matrix);
  std::vector<ColumnInfo> infos;
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    for (int row = 0; row < kTileColumns; ++row) {
      const int64_t column = layout.ColumnOfTileRow(tile, row);
      uint16_t largest = 0;
      if (matrix.format == WeightFormat::kBfloat16 && column >= 0) {
        for (int64_t k = 0; k < matrix.k; ++k) {
          largest = std::max<uint16_t>(largest, weights.Bfloat16(k, column) & 0x7FFF);
        }
      }
      infos.push_back(DummyColumnInfo(weights, SharedDummyCodeMaps(), column, largest));
    }
  }
  std::vector<uint8_t> bytes(layout.size_bytes());
  std::memcpy(bytes.data(), infos.data(), layout.records_offset());
  uint8_t* out = bytes.data() + layout.records_offset();
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    for (int64_t chunk = 0; chunk < layout.chunks(); ++chunk) {
      for (int i = 0; i < PiecesPerRecord(layout.format); ++i, out += kPieceBytes) {
        const Piece piece = DummyPiece(weights, layout, infos.data(), tile, chunk, i);
        std::memcpy(out, &piece, kPieceBytes);
      }
    }
  }
  return bytes;
}

// The strongest statement there is: what a GPU makes is what packing the host matrix gives.
TEST(DummyWeights, PiecesAreThePackedHostMatrix) {
  for (const WeightFormat format : kFormats) {
    if (format == WeightFormat::kFloat32) continue;
    for (const bool gate_up : {false, true}) {
      for (const auto& [k, n] : {std::pair<int64_t, int64_t>{64, 2},
                                 {128, 16},
                                 {192, 34},
                                 {320, 100},
                                 {256, 64},
                                 {100, 40}}) {
        if (format == WeightFormat::kWint2 && k % 64 != 0) continue;
        SCOPED_TRACE(testing::Message()
                     << static_cast<int>(format) << " " << gate_up << " " << k << " x " << n);
        const DummyMatrix matrix = Whole(format, k, n);
        const HostMatrix host = MakeDummyHostMatrix(matrix);
        const WeightLayout layout = *LayOutWeights(host, gate_up);
        ASSERT_EQ(layout.size_bytes(), LayOutDummyWeights(matrix, gate_up).size_bytes());
        std::vector<uint8_t> packed(layout.size_bytes());
        const CodeLineErrors errors = PackWeights(host, layout, packed.data());
        EXPECT_EQ(errors.num_columns, 0);
        EXPECT_EQ(PiecesOf(matrix, LayOutDummyWeights(matrix, gate_up)), packed);
      }
    }
  }
}

TEST(DummyWeights, HaveTheDeviationThatIsAskedForAndNoCommonMean) {
  for (const WeightFormat format : kFormats) {
    SCOPED_TRACE(static_cast<int>(format));
    const DummyMatrix matrix = Whole(format, 512, 512);
    double sum = 0;
    double squares = 0;
    for (const float weight : formats::DecodeToFloat(MakeDummyHostMatrix(matrix))) {
      ASSERT_TRUE(std::isfinite(weight));
      sum += weight;
      squares += double{weight} * weight;
    }
    const double count = 512.0 * 512;
    EXPECT_NEAR(std::sqrt(squares / count) / matrix.deviation, 1, 0.05);
    EXPECT_NEAR(sum / count / matrix.deviation, 0, 0.01);
  }
}

TEST(DummyWeights, StayInTheRangesOfTheFormats) {
  const HostMatrix wint2 = MakeDummyHostMatrix(Whole(WeightFormat::kWint2, 1024, 256));
  EXPECT_EQ(std::set<int>(wint2.local_scale.begin(), wint2.local_scale.end()).size(), 15u);
  EXPECT_THAT(wint2.local_scale, testing::Each(testing::AllOf(testing::Ge(1), testing::Le(15))));
  EXPECT_EQ(std::set<int>(wint2.codes_u8.begin(), wint2.codes_u8.end()).size(), 256u);
  for (int64_t column = 0; column < wint2.n; ++column) {
    EXPECT_GE(wint2.code_scale[column], 110);
    EXPECT_LE(wint2.code_scale[column], 128);
    for (const int byte : {0, 255}) {
      const int32_t code = formats::Wint2Code(static_cast<uint8_t>(byte), wint2.code_scale[column],
                                              wint2.code_zp[column]);
      EXPECT_GE(code, 0);
      EXPECT_LE(code, 32767);
    }
    EXPECT_EQ(FindCodeLine(wint2.code_scale[column], wint2.code_zp[column]).num_wrong_bytes, 0);
    EXPECT_EQ(wint2.channel_scale[column], formats::RoundToBfloat16(wint2.channel_scale[column]));
  }
  const HostMatrix wint8 = MakeDummyHostMatrix(Whole(WeightFormat::kWint8, 512, 256));
  EXPECT_EQ(std::set<int>(wint8.codes_i8.begin(), wint8.codes_i8.end()).size(), 255u);
  const HostMatrix wint4 = MakeDummyHostMatrix(Whole(WeightFormat::kWint4, 512, 256));
  EXPECT_EQ(std::set<int>(wint4.codes_i8.begin(), wint4.codes_i8.end()).size(), 15u);
}

TEST(DummyWeights, AreTheSameEachTimeAndOthersUnderAnotherSeed) {
  DummyMatrix matrix = Whole(WeightFormat::kWint8, 128, 64);
  const HostMatrix first = MakeDummyHostMatrix(matrix);
  EXPECT_EQ(first.codes_i8, MakeDummyHostMatrix(matrix).codes_i8);
  matrix.seed = 43;
  const HostMatrix other = MakeDummyHostMatrix(matrix);
  int equal = 0;
  for (size_t i = 0; i < first.codes_i8.size(); ++i) {
    equal += first.codes_i8[i] == other.codes_i8[i] ? 1 : 0;
  }
  EXPECT_LT(equal, static_cast<int>(first.codes_i8.size()) / 100);
  EXPECT_NE(first.channel_scale, other.channel_scale);
}

TEST(DummyWeights, ASliceIsASliceOfTheWhole) {
  for (const WeightFormat format : kFormats) {
    SCOPED_TRACE(static_cast<int>(format));
    const DummyMatrix whole = Whole(format, 256, 96);
    const std::vector<float> weights = formats::DecodeToFloat(MakeDummyHostMatrix(whole));
    DummyMatrix slice = whole;
    slice.k = 128;
    slice.first_row = 64;
    slice.n = 32 + 8 + 8;
    slice.num_ranges = 3;
    slice.ranges[0] = {32, 32};
    slice.ranges[1] = {72, 8};
    slice.ranges[2] = {88, 8};
    const std::vector<float> part = formats::DecodeToFloat(MakeDummyHostMatrix(slice));
    for (int64_t row = 0; row < slice.k; ++row) {
      for (int64_t column = 0; column < slice.n; ++column) {
        const int64_t of_whole = column < 32   ? 32 + column
                                 : column < 40 ? 72 + column - 32
                                               : 88 + column - 40;
        ASSERT_EQ(part[row * slice.n + column], weights[(64 + row) * whole.n + of_whole])
            << row << " " << column;
      }
    }
  }
}

TEST(DummyWeights, ATransposedMatrixIsTheOtherTurnedOver) {
  const DummyMatrix table = Whole(WeightFormat::kBfloat16, 48, 32);
  DummyMatrix head = table;
  head.transposed = true;
  head.k = 32;
  head.n = 48;
  head.ranges[0] = {0, 48};
  const HostMatrix rows = MakeDummyHostMatrix(table);
  const HostMatrix columns = MakeDummyHostMatrix(head);
  for (int64_t i = 0; i < 48; ++i) {
    for (int64_t j = 0; j < 32; ++j) {
      EXPECT_EQ(rows.values_bf16[i * 32 + j], columns.values_bf16[j * 48 + i]);
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::plan
