// Decoding of packed weights, four k rows (a quad) of one vector of columns at a time. A codec
// reads kVecs vectors of columns of one tile; StartGroup(g) moves it to the 64 rows from 64g on.
#if defined(WINTSERVE_KERNELS_CPU_WEIGHT_CODEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINTSERVE_KERNELS_CPU_WEIGHT_CODEC_INL_H_
#undef WINTSERVE_KERNELS_CPU_WEIGHT_CODEC_INL_H_
#else
#define WINTSERVE_KERNELS_CPU_WEIGHT_CODEC_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

using DI32 = hn::Rebind<int32_t, D>;
using DU32 = hn::Rebind<uint32_t, D>;
using VI32 = hn::Vec<DI32>;

// q * scale, rounded as kRoundToBf16 says; scale_rounder = scale * 65537 or 0. The product is
// exact.
HWY_INLINE V ScaleAndRound(V q, V scale, V scale_rounder) {
  const V c = hn::Mul(q, scale_rounder);
  return hn::Sub(c, hn::NegMulAdd(q, scale, c));
}

HWY_INLINE V ToFloat(VI32 q) { return hn::ConvertTo(D(), q); }

HWY_INLINE VI32 LoadBytes(const uint8_t* from) {
  return hn::PromoteTo(DI32(), hn::LoadU(hn::Rebind<uint8_t, D>(), from));
}

HWY_INLINE VI32 LoadSignedBytes(const uint8_t* from) {
  return hn::PromoteTo(DI32(),
                       hn::LoadU(hn::Rebind<int8_t, D>(), reinterpret_cast<const int8_t*>(from)));
}

template <int kVecs>
class Float32Codec {
 public:
  Float32Codec(const PackedMatrix& /*m*/, const uint8_t* tile, int column)
      : base_(reinterpret_cast<const float*>(tile) + column) {}

  HWY_INLINE void StartGroup(int64_t group) { rows_ = base_ + group * kGroupRows * kTileColumns; }

  HWY_INLINE void Quad(int quad, int v, V (&w)[4]) const {
    WINTSERVE_UNROLL
    for (int i = 0; i < 4; ++i) {
      w[i] = hn::LoadU(D(), rows_ + (quad * 4 + i) * kTileColumns + v * kLanes);
    }
  }

 private:
  const float* base_;
  const float* rows_ = nullptr;
};

template <int kVecs>
class Bfloat16Codec {
 public:
  Bfloat16Codec(const PackedMatrix& /*m*/, const uint8_t* tile, int column)
      : base_(reinterpret_cast<const uint32_t*>(tile) + column) {}

  HWY_INLINE void StartGroup(int64_t group) {
    pairs_ = base_ + group * (kGroupRows / 2) * kTileColumns;
  }

  HWY_INLINE void Quad(int quad, int v, V (&w)[4]) const {
    const DU32 du;
    WINTSERVE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const auto pair = hn::LoadU(du, pairs_ + (quad * 2 + i) * kTileColumns + v * kLanes);
      w[2 * i] = hn::BitCast(D(), hn::ShiftLeft<16>(pair));
      w[2 * i + 1] = hn::BitCast(D(), hn::And(pair, hn::Set(du, 0xFFFF0000u)));
    }
  }

 private:
  const uint32_t* base_;
  const uint32_t* pairs_ = nullptr;
};

// Channel scales of WINT8 and WINT4.
template <int kVecs>
class ChannelScales {
 public:
  ChannelScales(const PackedMatrix& m, const uint8_t* tile, int column) {
    const D d;
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      scale_[v] = hn::LoadU(d, reinterpret_cast<const float*>(tile) + column + v * kLanes);
      scale_rounder_[v] = hn::Mul(scale_[v], hn::Set(d, m.rounder()));
    }
  }

  HWY_INLINE V Apply(int v, VI32 q) const {
    return ScaleAndRound(ToFloat(q), scale_[v], scale_rounder_[v]);
  }

 private:
  V scale_[kVecs];
  V scale_rounder_[kVecs];
};

template <int kVecs>
class Wint8Codec {
 public:
  Wint8Codec(const PackedMatrix& m, const uint8_t* tile, int column)
      : scales_(m, tile, column), base_(tile + kTileColumns * sizeof(float) + column) {}

  HWY_INLINE void StartGroup(int64_t group) { rows_ = base_ + group * kGroupRows * kTileColumns; }

  HWY_INLINE void Quad(int quad, int v, V (&w)[4]) const {
    WINTSERVE_UNROLL
    for (int i = 0; i < 4; ++i) {
      w[i] = scales_.Apply(v, LoadSignedBytes(rows_ + (quad * 4 + i) * kTileColumns + v * kLanes));
    }
  }

 private:
  ChannelScales<kVecs> scales_;
  const uint8_t* base_;
  const uint8_t* rows_ = nullptr;
};

template <int kVecs>
class Wint4Codec {
 public:
  Wint4Codec(const PackedMatrix& m, const uint8_t* tile, int column)
      : scales_(m, tile, column), base_(tile + kTileColumns * sizeof(float) + column) {}

  HWY_INLINE void StartGroup(int64_t group) {
    pairs_ = base_ + group * (kGroupRows / 2) * kTileColumns;
  }

