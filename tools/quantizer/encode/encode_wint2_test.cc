// WINT2 against the format's reference encoder, whose results tests/golden/make_quantizer_golden.py
// recorded, against exhaustive search, and what holds for any weights.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "hwy/highway.h"
#include "kernels/formats/wint2.h"
#include "tools/quantizer/encode/encode_test_util.h"
#include "tools/quantizer/encode/wint2_search.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using ::testing::Each;
using ::testing::HasSubstr;

HostMatrix Encode(const Weights& w, const std::vector<float>& importance = {},
                  const Wint2Options& options = {}, int num_threads = 2) {
  kernels::cpu::ThreadPool pool(num_threads);
  auto matrix = EncodeWint2(w.view(), importance, options, pool);
  EXPECT_TRUE(matrix.ok()) << matrix.status();
  return *std::move(matrix);
}

absl::Status StatusOf(const Weights& w, const std::vector<float>& importance = {},
                      const Wint2Options& options = {}) {
  kernels::cpu::ThreadPool pool(2);
  return EncodeWint2(w.view(), importance, options, pool).status();
}

void ExpectEqual(const HostMatrix& a, const HostMatrix& b) {
  EXPECT_EQ(a.codes_u8, b.codes_u8);
  EXPECT_EQ(a.local_scale, b.local_scale);
  EXPECT_EQ(a.channel_scale, b.channel_scale);
  EXPECT_EQ(a.code_scale, b.code_scale);
  EXPECT_EQ(a.code_zp, b.code_zp);
}

std::vector<float> UniformImportance(int64_t k, unsigned seed) {
  std::mt19937 rng(seed);
  std::vector<float> importance(k);
  for (float& h : importance) h = std::uniform_real_distribution<float>(0.1f, 4.0f)(rng);
  return importance;
}

TEST(EncodeWint2, MakesTheBytesOfTheReference) {
  const nlohmann::json golden = ReadGolden("wint2");
  Weights w(golden["k"], golden["n"]);
  w.values = FromBfloat16Hex(golden["weight_bits_hex"]);
  std::vector<CodeMap> maps;
  for (const auto& map : golden["maps"]) maps.push_back({map[0], map[1], map[2]});
  ASSERT_EQ(golden["cases"].size(), 4u);
  for (const nlohmann::json& expected : golden["cases"]) {
    SCOPED_TRACE(fmt::format("{} maps, {}, {}", expected["num_maps"].get<int>(),
                             expected["k_order"].get<std::string>(),
                             expected["weighted"] ? "importance" : "no importance"));
    const Wint2Options options = {
        .maps = std::span(maps).first(expected["num_maps"]),
        .k_order = expected["k_order"] == "mma64" ? KOrder::kMma64 : KOrder::kNatural,
        .local_scale_radius = expected["local_scale_radius"],
        .num_refits = 0};
    const std::vector<float> importance = expected["weighted"]
                                              ? FromBfloat16Hex(golden["importance_bits_hex"])
                                              : std::vector<float>();
    const HostMatrix matrix = Encode(w, importance, options);
    EXPECT_EQ(matrix.codes_u8, FromHex(expected["quant_weight_hex"]));
    EXPECT_EQ(formats::PackWint2LocalScale(matrix), FromHex(expected["weight_scale_hex"]));
    EXPECT_EQ(matrix.channel_scale, FromBfloat16Hex(expected["super_scales_hex"]));
    EXPECT_EQ(matrix.code_scale, expected["code_scale"].get<std::vector<float>>());
    EXPECT_EQ(matrix.code_zp, expected["code_zp"].get<std::vector<float>>());
    EXPECT_EQ(matrix.k_order, options.k_order);
  }
}

