#include "kernels/cpu/matmul.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/fma_block-inl.h"
#include "kernels/cpu/weight_codec-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

// Up to this many rows decoding is fused into the multiplication, beyond it goes through a panel.
inline constexpr int kMaxFusedRows = 4;

template <template <int> class Codec, int kRows>
HWY_NOINLINE void MatmulFused(const PackedMatrix& w, const uint8_t* tile,
                              const float* const* x_rows, float* out, int64_t out_stride) {
  constexpr int kVecs = BlockVecs(kRows, kTileColumns);
  const D d;
  const int64_t step = w.quad_step();
  const int64_t jump = w.quad_jump();
  const float* x[kRows];
  WINTSERVE_UNROLL
  for (int r = 0; r < kRows; ++r) x[r] = x_rows[r];

  for (int column = 0; column < kTileColumns; column += kVecs * kLanes) {
    Codec<kVecs> codec(w, tile, column);
    V sum[kRows][kVecs];
    WINTSERVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      WINTSERVE_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = hn::Zero(d);
    }
    for (int64_t k_begin = 0; k_begin < w.k(); k_begin += kGroupRows) {
      codec.StartGroup(k_begin / kGroupRows);
      const int num_quads = static_cast<int>(std::min<int64_t>(kGroupRows, w.k() - k_begin) / 4);
      for (int quad = 0; quad < num_quads; ++quad) {
        const int64_t k = k_begin + (quad & ~3) * 4 + (quad & 3) * step;
        WINTSERVE_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          V weights[4];
          codec.Quad(quad, v, weights);
          WINTSERVE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            sum[r][v] = hn::MulAdd(hn::Set(d, x[r][k]), weights[0], sum[r][v]);
            sum[r][v] = hn::MulAdd(hn::Set(d, x[r][k + 1]), weights[1], sum[r][v]);
            sum[r][v] = hn::MulAdd(hn::Set(d, x[r][k + jump]), weights[2], sum[r][v]);
            sum[r][v] = hn::MulAdd(hn::Set(d, x[r][k + jump + 1]), weights[3], sum[r][v]);
          }
        }
      }
    }
    WINTSERVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      WINTSERVE_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        hn::StoreU(sum[r][v], d, out + r * out_stride + column + v * kLanes);
      }
    }
  }
}

// panel [num_k, kTileColumns] in storage order. k_begin % kGroupRows == 0.
template <template <int> class Codec>
HWY_NOINLINE void DecodePanel(const PackedMatrix& w, const uint8_t* tile, int64_t k_begin,
                              int64_t num_k, float* panel) {
  constexpr int kVecs = BlockVecs(kMaxBlockRows, kTileColumns);
  for (int column = 0; column < kTileColumns; column += kVecs * kLanes) {
    Codec<kVecs> codec(w, tile, column);
    for (int64_t k = 0; k < num_k; k += kGroupRows) {
      codec.StartGroup((k_begin + k) / kGroupRows);
      const int num_quads = static_cast<int>(std::min<int64_t>(kGroupRows, num_k - k) / 4);
      for (int quad = 0; quad < num_quads; ++quad) {
        float* out = panel + (k + quad * 4) * kTileColumns + column;
        WINTSERVE_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          V weights[4];
          codec.Quad(quad, v, weights);
          WINTSERVE_UNROLL
          for (int i = 0; i < 4; ++i) {
            hn::StoreU(weights[i], D(), out + i * kTileColumns + v * kLanes);
          }
        }
      }
    }
  }
}

