// WINT4 and WINT8 against PaddlePaddle's own quantiser, whose results
// tests/golden/make_quantizer_golden.py recorded.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <array>
#include <limits>
#include <string>

#include "kernels/formats/wint4.h"
#include "kernels/formats/wint8.h"
#include "tools/quantizer/encode/encode_test_util.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;
using ::testing::Each;
using ::testing::HasSubstr;

struct Format {
  const char* name;
  WeightFormat format;
  int largest_code;
  double largest_error;  // normalised, of normal weights

  std::vector<uint8_t> Pack(const HostMatrix& matrix) const {
    return format == WeightFormat::kWint4 ? formats::PackWint4(matrix) : formats::PackWint8(matrix);
  }
};

class EncodePerChannelTest : public testing::TestWithParam<Format> {
 protected:
  HostMatrix Encode(const Weights& w) {
    auto matrix = EncodePerChannel(GetParam().format, w.view(), pool_);
    EXPECT_TRUE(matrix.ok()) << matrix.status();
    return *std::move(matrix);
  }
  absl::Status StatusOf(const Weights& w) {
    return EncodePerChannel(GetParam().format, w.view(), pool_).status();
  }

  kernels::cpu::ThreadPool pool_{2};
};

std::string Sha256(const std::vector<uint8_t>& bytes) {
  std::array<uint8_t, SHA256_DIGEST_LENGTH> digest;
  SHA256(bytes.data(), bytes.size(), digest.data());
  std::string hex;
  for (const uint8_t byte : digest) hex += fmt::format("{:02x}", byte);
  return hex;
}

TEST_P(EncodePerChannelTest, MakesTheBytesOfPaddleAlsoForWeightsHalfwayBetweenCodes) {
  const nlohmann::json golden = ReadGolden(GetParam().name)["small"];
  Weights w(golden["k"], golden["n"]);
  w.values = FromBfloat16Hex(golden["weight_bits_hex"]);
  const HostMatrix matrix = Encode(w);
  EXPECT_EQ(GetParam().Pack(matrix), FromHex(golden["quant_weight_hex"]));
  EXPECT_EQ(matrix.channel_scale, FromBfloat16Hex(golden["weight_scale_hex"]));
}

TEST_P(EncodePerChannelTest, MakesTheBytesOfPaddleForMatricesOfAModelsSize) {
  const nlohmann::json golden = ReadGolden(GetParam().name)["large"];
  ASSERT_EQ(golden.size(), 3u);
  for (const nlohmann::json& large : golden) {
    SCOPED_TRACE(fmt::format("{} x {}", large["k"].get<int>(), large["n"].get<int>()));
    const HostMatrix matrix = Encode(MixedWeights(large["k"], large["n"]));
    EXPECT_EQ(Sha256(GetParam().Pack(matrix)), large["quant_weight_sha256"]);
    EXPECT_EQ(matrix.channel_scale, FromBfloat16Hex(large["weight_scale_hex"]));
  }
}

TEST_P(EncodePerChannelTest, ComesAsNearToNormalWeightsAsTheFormatAllows) {
  EXPECT_LE(NormalizedError(NormalWeights(1024, 512, 1), Encode(NormalWeights(1024, 512, 1))),
            GetParam().largest_error);
}

TEST_P(EncodePerChannelTest, IsNeverWorseThanZerosAndAlwaysFinite) {
  std::mt19937 rng(3);
  Weights w(64, 300);
  for (int64_t column = 0; column < w.n; ++column) {
    // From subnormal to the largest that is taken.
    const int exponent = static_cast<int>(column) - 150;
    for (int64_t row = 0; row < w.k; ++row) {
      const float fraction = std::uniform_real_distribution<float>(-1, 1)(rng);
      w.At(row, column) = std::ldexp(fraction, std::min(exponent, 127));
    }
  }
  w.At(5, 299) = kLargestWeight;
  const HostMatrix matrix = Encode(w);
  const std::vector<float> decoded = formats::DecodeToFloat(matrix);
  const std::vector<float> zeros(decoded.size());
  for (int64_t column = 0; column < w.n; ++column) {
    EXPECT_TRUE(std::isfinite(matrix.channel_scale[column]));
    EXPECT_LE(ColumnError(w, decoded, column), ColumnError(w, zeros, column)) << column;
  }
}

TEST_P(EncodePerChannelTest, EncodesDecodedWeightsAsThemselves) {
  std::mt19937 rng(4);
  const int largest = GetParam().largest_code;
  HostMatrix matrix = formats::MakeHostMatrix(GetParam().format, 128, 64);
  for (int8_t& code : matrix.codes_i8) {
    code = static_cast<int8_t>(std::uniform_int_distribution<int>(-largest, largest)(rng));
  }
  for (int64_t column = 0; column < matrix.n; ++column) {
    matrix.codes_i8[column] = static_cast<int8_t>(column % 2 == 0 ? largest : -largest);
    // A power of two: what the largest code decodes to tells the scale without rounding.
    matrix.channel_scale[column] = std::ldexp(1.0f, static_cast<int>(column) - 40);
  }
  Weights w(matrix.k, matrix.n);
  w.values = formats::DecodeToFloat(matrix);
  const HostMatrix again = Encode(w);
  EXPECT_EQ(again.codes_i8, matrix.codes_i8);
  EXPECT_EQ(again.channel_scale, matrix.channel_scale);
}

TEST_P(EncodePerChannelTest, GivesZerosTheCodeZero) {
  const HostMatrix matrix = Encode(Weights(64, 4));
  EXPECT_THAT(matrix.codes_i8, Each(0));
  EXPECT_THAT(matrix.channel_scale, Each(0.0f));
}

TEST_P(EncodePerChannelTest, RefusesWhatItCannotHoldAndSaysWhereItIs) {
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), 0x1.000002p127f}) {
    Weights w = NormalWeights(128, 80, 1);
    w.At(77, 66) = value;
    w.At(78, 2) = value;
    const absl::Status status = StatusOf(w);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("row 77, column 66"));
  }
}

TEST_P(EncodePerChannelTest, RefusesShapesThatTheStoredLayoutHasNoPlaceFor) {
  EXPECT_THAT(StatusOf(Weights(96, 4)).message(), HasSubstr("96 rows and 4 columns"));
  EXPECT_THAT(StatusOf(Weights(64, 3)).message(), HasSubstr("64 rows and 3 columns"));
  EXPECT_THAT(StatusOf(Weights(0, 4)).message(), HasSubstr("0 rows"));
}

INSTANTIATE_TEST_SUITE_P(All, EncodePerChannelTest,
                         testing::Values(Format{"wint4", WeightFormat::kWint4, 7, 0.0205},
                                         Format{"wint8", WeightFormat::kWint8, 127, 7e-5}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::quantizer