// Whether every byte is the best of 256 for its scale, with sums in float64.
void ExpectBestBytes(const Weights& w, const std::vector<float>& importance,
                     const HostMatrix& matrix) {
  int64_t num_wrong = 0;
  for (int64_t byte_row = 0; byte_row < w.k / 4; ++byte_row) {
    for (int64_t column = 0; column < w.n; ++column) {
      const int64_t group = byte_row / kGroupBytes;
      const double scale = formats::RoundToBfloat16(matrix.local_scale[group * w.n + column] *
                                                    matrix.channel_scale[column]);
      const auto terms_of = [&](int byte) {
        const int32_t code = formats::Wint2Code(static_cast<uint8_t>(byte),
                                                matrix.code_scale[column], matrix.code_zp[column]);
        double error = 0;
        double size = 0;
        for (int slot = 0; slot < 4; ++slot) {
          const int stored_row = static_cast<int>(byte_row % kGroupBytes) * 4 + slot;
          const int64_t row =
              group * kGroupRows + formats::Wint2TrueRow(stored_row, matrix.k_order);
          const double h = importance.empty() ? 1.0 : importance[row];
          const double x = w.values[row * w.n + column];
          const double decoded = scale * formats::Wint2Value(code, slot);
          error += h * (x - decoded) * (x - decoded);
          size += h * (std::abs(x) + std::abs(decoded)) * (std::abs(x) + std::abs(decoded));
        }
        return std::pair(error, size);
      };
      const auto [error, size] = terms_of(matrix.codes_u8[byte_row * w.n + column]);
      for (int byte = 0; byte < kNumBytes; ++byte) {
        const auto [other_error, other_size] = terms_of(byte);
        // A cost has a dozen roundings, each of at most 2^-24 of its terms' magnitudes.
        if (other_error < error - 12 * 0x1p-24 * (size + other_size)) ++num_wrong;
      }
    }
  }
  EXPECT_EQ(num_wrong, 0);
}

TEST(EncodeWint2, EveryByteIsTheBestForItsScale) {
  const Weights w = NormalWeights(256, 40, 5);
  const std::vector<float> importance = UniformImportance(256, 6);
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    for (const KOrder order : {KOrder::kMma64, KOrder::kNatural}) {
      ExpectBestBytes(w, {}, Encode(w, {}, {.k_order = order}));
      ExpectBestBytes(w, importance, Encode(w, importance, {.k_order = order}));
    }
    hwy::SetSupportedTargetsForTest(0);
  }
}

struct Source {
  const char* name;
  int64_t k;
  int64_t n;
  Weights (*make)(int64_t k, int64_t n);
  double largest_error;
};

class EncodeWint2Error : public testing::TestWithParam<Source> {};

TEST_P(EncodeWint2Error, StaysBelowItsBound) {
  const Weights w = GetParam().make(GetParam().k, GetParam().n);
  const double error = NormalizedError(w, Encode(w));
  RecordProperty("normalized_error", fmt::format("{:.5f}", error));
  EXPECT_LE(error, GetParam().largest_error);
}

Weights Normal(int64_t k, int64_t n) { return NormalWeights(k, n, 1); }
Weights Laplace(int64_t k, int64_t n) {
  return RandomWeights(k, n, 1, [](std::mt19937& rng) {
    const float magnitude = std::exponential_distribution<float>()(rng);
    return rng() % 2 == 0 ? magnitude : -magnitude;
  });
}
Weights StudentT5(int64_t k, int64_t n) {
  return RandomWeights(k, n, 1, std::student_t_distribution<float>(5));
}

// What the reference encoder reaches with these maps: 0.1025, 0.1038, 0.392^2 and 0.396^2.
INSTANTIATE_TEST_SUITE_P(All, EncodeWint2Error,
                         testing::Values(Source{"Normal", 1024, 512, Normal, 0.1025},
                                         Source{"NormalOfManyRows", 8192, 64, Normal, 0.1038},
                                         Source{"Laplace", 2048, 128, Laplace, 0.1537},
                                         Source{"StudentT5", 2048, 128, StudentT5, 0.1568}),
                         [](const auto& info) { return info.param.name; });

TEST(EncodeWint2, MoreMapsAndRefitsOnlyLowerTheErrorOfAColumn) {
  const Weights w = Laplace(512, 64);
  const std::vector<float> importance = UniformImportance(512, 7);
  const auto one = formats::DecodeToFloat(
      Encode(w, importance, {.maps = DefaultCodeMaps().first(1), .num_refits = 0}));
  const auto all = formats::DecodeToFloat(Encode(w, importance, {.num_refits = 0}));
  const auto refitted = formats::DecodeToFloat(Encode(w, importance, {.num_refits = 3}));
  int num_lower = 0;
  for (int64_t column = 0; column < w.n; ++column) {
    const double one_error = ColumnError(w, one, column, importance);
    const double all_error = ColumnError(w, all, column, importance);
    const double refitted_error = ColumnError(w, refitted, column, importance);
    // Decoded weights are rounded to bf16 once more than the search knows: by up to 2^-9 of each.
    EXPECT_LE(all_error, one_error * 1.002);
    EXPECT_LE(refitted_error, all_error * 1.002);
    num_lower += refitted_error < all_error ? 1 : 0;
  }
  EXPECT_GT(num_lower, w.n / 2);
}

