// WINT2 bytes of columns in lanes. Included once per target, from inside foreach_target.
#if defined(WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_WINT2_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_WINT2_LANES_INL_H_
#undef WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_WINT2_LANES_INL_H_
#else
#define WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_WINT2_LANES_INL_H_
#endif

#include <limits>

#include "tools/quantizer/calibrate/column_lanes-inl.h"
#include "tools/quantizer/calibrate/wint2_group.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

// The codeword c of least S |A c|^2 / 2 - z^T A c; the first one of several.
HWY_INLINE VI NearestByte(const float* table, const V* z, V scale) {
  const D d;
  const DI di;
  V least = hn::Set(d, std::numeric_limits<float>::infinity());
  VI nearest = hn::Zero(di);
  for (int byte = 0; byte < kNumBytes; ++byte) {
    V cost = hn::Mul(scale, hn::Set(d, table[kWeightsOfByte * kNumBytes + byte]));
    WINTSERVE_UNROLL
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      cost = hn::NegMulAdd(z[slot], hn::Set(d, table[slot * kNumBytes + byte]), cost);
    }
    const auto is_less = hn::Lt(cost, least);
    least = hn::Min(cost, least);
    nearest = hn::IfThenElse(hn::RebindMask(di, is_less), hn::Set(di, byte), nearest);
  }
  return nearest;
}

HWY_INLINE void DecodeByte(const Codebook& codebook, VI byte, V scale, V* decoded) {
  const D d;
  WINTSERVE_UNROLL
  for (int slot = 0; slot < kWeightsOfByte; ++slot) {
    const V value = hn::GatherIndex(d, codebook.slots()[slot].data(), byte);
    decoded[slot] = RoundToBfloat16(hn::Mul(value, scale));
  }
}

HWY_INLINE V GroupScale(VI local_scale, V super_scale) {
  return RoundToBfloat16(hn::Mul(hn::ConvertTo(D(), local_scale), super_scale));
}

// The local scale that suits 64 weights of this sum of squares best, 1 … 15.
HWY_INLINE VI GuessLocalScale(V power, float scale_per_sigma, V super_scale) {
  const D d;
  const V sigma = hn::Sqrt(hn::Mul(power, hn::Set(d, 1.0f / kGroupRows)));
  const V wanted = hn::Div(hn::Mul(sigma, hn::Set(d, scale_per_sigma)), super_scale);
  const V most = hn::Set(d, static_cast<float>(kLargestLocalScale));
  return hn::NearestInt(hn::Clamp(wanted, hn::Set(d, 1.0f), most));
}

// The candidate at place i around the centre: 0, -1, 1, -2, 2 …
HWY_INLINE VI LocalScaleNear(VI center, int i) {
  const DI di;
  const int step = i % 2 == 0 ? i / 2 : -(i + 1) / 2;
  return hn::Clamp(hn::Add(center, hn::Set(di, step)), hn::Set(di, 1),
                   hn::Set(di, kLargestLocalScale));
}

// What a group or set may become, as lanes of columns.
struct Trial {
  V values[kGroupRows];  // feedback: errors; sweep: old - new decoded
  VI bytes[kGroupBlocks];
  V cost;
};

HWY_INLINE void KeepBetter(const Trial& trial, VI trial_scale, Trial& best, VI& best_scale) {
  const DI di;
  const auto is_less = hn::Lt(trial.cost, best.cost);
  const auto is_less_int = hn::RebindMask(di, is_less);
  best.cost = hn::Min(trial.cost, best.cost);
  best_scale = hn::IfThenElse(is_less_int, trial_scale, best_scale);
  for (int row = 0; row < kGroupRows; ++row) {
    best.values[row] = hn::IfThenElse(is_less, trial.values[row], best.values[row]);
  }
  for (int block = 0; block < kGroupBlocks; ++block) {
    best.bytes[block] = hn::IfThenElse(is_less_int, trial.bytes[block], best.bytes[block]);
  }
}

// sums[slot] += sum over columns j < end of matrix[row + slot][j] * values[j].
HWY_INLINE void AddRows(const float (*matrix)[kGroupRows], int row, int end, const V* values,
                        V* sums) {
  const D d;
  for (int j = 0; j < end; ++j) {
    WINTSERVE_UNROLL
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      sums[slot] = hn::MulAdd(hn::Set(d, matrix[row + slot][j]), values[j], sums[slot]);
    }
  }
}

// Feedback inside a group or set, each block with a scale of its own; no scales: everything is
// zero.
//   tables  of factor.basis
// Sets values: errors; bytes; cost.
HWY_NOINLINE inline void TryFeedback(const GroupFactor& factor, const BlockTables& tables,
                                     const Codebook& codebook, const V* weights, const V* bias,
                                     const V* scales, Trial& trial) {
  const D d;
  trial.cost = hn::Zero(d);
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int row = block * kWeightsOfByte;
    const auto& basis = factor.basis[block];  // lower triangular
    V b[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) b[slot] = bias[row + slot];
    AddRows(factor.factor, row, row, trial.values, b);
    V decoded[kWeightsOfByte];
    if (scales == nullptr) {
      trial.bytes[block] = hn::Zero(DI());
      for (V& value : decoded) value = hn::Zero(d);
    } else {
      V z[kWeightsOfByte];
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        z[slot] = b[slot];
        for (int j = 0; j <= slot; ++j) {
          z[slot] = hn::MulAdd(hn::Set(d, basis[slot][j]), weights[row + j], z[slot]);
        }
      }
      trial.bytes[block] = NearestByte(tables.values.data() + block * kTableSize, z, scales[block]);
      DecodeByte(codebook, trial.bytes[block], scales[block], decoded);
    }
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      trial.values[row + slot] = hn::Sub(weights[row + slot], decoded[slot]);
      V sum = b[slot];
      for (int j = 0; j <= slot; ++j) {
        sum = hn::MulAdd(hn::Set(d, basis[slot][j]), trial.values[row + j], sum);
      }
      trial.cost = hn::MulAdd(sum, sum, trial.cost);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#endif
