#include "kernels/cpu/packed_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/format_name.h"

namespace wintserve::kernels::cpu {
namespace {

using formats::FormatName;
using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

int64_t TileBytes(WeightFormat format, int64_t k) {
  constexpr int64_t kFloats = kTileColumns * sizeof(float);
  switch (format) {
    case WeightFormat::kFloat32:
      return k * kFloats;
    case WeightFormat::kBfloat16:
      return k / 2 * kFloats;
    case WeightFormat::kWint8:
      return kFloats + k * kTileColumns;
    case WeightFormat::kWint4:
      return kFloats + k / 2 * kTileColumns;
    case WeightFormat::kWint2:
      return 3 * kFloats + k / kGroupRows * (kTileColumns / 2 + kGroupRows / 4 * kTileColumns);
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

// The rounding trick multiplies by 2^16 and must meet neither overflow nor subnormal numbers:
// codes reach 128 * 15.
absl::Status CheckScales(const HostMatrix& matrix) {
  constexpr float kSmallest = 0x1p-100f;
  constexpr float kLargest = 0x1p90f;
  for (int64_t column = 0; column < matrix.n; ++column) {
    const float scale = matrix.channel_scale[column];
    const float magnitude = std::fabs(scale);
    if (scale != 0 && !(magnitude >= kSmallest && magnitude <= kLargest)) {
      return absl::InvalidArgumentError(
          fmt::format("{} scale of column {} is {}; allowed are 0 and magnitudes of 2^-100 to 2^90",
                      FormatName(matrix.format), column, scale));
    }
    if ((std::bit_cast<uint32_t>(scale) & 0xFFFF) != 0) {
      return absl::InvalidArgumentError(
          fmt::format("{} scale of column {} is {}, which bfloat16 cannot represent",
                      FormatName(matrix.format), column, scale));
    }
  }
  return absl::OkStatus();
}

// Codes are computed in float32 as integers of at most 22 bits.
absl::Status CheckCodes(const HostMatrix& matrix) {
  constexpr float kLargest = 0x1p22f - 1;
  for (int64_t column = 0; column < matrix.n; ++column) {
    const float scale = matrix.code_scale[column];
    const float zp = matrix.code_zp[column];
    if (!(255 * std::fabs(scale) + std::fabs(zp) <= kLargest)) {
      return absl::InvalidArgumentError(fmt::format(
          "wint2 codes of column {} (code_scale {}, code_zp {}) exceed 2^22", column, scale, zp));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckShape(const HostMatrix& matrix, MatrixUse use) {
  const int64_t multiple = matrix.format == WeightFormat::kWint2 ? kGroupRows : 4;
  if (matrix.k <= 0 || matrix.k % multiple != 0) {
    return absl::InvalidArgumentError(
        fmt::format("a {} matrix has k = {}; it must be a multiple of {}",
                    FormatName(matrix.format), matrix.k, multiple));
  }
  if (matrix.n <= 0 || (use == MatrixUse::kGateUp && matrix.n % 2 != 0)) {
    return absl::InvalidArgumentError(
        fmt::format("a {} {} matrix has n = {}; it must be {}", FormatName(matrix.format),
                    use == MatrixUse::kGateUp ? "gate-up" : "linear", matrix.n,
                    use == MatrixUse::kGateUp ? "even and positive" : "positive"));
  }
  return absl::OkStatus();
}

// Copies columns of a host matrix into a zeroed tile, row after row.
class TileWriter {
 public:
  TileWriter(const HostMatrix& matrix, uint8_t* tile) : m_(matrix), tile_(tile) {}

  void CopyColumns(int64_t first, int count) {
    switch (m_.format) {
      case WeightFormat::kFloat32:
        for (int64_t k = 0; k < m_.k; ++k) {
          std::memcpy(Floats() + k * kTileColumns, &m_.values_f32[At(k, first)],
                      count * sizeof(float));
        }
        return;
      case WeightFormat::kBfloat16: {
        auto* out = reinterpret_cast<uint16_t*>(tile_);
        for (int64_t k = 0; k < m_.k; ++k) {
          for (int c = 0; c < count; ++c) {
            out[(k / 2 * kTileColumns + c) * 2 + k % 2] = m_.values_bf16[At(k, first + c)];
          }
        }
        return;
      }
      case WeightFormat::kWint8:
        CopyFloats(m_.channel_scale, first, count, 0);
        for (int64_t k = 0; k < m_.k; ++k) {
          std::memcpy(AfterFloats(1) + k * kTileColumns, &m_.codes_i8[At(k, first)], count);
        }
        return;
      case WeightFormat::kWint4:
        CopyFloats(m_.channel_scale, first, count, 0);
        for (int64_t k = 0; k < m_.k; ++k) {
          for (int c = 0; c < count; ++c) {
            const int nibble = m_.codes_i8[At(k, first + c)] & 15;
            AfterFloats(1)[k / 2 * kTileColumns + c] |= static_cast<uint8_t>(nibble << (k % 2 * 4));
          }
        }
        return;
      case WeightFormat::kWint2:
        CopyWint2Columns(first, count);
        return;
    }
  }

 private:
  int64_t At(int64_t row, int64_t column) const { return row * m_.n + column; }
  float* Floats() { return reinterpret_cast<float*>(tile_); }
  // The bytes behind `count` rows of per-column floats.
  uint8_t* AfterFloats(int count) { return tile_ + count * kTileColumns * sizeof(float); }
  void CopyFloats(const std::vector<float>& from, int64_t first, int count, int row) {
    std::memcpy(Floats() + row * kTileColumns, &from[first], count * sizeof(float));
  }

  void CopyWint2Columns(int64_t first, int count) {
    CopyFloats(m_.channel_scale, first, count, 0);
    CopyFloats(m_.code_scale, first, count, 1);
    for (int c = 0; c < count; ++c) Floats()[2 * kTileColumns + c] = m_.code_zp[first + c] + 0.5f;
    uint8_t* out = AfterFloats(3);
    for (int64_t group = 0; group < m_.k / kGroupRows; ++group) {
      for (int c = 0; c < count; ++c) {
        const int local_scale = m_.local_scale[At(group, first + c)] & 15;
        out[c % 16] |= static_cast<uint8_t>(local_scale << (c / 16 * 4));
      }
      out += kTileColumns / 2;
      for (int quad = 0; quad < kGroupRows / 4; ++quad) {
        // In mma64 order byte 4a + s of a group holds rows of the 16-row block s.
        const int byte = m_.k_order == KOrder::kMma64 ? quad % 4 * 4 + quad / 4 : quad;
        std::memcpy(out, &m_.codes_u8[At(group * (kGroupRows / 4) + byte, first)], count);
        out += kTileColumns;
      }
    }
  }

  const HostMatrix& m_;
  uint8_t* const tile_;
};

}  // namespace

int64_t PackedMatrix::SizeBytes(WeightFormat format, int64_t k, int64_t n, MatrixUse use) {
  PackedMatrix packed;
  packed.use_ = use;
  packed.n_ = n;
  const int halves = use == MatrixUse::kGateUp ? 2 : 1;
  return packed.width_tiles() * halves * TileBytes(format, k);
}

absl::StatusOr<std::unique_ptr<PackedMatrix>> PackedMatrix::Create(const HostMatrix& matrix,
                                                                   MatrixUse use,
                                                                   WeightRounding rounding,
                                                                   ThreadPool* pool) {
  CHECK(use != MatrixUse::kEmbedding);
  RETURN_IF_ERROR(CheckShape(matrix, use));
  if (!matrix.channel_scale.empty()) RETURN_IF_ERROR(CheckScales(matrix));
  if (matrix.format == WeightFormat::kWint2) RETURN_IF_ERROR(CheckCodes(matrix));

  auto packed = std::unique_ptr<PackedMatrix>(new PackedMatrix);
  packed->format_ = matrix.format;
  packed->use_ = use;
  packed->k_ = matrix.k;
  packed->n_ = matrix.n;
  packed->rounder_ = rounding == WeightRounding::kFastDeploy ? kRoundToBf16 : kRoundNothing;
  if (matrix.format == WeightFormat::kWint2 && matrix.k_order == KOrder::kMma64) {
    packed->quad_step_ = 2;
    packed->quad_jump_ = 8;
  }
  const int halves = use == MatrixUse::kGateUp ? 2 : 1;
  packed->num_tiles_ = packed->width_tiles() * halves;
  packed->tile_bytes_ = TileBytes(matrix.format, matrix.k);
  packed->bytes_ = hwy::AllocateAligned<uint8_t>(packed->size_bytes());
  CHECK(packed->bytes_ != nullptr, "no memory for {} bytes", packed->size_bytes());

  ThreadPool caller_alone(1);
  if (pool == nullptr) pool = &caller_alone;
  pool->Run(packed->num_tiles_, matrix.k * matrix.n, [&](int64_t tile, int) {
    const int64_t first = tile / halves * kTileColumns;  // in its half
    const int64_t count = std::min<int64_t>(kTileColumns, packed->width() - first);
    uint8_t* bytes = packed->bytes_.get() + tile * packed->tile_bytes_;
    std::memset(bytes, 0, packed->tile_bytes_);
    TileWriter(matrix, bytes)
        .CopyColumns(tile % halves * packed->width() + first, static_cast<int>(count));
  });
  return packed;
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> EmbeddingTable::Create(const HostMatrix& matrix) {
  if (matrix.format != WeightFormat::kBfloat16 && matrix.format != WeightFormat::kFloat32) {
    return absl::InvalidArgumentError(fmt::format(
        "the embedding is {}; allowed are bfloat16 and float32", FormatName(matrix.format)));
  }
  auto table = std::unique_ptr<EmbeddingTable>(new EmbeddingTable);
  table->k_ = matrix.k;
  table->n_ = matrix.n;
  table->bf16_ = matrix.values_bf16;
  table->f32_ = matrix.values_f32;
  return table;
}

void EmbeddingTable::CopyRow(int64_t token, float* out) const {
  CHECK(token >= 0 && token < k_, "token={} vocabulary={}", token, k_);
  if (!f32_.empty()) {
    std::memcpy(out, f32_.data() + token * n_, n_ * sizeof(float));
    return;
  }
  const uint16_t* row = bf16_.data() + token * n_;
  for (int64_t i = 0; i < n_; ++i) out[i] = std::bit_cast<float>(uint32_t{row[i]} << 16);
}

}  // namespace wintserve::kernels::cpu