TEST(EncodeWint2, ImportanceLowersTheErrorThatItWeighs) {
  const Weights w = NormalWeights(512, 64, 8);
  std::vector<float> importance(512, 0.01f);
  for (size_t row = 0; row < importance.size(); row += 7) importance[row] = 100.0f;
  const auto plain = formats::DecodeToFloat(Encode(w));
  const auto weighted = formats::DecodeToFloat(Encode(w, importance));
  double plain_error = 0;
  double weighted_error = 0;
  for (int64_t column = 0; column < w.n; ++column) {
    plain_error += ColumnError(w, plain, column, importance);
    weighted_error += ColumnError(w, weighted, column, importance);
  }
  // Where one weight of a byte counts alone, 256 codewords come far closer to it than to four.
  EXPECT_LT(weighted_error, plain_error / 4);
}

TEST(EncodeWint2, EncodesDecodedWeightsAsThemselves) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed=" << seed);
  std::mt19937 rng(seed);
  HostMatrix matrix = formats::MakeHostMatrix(formats::WeightFormat::kWint2, 512, 64);
  const CodeMap map = DefaultCodeMaps()[0];
  for (uint8_t& code : matrix.codes_u8) code = static_cast<uint8_t>(rng() >> 24);
  for (uint8_t& local : matrix.local_scale) local = static_cast<uint8_t>(8 + rng() % 8);
  for (int64_t column = 0; column < matrix.n; ++column) {
    matrix.local_scale[column] = 15;
    matrix.channel_scale[column] =
        formats::RoundToBfloat16(std::uniform_real_distribution<float>(1e-3f, 2e-3f)(rng));
    matrix.code_scale[column] = map.code_scale;
    matrix.code_zp[column] = map.code_zp;
  }
  Weights w(matrix.k, matrix.n);
  w.values = formats::DecodeToFloat(matrix);
  const HostMatrix again = Encode(w, {}, {.maps = DefaultCodeMaps().first(1), .num_refits = 4});
  EXPECT_EQ(formats::DecodeToFloat(again), w.values);
}

TEST(EncodeWint2, ZerosStayZeros) {
  Weights w = NormalWeights(256, 3, 9);
  for (int64_t row = 0; row < w.k; ++row) w.At(row, 1) = 0;
  for (int64_t row = 64; row < 128; ++row) w.At(row, 2) = 0;
  const HostMatrix matrix = Encode(w);
  const std::vector<float> decoded = formats::DecodeToFloat(matrix);
  for (int64_t row = 0; row < w.k; ++row) EXPECT_EQ(decoded[row * 3 + 1], 0);
  for (int64_t row = 64; row < 128; ++row) EXPECT_EQ(decoded[row * 3 + 2], 0);
  EXPECT_EQ(matrix.local_scale[1 * 3 + 2], 0);
  EXPECT_NE(matrix.local_scale[0 * 3 + 2], 0);
  EXPECT_GE(matrix.channel_scale[1], 0x1p-126f);
}

TEST(EncodeWint2, RowsWithoutImportanceDecodeToZeros) {
  const Weights w = NormalWeights(256, 3, 9);
  std::vector<float> importance(256, 1.0f);
  std::fill_n(importance.begin() + 64, 64, 0.0f);
  const HostMatrix matrix = Encode(w, importance);
  for (int column = 0; column < 3; ++column) EXPECT_EQ(matrix.local_scale[3 + column], 0);
  EXPECT_THAT(Encode(w, std::vector<float>(256, 0.0f)).local_scale, Each(0));
}

TEST(EncodeWint2, AGroupFarBelowItsColumnBecomesZerosRatherThanNoise) {
  Weights w = NormalWeights(256, 8, 10);
  for (int64_t i = 64 * w.n; i < 128 * w.n; ++i) w.values[i] *= 0x1p-10f;
  const HostMatrix matrix = Encode(w);
  for (int column = 0; column < 8; ++column) EXPECT_EQ(matrix.local_scale[8 + column], 0);
}

TEST(EncodeWint2, PowersOfTwoMoveTheSuperScaleAlone) {
  const Weights w = NormalWeights(256, 40, 11);
  const std::vector<float> importance = UniformImportance(256, 12);
  HostMatrix expected = Encode(w, importance);
  for (const int exponent : {-100, -40, 3, 120}) {
    Weights scaled = w;
    for (float& weight : scaled.values) weight = std::ldexp(weight, exponent);
    std::vector<float> scaled_importance = importance;
    for (float& h : scaled_importance) h = std::ldexp(h, -exponent);
    HostMatrix matrix = Encode(scaled, scaled_importance);
    for (float& scale : matrix.channel_scale) scale = std::ldexp(scale, -exponent);
    ExpectEqual(matrix, expected);
  }
}