  HWY_INLINE void Quad(int quad, int v, V (&w)[4]) const {
    WINTSERVE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const VI32 pair = LoadSignedBytes(pairs_ + (quad * 2 + i) * kTileColumns + v * kLanes);
      w[2 * i] = scales_.Apply(v, hn::ShiftRight<28>(hn::ShiftLeft<28>(pair)));
      w[2 * i + 1] = scales_.Apply(v, hn::ShiftRight<4>(pair));
    }
  }

 private:
  ChannelScales<kVecs> scales_;
  const uint8_t* base_;
  const uint8_t* pairs_ = nullptr;
};

// 1.5 * 2^23: adding it to an integer in -2^22 … 2^22 leaves the integer in the low 22 bits of the
// float, in two's complement, below the bit pattern of 2^23.
inline constexpr float kIntegerBits = 12582912.0f;
inline constexpr float kTwoTo23 = 8388608.0f;

// floor(fma(byte, code_scale, code_offset)) + kIntegerBits: the fused result, also where the target
// has no FMA.
HWY_INLINE V Wint2CodeBits(VI32 byte, V code_scale, V code_offset) {
  const D d;
#if HWY_NATIVE_FMA
  const V code = hn::MulAdd(ToFloat(byte), code_scale, code_offset);
#else
  HWY_ALIGN float lanes[3][kLanes];
  hn::Store(ToFloat(byte), d, lanes[0]);
  hn::Store(code_scale, d, lanes[1]);
  hn::Store(code_offset, d, lanes[2]);
  for (int i = 0; i < kLanes; ++i) lanes[0][i] = std::fma(lanes[0][i], lanes[1][i], lanes[2][i]);
  const V code = hn::Load(d, lanes[0]);
#endif
  return hn::Add(hn::Floor(code), hn::Set(d, kIntegerBits));
}

// The value of the 6-bit window that starts at bit kShift of a code, minus 32, times 2^kShift. The
// mask keeps the exponent of 2^23, so the masked bits are the float 2^23 + window * 2^kShift.
template <int kShift>
HWY_INLINE V Wint2Window(V code_bits) {
  const D d;
  const V mask = hn::BitCast(d, hn::Set(DU32(), 0xFF800000u | (63u << kShift)));
  return hn::Sub(hn::And(code_bits, mask), hn::Set(d, kTwoTo23 + (32 << kShift)));
}

template <int kVecs>
class Wint2Codec {
 public:
  Wint2Codec(const PackedMatrix& m, const uint8_t* tile, int column)
      : floats_(reinterpret_cast<const float*>(tile) + column),
        base_(tile + 3 * kTileColumns * sizeof(float)),
        column_(column),
        rounder_(m.rounder()) {
    const D d;
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      code_scale_[v] = hn::LoadU(d, floats_ + kTileColumns + v * kLanes);
      code_offset_[v] = hn::LoadU(d, floats_ + 2 * kTileColumns + v * kLanes);
    }
  }

  HWY_INLINE void StartGroup(int64_t group) {
    constexpr int64_t kGroupBytes = kTileColumns / 2 + kGroupRows / 4 * kTileColumns;
    const uint8_t* local_scales = base_ + group * kGroupBytes;
    quads_ = local_scales + kTileColumns / 2 + column_;
    const D d;
    const DI32 di;
    const V rounder = hn::Set(d, rounder_);
    WINTSERVE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const int column = column_ + v * kLanes;
      const VI32 pair = LoadBytes(local_scales + column % 16);
      const VI32 local = column < 16 ? hn::And(pair, hn::Set(di, 15)) : hn::ShiftRight<4>(pair);
      const V super = hn::LoadU(d, floats_ + v * kLanes);
      const V scale = ScaleAndRound(ToFloat(local), super, hn::Mul(super, rounder));
      WINTSERVE_UNROLL
      for (int slot = 0; slot < 4; ++slot) {
        // A window comes as q * 2^(9 - 3 * slot).
        scale_[v][slot] = hn::Mul(scale, hn::Set(d, 1.0f / static_cast<float>(512 >> 3 * slot)));
        scale_rounder_[v][slot] = hn::Mul(scale_[v][slot], rounder);
      }
    }
  }

  HWY_INLINE void Quad(int quad, int v, V (&w)[4]) const {
    const V code = Wint2CodeBits(LoadBytes(quads_ + quad * kTileColumns + v * kLanes),
                                 code_scale_[v], code_offset_[v]);
    w[0] = ScaleAndRound(Wint2Window<9>(code), scale_[v][0], scale_rounder_[v][0]);
    w[1] = ScaleAndRound(Wint2Window<6>(code), scale_[v][1], scale_rounder_[v][1]);
    w[2] = ScaleAndRound(Wint2Window<3>(code), scale_[v][2], scale_rounder_[v][2]);
    w[3] = ScaleAndRound(Wint2Window<0>(code), scale_[v][3], scale_rounder_[v][3]);
  }

 private:
  const float* floats_;
  const uint8_t* base_;
  const uint8_t* quads_ = nullptr;
  int column_;
  float rounder_;
  V code_scale_[kVecs];
  V code_offset_[kVecs];
  V scale_[kVecs][4];
  V scale_rounder_[kVecs][4];
};

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif
