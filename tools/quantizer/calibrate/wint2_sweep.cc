#include "tools/quantizer/calibrate/wint2_sweep.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/wint2_sweep.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "tools/quantizer/calibrate/wint2_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

// A set's present state, as lanes of columns.
struct Present {
  V weights[kGroupRows];
  V decoded[kGroupRows];
  V gradient[kGroupRows];
  V bias[kGroupRows];  // of feedback inside the set
  VI bytes[kGroupBlocks];
};

void Load(const BlockSet& set, const Wint2Strip& strip, const float* gradient, const float* decoded,
          int column, Present& present) {
  const D d;
  V error[kGroupRows];
  for (int row = 0; row < kGroupRows; ++row) {
    const int64_t i = int64_t{set.rows()[row]} * kTileColumns + column;
    present.weights[row] = hn::LoadU(d, strip.weights + i);
    present.decoded[row] = hn::LoadU(d, decoded + i);
    present.gradient[row] = hn::LoadU(d, gradient + row * kTileColumns + column);
    error[row] = hn::Sub(present.weights[row], present.decoded[row]);
  }
  for (int block = 0; block < kGroupBlocks; ++block) {
    present.bytes[block] =
        hn::LoadU(DI(), strip.bytes + set.blocks[block] * kStripColumns + column);
  }
  // With e the set's errors the whole error is ||M e + bias||^2 and what does not depend on e,
  // where M^T bias = gradient - H e.
  for (int row = kGroupRows - 1; row >= 0; --row) {
    V sum = present.gradient[row];
    for (int j = 0; j < kGroupRows; ++j) {
      sum = hn::NegMulAdd(hn::Set(d, set.hessian[row][j]), error[j], sum);
    }
    for (int j = row + 1; j < kGroupRows; ++j) {
      sum = hn::NegMulAdd(hn::Set(d, set.factor.factor[j][row]), present.bias[j], sum);
    }
    present.bias[row] = hn::Mul(sum, hn::Set(d, set.factor.inverse_diagonal[row]));
  }
}

// cost = by how much trial.values, old - new decoded, change the error.
HWY_NOINLINE void SetCost(const BlockSet& set, const Present& present, Trial& trial) {
  const D d;
  trial.cost = hn::Zero(d);
  for (int row = 0; row < kGroupRows; row += kWeightsOfByte) {
    V slope[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      slope[slot] = hn::Add(present.gradient[row + slot], present.gradient[row + slot]);
    }
    AddRows(set.hessian, row, kGroupRows, trial.values, slope);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      trial.cost = hn::MulAdd(slope[slot], trial.values[row + slot], trial.cost);
    }
  }
}

// One pass of coordinate descent from the trial's state on, whose scales are `scales` already.
HWY_NOINLINE void Descend(const BlockSet& set, const BlockTables& tables, const Codebook& codebook,
                          const Present& present, const V* scales, Trial& trial) {
  const D d;
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int row = block * kWeightsOfByte;
    V g[kWeightsOfByte];
    V now[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      g[slot] = present.gradient[row + slot];
      now[slot] = hn::Sub(present.decoded[row + slot], trial.values[row + slot]);
    }
    AddRows(set.hessian, row, kGroupRows, trial.values, g);
    V z[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      z[slot] = hn::Zero(d);
      for (int j = slot; j < kWeightsOfByte; ++j) {
        z[slot] = hn::MulAdd(hn::Set(d, set.basis[block][slot][j]), now[j], z[slot]);
      }
      for (int j = 0; j <= slot; ++j) {
        z[slot] = hn::MulAdd(hn::Set(d, set.inverse[block][slot][j]), g[j], z[slot]);
      }
    }
    const VI byte = NearestByte(tables.values.data() + block * kTableSize, z, scales[block]);
    V decoded[kWeightsOfByte];
    DecodeByte(codebook, byte, scales[block], decoded);
    V delta[kWeightsOfByte];
    V step[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      delta[slot] = hn::Sub(present.decoded[row + slot], decoded[slot]);
      step[slot] = hn::Sub(delta[slot], trial.values[row + slot]);
    }
    V change = hn::Zero(d);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      V slope = hn::Add(g[slot], g[slot]);
      for (int j = 0; j < kWeightsOfByte; ++j) {
        slope = hn::MulAdd(hn::Set(d, set.hessian[row + slot][row + j]), step[j], slope);
      }
      change = hn::MulAdd(slope, step[slot], change);
    }
    const auto is_better = hn::Lt(change, hn::Zero(d));
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      trial.values[row + slot] = hn::IfThenElse(is_better, delta[slot], trial.values[row + slot]);
    }
    trial.bytes[block] = hn::IfThenElse(hn::RebindMask(DI(), is_better), byte, trial.bytes[block]);
    trial.cost = hn::Add(trial.cost, hn::IfThenElseZero(is_better, change));
  }
}

