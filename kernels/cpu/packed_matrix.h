// How the CPU backend keeps a weight matrix: column tiles with K-major rows inside.
//
// A tile holds kTileColumns columns. Its weights are read four rows of k at a time, a "quad", in
// storage order; quad q of a 16-row block (q = 0 … 3) holds the rows
//     block * 16 + q * quad_step + {0, 1, quad_jump, quad_jump + 1}.
// Natural order is quad_step 4, quad_jump 2. A WINT2 byte in mma64 order holds the rows
// 2q + {0, 1, 8, 9}, so quad_step 2, quad_jump 8. Every sum over k runs in storage order.
//
// Bytes of a tile, by format (c = column in the tile, j = row pair or quad index):
//   kFloat32   float[k][32]
//   kBfloat16  uint32[k / 2][32]: row 2j in the low half, row 2j + 1 in the high half
//   kWint8     float scale[32], int8[k][32]
//   kWint4     float scale[32], uint8[k / 2][32]: row 2j in the low nibble, 2j + 1 in the high one,
//              two's complement
//   kWint2     float super_scale[32], code_scale[32], code_offset[32] (= code_zp + 0.5), then for
//              every 64 rows: uint8 local_scale[16] (c < 16 low nibble, c - 16 high nibble of the
//              byte c % 16), uint8 quad[16][32]
// Columns beyond n are zero weights.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "hwy/aligned_allocator.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"

namespace wintserve::kernels::cpu {

inline constexpr int kTileColumns = 32;
inline constexpr int kGroupRows = 64;  // k rows that share a WINT2 local scale

// Veltkamp's constant for keeping 8 of 24 bits: with c = w * 65537, c - (c - w) is w rounded to
// bf16 whenever w has at most 16 significant bits, as every code * scale has. With 0 in its place
// the same three operations leave w as it is.
inline constexpr float kRoundToBf16 = 65537.0f;
inline constexpr float kRoundNothing = 0.0f;

class PackedMatrix final : public WeightMatrix {
 public:
  // pool: null for the calling thread alone.
  static absl::StatusOr<std::unique_ptr<PackedMatrix>> Create(const formats::HostMatrix& matrix,
                                                              MatrixUse use,
                                                              WeightRounding rounding,
                                                              ThreadPool* pool = nullptr);

  // size_bytes() of a matrix [k, n].
  static int64_t SizeBytes(formats::WeightFormat format, int64_t k, int64_t n, MatrixUse use);

  int64_t k() const override { return k_; }
  int64_t n() const override { return n_; }
  int64_t size_bytes() const override { return num_tiles_ * tile_bytes_; }

  formats::WeightFormat format() const { return format_; }
  MatrixUse use() const { return use_; }
  int64_t num_tiles() const { return num_tiles_; }
  const uint8_t* tile(int64_t t) const { return bytes_.get() + t * tile_bytes_; }
  int quad_step() const { return quad_step_; }
  int quad_jump() const { return quad_jump_; }
  float rounder() const { return rounder_; }
  // Columns of one half of a kGateUp matrix, else n. Tile 2t holds the gate columns from 32t on and
  // tile 2t + 1 the same up columns; otherwise tile t holds the columns from 32t on.
  int64_t width() const { return use_ == MatrixUse::kGateUp ? n_ / 2 : n_; }
  // Tiles that cover width().
  int64_t width_tiles() const { return (width() + kTileColumns - 1) / kTileColumns; }

 private:
  PackedMatrix() = default;

  formats::WeightFormat format_ = formats::WeightFormat::kFloat32;
  MatrixUse use_ = MatrixUse::kLinear;
  int64_t k_ = 0;
  int64_t n_ = 0;
  int64_t num_tiles_ = 0;
  int64_t tile_bytes_ = 0;
  int quad_step_ = 4;
  int quad_jump_ = 2;
  float rounder_ = kRoundToBf16;
  hwy::AlignedFreeUniquePtr<uint8_t[]> bytes_;
};

// The rows of an embedding table, as they are in the file.
class EmbeddingTable final : public WeightMatrix {
 public:
  static absl::StatusOr<std::unique_ptr<EmbeddingTable>> Create(const formats::HostMatrix& matrix);

  int64_t k() const override { return k_; }
  int64_t n() const override { return n_; }
  int64_t size_bytes() const override {
    return static_cast<int64_t>(bf16_.size() * sizeof(uint16_t) + f32_.size() * sizeof(float));
  }
  // out [n] = row `token` in float32.
  void CopyRow(int64_t token, float* out) const;

 private:
  EmbeddingTable() = default;

  int64_t k_ = 0;
  int64_t n_ = 0;
  std::vector<uint16_t> bf16_;  // one of the two is filled
  std::vector<float> f32_;
};

}  // namespace wintserve::kernels::cpu
