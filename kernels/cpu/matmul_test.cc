#include "kernels/cpu/matmul.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/test_util.h"
#include "kernels/formats/bf16.h"

namespace wintserve::kernels::cpu {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

// Every weight of `matrix` as the kernels decode it: the product with one-hot rows, `rows` of them
// at a time, which sums one weight and zeros.
std::vector<float> DecodeByMultiplying(const HostMatrix& matrix, WeightRounding rounding,
                                       int64_t rows) {
  const auto packed = PackedMatrix::Create(matrix, MatrixUse::kLinear, rounding);
  EXPECT_TRUE(packed.ok()) << packed.status();
  const int64_t k = matrix.k;
  std::vector<float> weights(k * matrix.n);
  std::vector<float> panel(kPanelFloats);
  std::vector<float> out(rows * kTileColumns);
  std::vector<float> one_hot(rows * k);
  for (int64_t first = 0; first < k; first += rows) {
    std::fill(one_hot.begin(), one_hot.end(), 0.0f);
    std::vector<const float*> x_rows(rows);
    for (int64_t r = 0; r < rows; ++r) {
      x_rows[r] = &one_hot[r * k];
      one_hot[r * k + first + r] = 1.0f;
    }
    for (int64_t tile = 0; tile < (*packed)->num_tiles(); ++tile) {
      MatmulTile(**packed, tile, x_rows.data(), rows, panel.data(), out.data(), kTileColumns);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < kTileColumns && tile * kTileColumns + c < matrix.n; ++c) {
          weights[(first + r) * matrix.n + tile * kTileColumns + c] = out[r * kTileColumns + c];
        }
      }
    }
  }
  return weights;
}

// Both ways through the kernels: fused (4 rows) and by panels (64 rows).
void ExpectDecodesExactly(const HostMatrix& matrix) {
  const std::vector<float> expected = formats::DecodeToFloat(matrix);
  ForEachTarget([&] {
    for (const int64_t rows : {4, 64}) {
      SCOPED_TRACE(rows);
      const auto decoded = DecodeByMultiplying(matrix, WeightRounding::kFastDeploy, rows);
      EXPECT_TRUE(decoded == expected);
    }
  });
}

// The 128 bfloat16 significands with both signs, at scattered exponents.
std::vector<float> AllScales() {
  std::vector<float> scales;
  for (int i = 0; i < 128; ++i) {
    const float scale = std::ldexp(1.0f + static_cast<float>(i) / 128, i % 90 - 60);
    scales.push_back(scale);
    scales.push_back(-scale);
  }
  return scales;
}

TEST(Decode, EveryWint8CodeWithEveryScaleSignificandRoundsLikeFastDeploy) {
  HostMatrix m = formats::MakeHostMatrix(WeightFormat::kWint8, 256, 256);
  m.channel_scale = AllScales();
  for (int64_t i = 0; i < m.k * m.n; ++i) m.codes_i8[i] = static_cast<int8_t>(i / m.n - 128);
  ExpectDecodesExactly(m);
}

TEST(Decode, EveryWint4CodeWithEveryScaleSignificandRoundsLikeFastDeploy) {
  HostMatrix m = formats::MakeHostMatrix(WeightFormat::kWint4, 64, 256);
  m.channel_scale = AllScales();
  for (int64_t i = 0; i < m.k * m.n; ++i) m.codes_i8[i] = static_cast<int8_t>(i / m.n % 16 - 8);
  ExpectDecodesExactly(m);
}

TEST(Decode, EveryWint2WeightWithEveryLocalScaleAndSignificandRoundsLikeFastDeploy) {
  // code = byte * 512, so byte b has the weights b % 64 - 32 and the windows of its low bits.
  for (int part = 0; part < 4; ++part) {
    SCOPED_TRACE(part);
    HostMatrix m = formats::MakeHostMatrix(WeightFormat::kWint2, 1024, 256);
    m.channel_scale = AllScales();
    std::fill(m.code_scale.begin(), m.code_scale.end(), 512.0f);
    std::fill(m.code_zp.begin(), m.code_zp.end(), 0.0f);
    for (int64_t i = 0; i < m.k / 4 * m.n; ++i) {
      m.codes_u8[i] = static_cast<uint8_t>(part * 16 + i / m.n % 16);
    }
    for (int64_t i = 0; i < m.k / 64 * m.n; ++i) m.local_scale[i] = static_cast<uint8_t>(i / m.n);
    ExpectDecodesExactly(m);
  }
}