template <template <int> class Codec>
void MatmulWith(const PackedMatrix& w, const uint8_t* tile, const float* const* x_rows,
                int64_t num_rows, float* panel, float* out, int64_t out_stride) {
  switch (num_rows) {
    case 0:
      return;
    case 1:
      return MatmulFused<Codec, 1>(w, tile, x_rows, out, out_stride);
    case 2:
      return MatmulFused<Codec, 2>(w, tile, x_rows, out, out_stride);
    case 3:
      return MatmulFused<Codec, 3>(w, tile, x_rows, out, out_stride);
    case kMaxFusedRows:
      return MatmulFused<Codec, 4>(w, tile, x_rows, out, out_stride);
    default:
      break;
  }
  for (int64_t k_begin = 0; k_begin < w.k(); k_begin += kPanelRows) {
    const int64_t num_k = std::min(kPanelRows, w.k() - k_begin);
    DecodePanel<Codec>(w, tile, k_begin, num_k, panel);
    // Blocks of rows take their pointers shifted to the panel's first k.
    constexpr int64_t kPointers = 8 * kMaxBlockRows;
    for (int64_t first = 0; first < num_rows; first += kPointers) {
      const int64_t rows = std::min(kPointers, num_rows - first);
      const float* x[kPointers];
      for (int64_t r = 0; r < rows; ++r) x[r] = x_rows[first + r] + k_begin;
      MultiplyPanel(x, rows,
                    {panel, kTileColumns, num_k, kTileColumns, w.quad_step(), w.quad_jump()},
                    /*accumulate=*/k_begin > 0, out + first * out_stride, out_stride);
    }
  }
}

void MatmulTileImpl(const PackedMatrix& w, int64_t tile_index, const float* const* x_rows,
                    int64_t num_rows, float* panel, float* out, int64_t out_stride) {
  const uint8_t* tile = w.tile(tile_index);
  switch (w.format()) {
    case formats::WeightFormat::kFloat32:
      return MatmulWith<Float32Codec>(w, tile, x_rows, num_rows, panel, out, out_stride);
    case formats::WeightFormat::kBfloat16:
      return MatmulWith<Bfloat16Codec>(w, tile, x_rows, num_rows, panel, out, out_stride);
    case formats::WeightFormat::kWint8:
      return MatmulWith<Wint8Codec>(w, tile, x_rows, num_rows, panel, out, out_stride);
    case formats::WeightFormat::kWint4:
      return MatmulWith<Wint4Codec>(w, tile, x_rows, num_rows, panel, out, out_stride);
    case formats::WeightFormat::kWint2:
      return MatmulWith<Wint2Codec>(w, tile, x_rows, num_rows, panel, out, out_stride);
  }
}

void SwiGluTileImpl(const float* gate, const float* up, int64_t num_rows, float* out,
                    int64_t out_stride) {
  const D d;
  const V one = hn::Set(d, 1.0f);
  // exp(88) is finite; below g = -88 silu is smaller than 1e-36 anyway.
  const V largest_exponent = hn::Set(d, 88.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int c = 0; c < kTileColumns; c += kLanes) {
      const V g = hn::LoadU(d, gate + r * kTileColumns + c);
      const V u = hn::LoadU(d, up + r * kTileColumns + c);
      const V e = hn::CallExp(d, hn::Min(hn::Neg(g), largest_exponent));
      const V silu = hn::Div(g, hn::Add(one, e));
      hn::StoreU(hn::Mul(silu, u), d, out + r * out_stride + c);
    }
  }
}

const char* TargetNameImpl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::kernels::cpu {

HWY_EXPORT(MatmulTileImpl);
HWY_EXPORT(SwiGluTileImpl);
HWY_EXPORT(TargetNameImpl);

void MatmulTile(const PackedMatrix& w, int64_t tile, const float* const* x_rows, int64_t num_rows,
                float* panel, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(MatmulTileImpl)(w, tile, x_rows, num_rows, panel, out, out_stride);
}

void SwiGluTile(const float* gate, const float* up, int64_t num_rows, float* out,
                int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(SwiGluTileImpl)(gate, up, num_rows, out, out_stride);
}

const char* SimdTargetName() { return HWY_DYNAMIC_DISPATCH(TargetNameImpl)(); }

}  // namespace wintserve::kernels::cpu
#endif