// Feedback inside the set, from nothing.
HWY_NOINLINE void EncodeAnew(const BlockSet& set, const SetTables& tables, const Codebook& codebook,
                             const Present& present, const V* scales, Trial& trial) {
  TryFeedback(set.factor, tables.feedback, codebook, present.weights, present.bias, scales, trial);
  for (int row = 0; row < kGroupRows; ++row) {
    const V decoded = hn::Sub(present.weights[row], trial.values[row]);
    trial.values[row] = hn::Sub(present.decoded[row], decoded);
  }
  SetCost(set, present, trial);
  if (scales != nullptr) Descend(set, tables.descent, codebook, present, scales, trial);
}

HWY_INLINE void StartTrial(const Present& present, Trial& trial) {
  trial.cost = hn::Zero(D());
  for (V& value : trial.values) value = hn::Zero(D());
  std::copy(std::begin(present.bytes), std::end(present.bytes), std::begin(trial.bytes));
}

// Both ways with the scales that the set has.
void TryPresentScales(const BlockSet& set, const SetTables& tables, const Codebook& codebook,
                      const Present& present, const V* scales, VI local_scale, Trial& best,
                      VI& best_scale) {
  Trial trial;
  StartTrial(present, trial);
  Descend(set, tables.descent, codebook, present, scales, trial);
  KeepBetter(trial, local_scale, best, best_scale);
  EncodeAnew(set, tables, codebook, present, scales, trial);
  KeepBetter(trial, local_scale, best, best_scale);
}

void TryOtherScales(const BlockSet& set, const SetTables& tables, const Wint2Strip& strip,
                    const Present& present, VI local_scale, V super_scale, Trial& best,
                    VI& best_scale) {
  const D d;
  const DI di;
  V power = hn::Zero(d);
  for (const V weight : present.weights) power = hn::MulAdd(weight, weight, power);
  const VI guess = GuessLocalScale(power, strip.codebook->map().scale_per_sigma, super_scale);
  const VI center = hn::IfThenElse(hn::Eq(local_scale, hn::Zero(di)), guess, local_scale);
  Trial trial;
  for (int i = 1; i <= 2 * strip.local_scale_radius; ++i) {
    const VI other = LocalScaleNear(center, i);
    V scales[kGroupBlocks];
    std::fill(std::begin(scales), std::end(scales), GroupScale(other, super_scale));
    EncodeAnew(set, tables, *strip.codebook, present, scales, trial);
    KeepBetter(trial, other, best, best_scale);
  }
  EncodeAnew(set, tables, *strip.codebook, present, nullptr, trial);
  KeepBetter(trial, hn::Zero(di), best, best_scale);
}

