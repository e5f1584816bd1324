// The layouts against bytes and weights that tests/golden/make_formats_golden.py made from the
// format's formulas, and the properties that hold for any matrix.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "kernels/formats/bf16.h"
#include "kernels/formats/matrix.h"
#include "kernels/formats/wint2.h"
#include "kernels/formats/wint4.h"
#include "kernels/formats/wint8.h"

namespace wintserve::formats {
namespace {

using ::testing::ElementsAreArray;

std::vector<nlohmann::json> ReadGolden(const char* section) {
  std::ifstream stream("tests/golden/formats.json");
  const nlohmann::json golden = nlohmann::json::parse(stream);
  return {golden[section].begin(), golden[section].end()};
}

std::vector<uint8_t> FromHex(const std::string& hex) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

// bf16 bit patterns, so that the sign of zero counts too.
std::vector<uint16_t> ExpectedBits(const nlohmann::json& golden) {
  const std::vector<uint8_t> bytes = FromHex(golden["weight_bits_hex"]);
  std::vector<uint16_t> bits(bytes.size() / 2);
  std::memcpy(bits.data(), bytes.data(), bytes.size());
  return bits;
}

std::vector<uint16_t> DecodedBits(const HostMatrix& matrix) {
  std::vector<uint16_t> bits;
  for (float weight : DecodeToFloat(matrix)) {
    bits.push_back(FloatToBfloat16(weight));
    EXPECT_EQ(Bfloat16ToFloat(bits.back()), weight) << "not a bf16 value";
  }
  return bits;
}

struct StoredWint2 {
  std::vector<uint8_t> codes, local_scale;
  std::vector<float> super_scale, code_scale, code_zp;
  int64_t k = 0, n = 0;

  Wint2Tensors tensors() const {
    return {k,
            n,
            codes.data(),
            local_scale.data(),
            super_scale.data(),
            code_scale.data(),
            code_zp.data()};
  }
  HostMatrix Unpack(const MatrixSlice& slice, KOrder order) const {
    HostMatrix matrix = MakeHostMatrix(WeightFormat::kWint2, slice.num_rows(), slice.num_columns());
    matrix.k_order = order;
    UnpackWint2(tensors(), slice, 0, matrix);
    return matrix;
  }
};

StoredWint2 StoredFromGolden(const nlohmann::json& golden) {
  return {FromHex(golden["quant_weight_hex"]),
          FromHex(golden["weight_scale_hex"]),
          golden["super_scale"].get<std::vector<float>>(),
          golden["code_scale"].get<std::vector<float>>(),
          golden["code_zp"].get<std::vector<float>>(),
          golden["k"],
          golden["n"]};
}

HostMatrix RandomCodes(WeightFormat format, int64_t k, int64_t n, std::mt19937& rng) {
  HostMatrix matrix = MakeHostMatrix(format, k, n);
  const int low = format == WeightFormat::kWint8 ? -128 : -8;
  std::uniform_int_distribution<int> code(low, -low - 1);
  for (int8_t& c : matrix.codes_i8) c = static_cast<int8_t>(code(rng));
  for (float& s : matrix.channel_scale) s = RoundToBfloat16(1e-3f + 1e-6f * code(rng));
  return matrix;
}

TEST(Bfloat16, RoundsToNearestAndTiesToEven) {
  EXPECT_EQ(FloatToBfloat16(1.0f), 0x3F80);
  EXPECT_EQ(FloatToBfloat16(1.0f + 0x1p-8f), 0x3F80);            // halfway, even below
  EXPECT_EQ(FloatToBfloat16(1.0f + 0x1p-7f + 0x1p-8f), 0x3F82);  // halfway, even above
  EXPECT_EQ(FloatToBfloat16(1.0f + 0x1p-8f + 0x1p-20f), 0x3F81);
  EXPECT_EQ(FloatToBfloat16(-0.0f), 0x8000);
  EXPECT_EQ(FloatToBfloat16(std::numeric_limits<float>::max()), 0x7F80);  // to infinity
}

TEST(Bfloat16, KeepsNanANan) {
  EXPECT_TRUE(std::isnan(RoundToBfloat16(std::nanf(""))));
  // All mantissa bits set: plain rounding would carry into the sign.
  EXPECT_TRUE(std::isnan(RoundToBfloat16(std::bit_cast<float>(0x7FFFFFFFu))));
}

TEST(Bfloat16, RoundTripsEveryBitPattern) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float value = Bfloat16ToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(FloatToBfloat16(value), bits);
  }
}

TEST(Wint8, UnpacksAndPacksTheReferenceBytes) {
  for (const nlohmann::json& golden : ReadGolden("wint8")) {
    const std::vector<uint8_t> stored = FromHex(golden["quant_weight_hex"]);
    const auto scale = golden["channel_scale"].get<std::vector<float>>();
    const int64_t k = golden["k"], n = golden["n"];
    HostMatrix matrix = MakeHostMatrix(WeightFormat::kWint8, k, n);
    UnpackWint8({k, n, stored.data(), scale.data()}, {0, k, 0, n}, 0, matrix);
    EXPECT_THAT(matrix.codes_i8, ElementsAreArray(golden["codes"].get<std::vector<int>>()));
    EXPECT_EQ(DecodedBits(matrix), ExpectedBits(golden));
    EXPECT_EQ(PackWint8(matrix), stored);
  }
}

TEST(Wint4, UnpacksAndPacksTheReferenceBytes) {
  for (const nlohmann::json& golden : ReadGolden("wint4")) {
    const std::vector<uint8_t> stored = FromHex(golden["quant_weight_hex"]);
    const auto scale = golden["channel_scale"].get<std::vector<float>>();
    const int64_t k = golden["k"], n = golden["n"];
    HostMatrix matrix = MakeHostMatrix(WeightFormat::kWint4, k, n);
    UnpackWint4({k, n, stored.data(), scale.data()}, {0, k, 0, n}, 0, matrix);
    EXPECT_THAT(matrix.codes_i8, ElementsAreArray(golden["codes"].get<std::vector<int>>()));
    EXPECT_EQ(DecodedBits(matrix), ExpectedBits(golden));
    EXPECT_EQ(PackWint4(matrix), stored);
  }
}

TEST(Wint2, DecodesTheReferenceBytesInBothOrdersZeroGroupsAndWrappedCodesIncluded) {
  for (const nlohmann::json& golden : ReadGolden("wint2")) {
    const StoredWint2 stored = StoredFromGolden(golden);
    const KOrder order = golden["k_order"] == "mma64" ? KOrder::kMma64 : KOrder::kNatural;
    const HostMatrix matrix = stored.Unpack({0, stored.k, 0, stored.n}, order);
    EXPECT_EQ(DecodedBits(matrix), ExpectedBits(golden)) << golden["k_order"];
    EXPECT_EQ(matrix.codes_u8, stored.codes);
    EXPECT_EQ(PackWint2LocalScale(matrix), stored.local_scale);
  }
}

TEST(Wint2, CodesRoundOnceWhereASeparateProductWouldFloorToAnother) {
  int num_cases = 0;
  for (const nlohmann::json& golden : ReadGolden("fma")) {
    EXPECT_EQ(Wint2Code(golden["byte"], golden["code_scale"], golden["code_zp"]), golden["code"]);
    EXPECT_NE(golden["code"], golden["separate"]);
    ++num_cases;
  }
  EXPECT_GE(num_cases, 20);
}

TEST(Wint2, WindowsOverlapByThreeBits) {
  constexpr int32_t kCode = 052346;  // octal digits h0 … h4: value v is 8 * (h_v - 4) + h_{v+1}
  EXPECT_EQ(Wint2Value(kCode, 0), 8 * (5 - 4) + 2);
  EXPECT_EQ(Wint2Value(kCode, 1), 8 * (2 - 4) + 3);
  EXPECT_EQ(Wint2Value(kCode, 2), 8 * (3 - 4) + 4);
  EXPECT_EQ(Wint2Value(kCode, 3), 8 * (4 - 4) + 6);
}

TEST(Wint2, NegativeCodesWrapAsTwosComplement) {
  for (int slot = 0; slot < 4; ++slot) {
    EXPECT_EQ(Wint2Value(-1, slot), 31);
    EXPECT_EQ(Wint2Value(-12345, slot), Wint2Value((1 << 15) - 12345, slot));
  }
  EXPECT_EQ(Wint2Code(2, -1.5f, 0.0f), -3);  // floor(-2.5)
}

TEST(Wint2, Mma64PermutesInsideA64GroupOnlyAndEveryByteHoldsKAndKPlus1And8And9) {
  std::set<int> rows;
  for (int stored = 0; stored < kWint2GroupSize; ++stored) {
    const int row = Wint2TrueRow(stored, KOrder::kMma64);
    rows.insert(row);
    const int first = Wint2TrueRow(stored / 4 * 4, KOrder::kMma64);
    const int offsets[] = {0, 1, 8, 9};
    EXPECT_EQ(row, first + offsets[stored % 4]);
    EXPECT_EQ(Wint2TrueRow(stored, KOrder::kNatural), stored);
  }
  EXPECT_EQ(rows.size(), 64u);
  EXPECT_EQ(*rows.rbegin(), 63);
  EXPECT_EQ(Wint2TrueRow(4, KOrder::kMma64), 16);  // next byte: next step of 16
  EXPECT_EQ(Wint2TrueRow(16, KOrder::kMma64), 2);  // next lane: next pair
}