TEST(Decode, EveryWint2ByteUnderRandomCodeMapsBecomesTheFusedCode) {
  std::mt19937 rng(3);
  for (const KOrder order : {KOrder::kNatural, KOrder::kMma64}) {
    HostMatrix m = RandomMatrix(WeightFormat::kWint2, 1024, 352, order, &rng);
    for (int64_t i = 0; i < m.k / 4 * m.n; ++i) m.codes_u8[i] = static_cast<uint8_t>(i / m.n);
    // Maps that land on integers, where a product rounded by itself would floor differently.
    for (int64_t column = 0; column < m.n; column += 2) {
      m.code_scale[column] = 118.0f + static_cast<float>(column) / 37.0f;
      m.code_zp[column] = std::nextafter(-0.5f, 0.0f) - static_cast<float>(column);
    }
    ExpectDecodesExactly(m);
  }
}

TEST(Decode, UnroundedWeightsAreCodeTimesScale) {
  std::mt19937 rng(4);
  HostMatrix m = RandomMatrix(WeightFormat::kWint8, 64, 40, KOrder::kNatural, &rng);
  ForEachTarget([&] {
    const auto weights = DecodeByMultiplying(m, WeightRounding::kUnrounded, 4);
    for (int64_t i = 0; i < m.k * m.n; ++i) {
      ASSERT_EQ(weights[i], static_cast<float>(m.codes_i8[i]) * m.channel_scale[i % m.n]);
    }
  });
}

struct Case {
  std::string name;
  WeightFormat format;
  KOrder k_order = KOrder::kNatural;
};

class MatmulTest : public testing::TestWithParam<Case> {};

struct Shape {
  int64_t k;
  int64_t n;
};
constexpr Shape kShapes[] = {{64, 32}, {128, 33}, {192, 1}, {256, 100}, {384, 64}};
constexpr int64_t kMaxRows = 17;

std::vector<float> Linear(const HostMatrix& m, const std::vector<float>& x, int64_t x_stride,
                          int64_t first, int64_t rows, int num_threads) {
  const auto backend = CreateCpuBackend({.num_threads = num_threads});
  const auto w = backend->Pack(m, MatrixUse::kLinear);
  EXPECT_TRUE(w.ok()) << w.status();
  // NaN where nothing may be written.
  const int64_t y_stride = m.n + 5;
  std::vector<float> y(rows * y_stride, std::nanf(""));
  backend->Linear({x.data() + first * x_stride, x_stride}, rows, **w, {y.data(), y_stride});
  std::vector<float> dense;
  for (int64_t r = 0; r < rows; ++r) {
    dense.insert(dense.end(), y.begin() + r * y_stride, y.begin() + r * y_stride + m.n);
    for (int64_t c = m.n; c < y_stride; ++c) EXPECT_TRUE(std::isnan(y[r * y_stride + c]));
  }
  return dense;
}

TEST_P(MatmulTest, StaysWithinTheBoundOfAFloat32Sum) {
  std::mt19937 rng(5);
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(fmt::format("k={} n={}", shape.k, shape.n));
    const HostMatrix m =
        RandomMatrix(GetParam().format, shape.k, shape.n, GetParam().k_order, &rng);
    const std::vector<float> w = formats::DecodeToFloat(m);
    const std::vector<float> x = RandomFloats(kMaxRows * shape.k, &rng);
    ForEachTarget([&] {
      const auto y = Linear(m, x, shape.k, 0, kMaxRows, 1);
      for (int64_t r = 0; r < kMaxRows; ++r) {
        const auto row = Exact(&x[r * shape.k], shape.k);
        for (int64_t c = 0; c < shape.n; ++c) {
          ExpectWithin(DotReference(row, w, shape.n, c), y[r * shape.n + c]);
        }
      }
    });
  }
}