bool SweepSet(const BlockSet& set, const SetTables& tables, const Wint2Strip& strip,
              const float* gradient, float* decoded, float* delta) {
  const D d;
  const DI di;
  bool any_changed = false;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    Present present;
    Load(set, strip, gradient, decoded, column, present);
    const V super_scale = hn::LoadU(d, strip.super_scale + column);
    V scales[kGroupBlocks];
    for (int block = 0; block < kGroupBlocks; ++block) {
      const int group = set.blocks[block] / kGroupBlocks;
      scales[block] = GroupScale(hn::LoadU(di, strip.local_scale + group * kStripColumns + column),
                                 super_scale);
    }
    int32_t* local_scales =
        strip.local_scale + set.blocks[0] / kGroupBlocks * kStripColumns + column;
    const VI local_scale = hn::LoadU(di, local_scales);
    Trial best;
    StartTrial(present, best);
    VI best_scale = local_scale;
    TryPresentScales(set, tables, *strip.codebook, present, scales, local_scale, best, best_scale);
    if (set.is_group) {
      TryOtherScales(set, tables, strip, present, local_scale, super_scale, best, best_scale);
    }

    for (int row = 0; row < kGroupRows; ++row) {
      hn::StoreU(best.values[row], d, delta + row * kTileColumns + column);
    }
    if (hn::AllFalse(d, hn::Lt(best.cost, hn::Zero(d)))) continue;
    any_changed = true;
    if (set.is_group) hn::StoreU(best_scale, di, local_scales);
    for (int block = 0; block < kGroupBlocks; ++block) {
      hn::StoreU(best.bytes[block], di, strip.bytes + set.blocks[block] * kStripColumns + column);
      // From the bytes: old - (old - new) would be new with another rounding.
      const V scale = set.is_group ? GroupScale(best_scale, super_scale) : scales[block];
      V values[kWeightsOfByte];
      DecodeByte(*strip.codebook, best.bytes[block], scale, values);
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        const int64_t row = set.rows()[block * kWeightsOfByte + slot];
        hn::StoreU(values[slot], d, decoded + row * kTileColumns + column);
      }
    }
  }
  return any_changed;
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer::calibrate {
namespace {

HWY_EXPORT(SweepSet);

// factor^T factor = hessian, factor lower triangular.
void FactorSet(const float (*hessian)[kGroupRows], float (*factor)[kGroupRows]) {
  double m[kGroupRows][kGroupRows];  // factor, transposed: rows of it end up side by side
  for (int i = kGroupRows - 1; i >= 0; --i) {
    for (int j = i; j >= 0; --j) {
      double sum = hessian[i][j];
      for (int t = i + 1; t < kGroupRows; ++t) sum -= m[i][t] * m[j][t];
      m[j][i] = i == j ? std::sqrt(sum) : sum / m[i][i];
    }
    for (int j = 0; j < kGroupRows; ++j) factor[i][j] = j <= i ? static_cast<float>(m[j][i]) : 0;
  }
}

// basis = L^T, inverse = L^-1 of the 4 x 4 block at `row`.
void FactorBlock(const float (*hessian)[kGroupRows], int row, BlockBasis& basis,
                 BlockBasis& inverse) {
  double lower[kWeightsOfByte][kWeightsOfByte] = {};
  double inverted[kWeightsOfByte][kWeightsOfByte] = {};
  for (int i = 0; i < kWeightsOfByte; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = hessian[row + i][row + j];
      for (int t = 0; t < j; ++t) sum -= lower[i][t] * lower[j][t];
      lower[i][j] = i == j ? std::sqrt(sum) : sum / lower[j][j];
    }
    for (int j = 0; j <= i; ++j) {
      double sum = i == j ? 1 : 0;
      for (int t = j; t < i; ++t) sum -= lower[i][t] * inverted[t][j];
      inverted[i][j] = sum / lower[i][i];
    }
  }
  for (int i = 0; i < kWeightsOfByte; ++i) {
    for (int j = 0; j < kWeightsOfByte; ++j) {
      basis[i][j] = static_cast<float>(lower[j][i]);
      inverse[i][j] = static_cast<float>(inverted[i][j]);
    }
  }
}

}  // namespace

void BlockSet::Fill(const FeedbackFactor& whole,
                    const std::array<int32_t, kGroupBlocks>& set_blocks) {
  blocks = set_blocks;
  is_group = std::all_of(blocks.begin(), blocks.end(), [&](int32_t block) {
    return block / kGroupBlocks == blocks[0] / kGroupBlocks;
  });
  for (int i = 0; i < kGroupRows; ++i) {
    rows_[i] = blocks[i / kWeightsOfByte] * kWeightsOfByte + i % kWeightsOfByte;
  }
  for (int i = 0; i < kGroupRows; ++i) {
    const float* row = whole.hessian() + rows_[i] * whole.hessian_stride();
    for (int j = 0; j < kGroupRows; ++j) hessian[i][j] = row[rows_[j]];
  }
  FactorSet(hessian, factor.factor);
  factor.SetBlocks();
  for (int block = 0; block < kGroupBlocks; ++block) {
    FactorBlock(hessian, block * kWeightsOfByte, basis[block], inverse[block]);
  }
}

bool SweepSet(const BlockSet& set, const SetTables& tables, const Wint2Strip& strip,
              const float* gradient, float* decoded, float* delta) {
  return HWY_DYNAMIC_DISPATCH(SweepSet)(set, tables, strip, gradient, decoded, delta);
}

}  // namespace wintserve::quantizer::calibrate
#endif