TEST(EncodeWint2, IsNeverWorseThanZerosAndItsScalesAreNormalNumbers) {
  std::mt19937 rng(13);
  Weights w(256, 300);
  for (int64_t column = 0; column < w.n; ++column) {
    // From subnormal to the largest that is taken, and groups of very different size.
    const int exponent = std::min(static_cast<int>(column) - 150, 127);
    for (int64_t row = 0; row < w.k; ++row) {
      const float fraction = std::uniform_real_distribution<float>(-1, 1)(rng);
      w.At(row, column) = std::ldexp(fraction, exponent - static_cast<int>(row / 64 * 3));
    }
  }
  for (int64_t row = 0; row < w.k; ++row) {
    w.At(row, 299) = row % 2 == 0 ? kLargestWeight : -kLargestWeight;
  }
  const HostMatrix matrix = Encode(w);
  const std::vector<float> decoded = formats::DecodeToFloat(matrix);
  const std::vector<float> zeros(decoded.size());
  for (int64_t column = 0; column < w.n; ++column) {
    EXPECT_GE(matrix.channel_scale[column], 0x1p-126f);
    EXPECT_LE(matrix.channel_scale[column], 0x1p119f);
    EXPECT_EQ(matrix.channel_scale[column], formats::RoundToBfloat16(matrix.channel_scale[column]));
    const double error = ColumnError(w, decoded, column);
    EXPECT_TRUE(std::isfinite(error));
    // Where no scale is cut off, as good as anywhere.
    const double share = column > 40 ? 0.25 : 1.0;
    EXPECT_LE(error, share * ColumnError(w, zeros, column)) << column;
  }
}

TEST(EncodeWint2, DoesNotDependOnThreadsOrOnTheColumnsBeside) {
  const Weights w = NormalWeights(256, 71, 14);
  const HostMatrix expected = Encode(w, {}, {}, 1);
  ExpectEqual(Encode(w, {}, {}, 3), expected);
  for (const int64_t column : {0, 37, 70}) {
    Weights alone(w.k, 1);
    for (int64_t row = 0; row < w.k; ++row) alone.values[row] = w.values[row * w.n + column];
    const HostMatrix matrix = Encode(alone);
    for (int64_t i = 0; i < w.k / 4; ++i) {
      ASSERT_EQ(matrix.codes_u8[i], expected.codes_u8[i * w.n + column]);
    }
    EXPECT_EQ(matrix.channel_scale[0], expected.channel_scale[column]);
  }
}

TEST(EncodeWint2, RefusesWhatIsNoNumberAndSaysWhereItIs) {
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), 0x1.000002p127f}) {
    Weights w = NormalWeights(128, 40, 1);
    w.At(77, 33) = value;
    w.At(78, 2) = value;
    EXPECT_EQ(StatusOf(w).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(StatusOf(w).message(), HasSubstr("row 77, column 33"));
  }
}

TEST(EncodeWint2, RefusesImportanceThatIsNone) {
  const Weights w = NormalWeights(128, 4, 1);
  EXPECT_THAT(StatusOf(w, std::vector<float>(64, 1.0f)).message(),
              HasSubstr("importance of 64 rows for a matrix of 128"));
  for (const float value : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    std::vector<float> importance(128, 1.0f);
    importance[19] = value;
    EXPECT_THAT(StatusOf(w, importance).message(), HasSubstr("importance of row 19"));
  }
}

TEST(EncodeWint2, RefusesAnOddNumberOfGroups) {
  EXPECT_THAT(StatusOf(NormalWeights(192, 4, 1)).message(),
              HasSubstr("192 rows: wint2 needs a multiple of 128"));
}

TEST(EncodeWint2, RefusesOptionsOutOfRange) {
  const Weights w = NormalWeights(128, 4, 1);
  EXPECT_THAT(StatusOf(w, {}, {.maps = {}}).message(), HasSubstr("no code map"));
  const CodeMap wraps = {129.0f, 0.0f, 0.06f};
  EXPECT_THAT(StatusOf(w, {}, {.maps = {&wraps, 1}}).message(), HasSubstr("byte 255"));
  EXPECT_THAT(StatusOf(w, {}, {.local_scale_radius = 8}).message(),
              HasSubstr("local_scale_radius 8"));
  EXPECT_THAT(StatusOf(w, {}, {.local_scale_radius = -1}).message(),
              HasSubstr("local_scale_radius -1"));
  EXPECT_THAT(StatusOf(w, {}, {.num_refits = -1}).message(), HasSubstr("num_refits -1"));
}

}  // namespace
}  // namespace wintserve::quantizer