TEST_P(MatmulTest, ARowHasTheSameBitsInBatchesOfEverySize) {
  std::mt19937 rng(6);
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(fmt::format("k={} n={}", shape.k, shape.n));
    const HostMatrix m =
        RandomMatrix(GetParam().format, shape.k, shape.n, GetParam().k_order, &rng);
    const std::vector<float> x = RandomFloats(kMaxRows * shape.k, &rng);
    ForEachTarget([&] {
      std::vector<float> alone;
      for (int64_t r = 0; r < kMaxRows; ++r) {
        const auto row = Linear(m, x, shape.k, r, 1, 1);
        alone.insert(alone.end(), row.begin(), row.end());
      }
      for (int64_t rows = 2; rows <= kMaxRows; ++rows) {
        const auto together = Linear(m, x, shape.k, 0, rows, 1);
        EXPECT_TRUE(std::equal(together.begin(), together.end(), alone.begin())) << rows;
      }
    });
  }
}

TEST_P(MatmulTest, ThreadsDoNotChangeBits) {
  std::mt19937 rng(7);
  // One tile and many rows, so that rows are split too; many tiles and one row.
  for (const auto& [k, n, rows] : {std::tuple{256, 16, 300}, {384, 1024, 1}, {128, 200, 65}}) {
    const HostMatrix m = RandomMatrix(GetParam().format, k, n, GetParam().k_order, &rng);
    const std::vector<float> x = RandomFloats(rows * k, &rng);
    const auto expected = Linear(m, x, k, 0, rows, 1);
    for (const int threads : {2, 3, 8}) {
      EXPECT_TRUE(Linear(m, x, k, 0, rows, threads) == expected) << threads << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, MatmulTest,
    testing::Values(Case{"Float32", WeightFormat::kFloat32},
                    Case{"Bfloat16", WeightFormat::kBfloat16}, Case{"Wint8", WeightFormat::kWint8},
                    Case{"Wint4", WeightFormat::kWint4},
                    Case{"Wint2Natural", WeightFormat::kWint2, KOrder::kNatural},
                    Case{"Wint2Mma64", WeightFormat::kWint2, KOrder::kMma64}),
    [](const auto& info) { return info.param.name; });

struct BadMatrix {
  const char* name;
  void (*spoil)(HostMatrix*);
  MatrixUse use;
  const char* message;
};

class PackErrors : public testing::TestWithParam<BadMatrix> {};

TEST_P(PackErrors, NameTheValueAndWhatIsAllowed) {
  std::mt19937 rng(8);
  HostMatrix m = RandomMatrix(WeightFormat::kWint2, 128, 32, KOrder::kMma64, &rng);
  GetParam().spoil(&m);
  const auto packed = CreateCpuBackend({})->Pack(m, GetParam().use);
  ASSERT_FALSE(packed.ok());
  EXPECT_EQ(packed.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(packed.status().message()), testing::HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, PackErrors,
    testing::Values(
        BadMatrix{"OddK", [](HostMatrix* m) { m->k = 96; }, MatrixUse::kLinear,
                  "a wint2 matrix has k = 96; it must be a multiple of 64"},
        BadMatrix{"OddGateUp", [](HostMatrix* m) { m->n = 31; }, MatrixUse::kGateUp,
                  "a wint2 gate-up matrix has n = 31; it must be even and positive"},
        BadMatrix{
            "TinyScale", [](HostMatrix* m) { m->channel_scale[7] = 0x1p-120f; }, MatrixUse::kLinear,
            "wint2 scale of column 7 is 7.523164e-37; allowed are 0 and magnitudes of 2^-100"},
        BadMatrix{"NanScale", [](HostMatrix* m) { m->channel_scale[3] = std::nanf(""); },
                  MatrixUse::kLinear, "wint2 scale of column 3 is nan"},
        BadMatrix{"ScaleBeyondBfloat16", [](HostMatrix* m) { m->channel_scale[0] = 0.1f; },
                  MatrixUse::kLinear, "wint2 scale of column 0 is 0.1, which bfloat16 cannot"},
        BadMatrix{"HugeCodes", [](HostMatrix* m) { m->code_scale[2] = 1e9f; }, MatrixUse::kLinear,
                  "wint2 codes of column 2"},
        BadMatrix{"NanCodes", [](HostMatrix* m) { m->code_zp[4] = std::nanf(""); },
                  MatrixUse::kLinear, "wint2 codes of column 4"},
        BadMatrix{"QuantizedEmbedding", [](HostMatrix*) {}, MatrixUse::kEmbedding,
                  "the embedding is wint2; allowed are bfloat16 and float32"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::kernels::cpu