TEST(Wint2, EvenGroupsReadTheHighNibbleWhereverASliceBegins) {
  StoredWint2 stored;
  stored.k = 256;
  stored.n = 2;
  stored.codes.assign(stored.k / 4 * stored.n, 7);
  stored.local_scale = {0xA5, 0x10, 0xC3, 0x0F};
  stored.super_scale = stored.code_scale = stored.code_zp = {1, 1};
  const HostMatrix whole = stored.Unpack({0, 256, 0, 2}, KOrder::kMma64);
  EXPECT_THAT(whole.local_scale, ElementsAreArray({0xA, 1, 5, 0, 0xC, 0, 3, 0xF}));
  const HostMatrix middle = stored.Unpack({64, 192, 0, 2}, KOrder::kMma64);
  EXPECT_THAT(middle.local_scale, ElementsAreArray({5, 0, 0xC, 0}));
  const HostMatrix column = stored.Unpack({64, 128, 1, 2}, KOrder::kMma64);
  EXPECT_THAT(column.local_scale, ElementsAreArray({0}));
}

TEST(PackedLayouts, PackIsABijectionThatUnpackInverts) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed=" << seed);
  std::mt19937 rng(seed);
  for (int round = 0; round < 20; ++round) {
    const int64_t k = 64 * (1 + rng() % 5);
    const int64_t n = 4 * (1 + rng() % 9);
    const HostMatrix wint8 = RandomCodes(WeightFormat::kWint8, k, n, rng);
    HostMatrix unpacked = MakeHostMatrix(WeightFormat::kWint8, k, n);
    const std::vector<uint8_t> bytes = PackWint8(wint8);
    UnpackWint8({k, n, bytes.data(), wint8.channel_scale.data()}, {0, k, 0, n}, 0, unpacked);
    ASSERT_EQ(unpacked.codes_i8, wint8.codes_i8);
    ASSERT_EQ(unpacked.channel_scale, wint8.channel_scale);

    const HostMatrix wint4 = RandomCodes(WeightFormat::kWint4, k, n, rng);
    HostMatrix unpacked4 = MakeHostMatrix(WeightFormat::kWint4, k, n);
    const std::vector<uint8_t> nibbles = PackWint4(wint4);
    UnpackWint4({k, n, nibbles.data(), wint4.channel_scale.data()}, {0, k, 0, n}, 0, unpacked4);
    ASSERT_EQ(unpacked4.codes_i8, wint4.codes_i8);
  }
}

TEST(PackedLayouts, ASliceHoldsTheSameWeightsAsTheWholeAtAnyOffset) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed=" << seed);
  std::mt19937 rng(seed);
  constexpr int64_t kRows = 192, kColumns = 20;
  for (const WeightFormat format : {WeightFormat::kWint8, WeightFormat::kWint4}) {
    const HostMatrix whole = RandomCodes(format, kRows, kColumns, rng);
    const std::vector<uint8_t> bytes =
        format == WeightFormat::kWint8 ? PackWint8(whole) : PackWint4(whole);
    for (int round = 0; round < 30; ++round) {
      MatrixSlice slice;
      slice.k_begin = rng() % kRows;
      slice.k_end = slice.k_begin + 1 + rng() % (kRows - slice.k_begin);
      slice.n_begin = rng() % kColumns;
      slice.n_end = slice.n_begin + 1 + rng() % (kColumns - slice.n_begin);
      constexpr int64_t kFirstColumn = 3;
      HostMatrix part =
          MakeHostMatrix(format, slice.num_rows(), kFirstColumn + slice.num_columns());
      if (format == WeightFormat::kWint8) {
        UnpackWint8({kRows, kColumns, bytes.data(), whole.channel_scale.data()}, slice,
                    kFirstColumn, part);
      } else {
        UnpackWint4({kRows, kColumns, bytes.data(), whole.channel_scale.data()}, slice,
                    kFirstColumn, part);
      }
      for (int64_t row = 0; row < part.k; ++row) {
        for (int64_t column = 0; column < slice.num_columns(); ++column) {
          ASSERT_EQ(part.codes_i8[row * part.n + kFirstColumn + column],
                    whole.codes_i8[(slice.k_begin + row) * kColumns + slice.n_begin + column]);
        }
        for (int64_t column = 0; column < kFirstColumn; ++column) {
          ASSERT_EQ(part.codes_i8[row * part.n + column], 0) << "wrote outside its columns";
        }
      }
    }
  }
}

}  // namespace
}  // namespace wintserve::formats
