#include "tools/quantizer/calibrate/wint2_group.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/wint2_group.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "tools/quantizer/calibrate/column_lanes-inl.h"

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

// One local scale for the group, as lanes of columns.
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

// Feedback inside the group with one local scale a column; `is_zero`: with none, all zeros.
HWY_NOINLINE void TryFeedback(const GroupFactor& group, const Wint2Strip& strip, const V* weights,
                              const V* bias, V scale, bool is_zero, Trial& trial) {
  const D d;
  trial.cost = hn::Zero(d);
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int row = block * kWeightsOfByte;
    const auto& basis = group.basis[block];  // lower triangular
    V b[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) b[slot] = bias[row + slot];
    AddRows(group.factor, row, row, trial.values, b);
    V decoded[kWeightsOfByte];
    if (is_zero) {
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
      trial.bytes[block] = NearestByte(strip.tables->values.data() + block * kTableSize, z, scale);
      DecodeByte(*strip.codebook, trial.bytes[block], scale, decoded);
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

// The sum of squares of the weights that would undo the errors before the group: w + M^-1 bias.
HWY_NOINLINE V WantedPower(const GroupFactor& group, const V* weights, const V* bias) {
  const D d;
  V wanted[kGroupRows];
  V power = hn::Zero(d);
  for (int row = 0; row < kGroupRows; ++row) {
    V sum = bias[row];
    for (int j = 0; j < row; ++j) {
      sum = hn::NegMulAdd(hn::Set(d, group.factor[row][j]), wanted[j], sum);
    }
    wanted[row] = hn::Mul(sum, hn::Set(d, group.inverse_diagonal[row]));
    const V weight = hn::Add(weights[row], wanted[row]);
    power = hn::MulAdd(weight, weight, power);
  }
  return power;
}

void FeedbackGroup(const GroupFactor& group, const Wint2Strip& strip, const float* bias,
                   float* error, double* cost) {
  const D d;
  const DI di;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    V weights[kGroupRows];
    V biases[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) {
      weights[row] = hn::LoadU(d, strip.weights + row * kTileColumns + column);
      biases[row] = hn::LoadU(d, bias + row * kTileColumns + column);
    }
    const V super_scale = hn::LoadU(d, strip.super_scale + column);
    const VI center = GuessLocalScale(WantedPower(group, weights, biases),
                                      strip.codebook->map().scale_per_sigma, super_scale);
    Trial best;
    VI best_scale = hn::Zero(di);
    TryFeedback(group, strip, weights, biases, super_scale, /*is_zero=*/true, best);
    for (int i = 0; i <= 2 * strip.local_scale_radius; ++i) {
      const VI local_scale = LocalScaleNear(center, i);
      Trial trial;
      TryFeedback(group, strip, weights, biases, GroupScale(local_scale, super_scale), false,
                  trial);
      KeepBetter(trial, local_scale, best, best_scale);
    }
    for (int row = 0; row < kGroupRows; ++row) {
      hn::StoreU(best.values[row], d, error + row * kTileColumns + column);
    }
    for (int block = 0; block < kGroupBlocks; ++block) {
      hn::StoreU(best.bytes[block], di, strip.bytes + block * kStripColumns + column);
    }
    hn::StoreU(best_scale, di, strip.local_scale + column);
    float costs[kLanes];
    hn::StoreU(best.cost, d, costs);
    for (int lane = 0; lane < kLanes; ++lane) cost[column + lane] += costs[lane];
  }
}

// A group's present state, as lanes of columns.
struct Present {
  V decoded[kGroupRows];
  V gradient[kGroupRows];
  VI bytes[kGroupBlocks];
  VI local_scale;
};

// Coordinate descent with one local scale a column. Where it is not the present one, every block
// changes; the blocks after it are still as they were when its byte is chosen.
HWY_NOINLINE void TrySweep(const GroupHessian& group, const Wint2Strip& strip,
                           const Present& present, VI local_scale, V scale, bool is_zero,
                           Trial& trial) {
  const D d;
  const DI di;
  const auto must_change = hn::RebindMask(d, hn::Ne(local_scale, present.local_scale));
  trial.cost = hn::Zero(d);
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int row = block * kWeightsOfByte;
    const V* old = present.decoded + row;
    V g[kWeightsOfByte];
    for (int slot = 0; slot < kWeightsOfByte; ++slot) g[slot] = present.gradient[row + slot];
    AddRows(group.hessian, row, row, trial.values, g);
    VI byte = hn::Zero(di);
    V decoded[kWeightsOfByte];
    if (is_zero) {
      for (V& value : decoded) value = hn::Zero(d);
    } else {
      V z[kWeightsOfByte];
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        z[slot] = hn::Zero(d);
        for (int j = slot; j < kWeightsOfByte; ++j) {
          z[slot] = hn::MulAdd(hn::Set(d, group.basis[block][slot][j]), old[j], z[slot]);
        }
        for (int j = 0; j <= slot; ++j) {
          z[slot] = hn::MulAdd(hn::Set(d, group.inverse[block][slot][j]), g[j], z[slot]);
        }
      }
      byte = NearestByte(strip.tables->values.data() + block * kTableSize, z, scale);
      DecodeByte(*strip.codebook, byte, scale, decoded);
    }
    V delta[kWeightsOfByte];
    V change = hn::Zero(d);
    for (int slot = 0; slot < kWeightsOfByte; ++slot)
      delta[slot] = hn::Sub(old[slot], decoded[slot]);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      V slope = hn::Add(g[slot], g[slot]);
      for (int j = 0; j < kWeightsOfByte; ++j) {
        slope = hn::MulAdd(hn::Set(d, group.hessian[row + slot][row + j]), delta[j], slope);
      }
      change = hn::MulAdd(slope, delta[slot], change);
    }
    const auto changes = hn::Or(must_change, hn::Lt(change, hn::Zero(d)));
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      trial.values[row + slot] = hn::IfThenElseZero(changes, delta[slot]);
    }
    trial.bytes[block] = hn::IfThenElse(hn::RebindMask(di, changes), byte, present.bytes[block]);
    trial.cost = hn::Add(trial.cost, hn::IfThenElseZero(changes, change));
  }
}

HWY_INLINE V Power(const float* weights, int column) {
  const D d;
  V power = hn::Zero(d);
  for (int row = 0; row < kGroupRows; ++row) {
    const V weight = hn::LoadU(d, weights + row * kTileColumns + column);
    power = hn::MulAdd(weight, weight, power);
  }
  return power;
}

HWY_INLINE void DecodeLanes(const Wint2Strip& strip, int column, float* decoded) {
  const D d;
  const DI di;
  const V scale = GroupScale(hn::LoadU(di, strip.local_scale + column),
                             hn::LoadU(d, strip.super_scale + column));
  for (int block = 0; block < kGroupBlocks; ++block) {
    V values[kWeightsOfByte];
    DecodeByte(*strip.codebook, hn::LoadU(di, strip.bytes + block * kStripColumns + column), scale,
               values);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      hn::StoreU(values[slot], d,
                 decoded + (block * kWeightsOfByte + slot) * kTileColumns + column);
    }
  }
}

bool SweepGroup(const GroupHessian& group, const Wint2Strip& strip, const float* gradient,
                float* decoded, float* delta) {
  const D d;
  const DI di;
  bool any_changed = false;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    Present present;
    Trial best;
    best.cost = hn::Zero(d);
    for (int row = 0; row < kGroupRows; ++row) {
      present.decoded[row] = hn::LoadU(d, decoded + row * kTileColumns + column);
      present.gradient[row] = hn::LoadU(d, gradient + row * kTileColumns + column);
      best.values[row] = hn::Zero(d);
    }
    for (int block = 0; block < kGroupBlocks; ++block) {
      present.bytes[block] = hn::LoadU(di, strip.bytes + block * kStripColumns + column);
      best.bytes[block] = present.bytes[block];
    }
    present.local_scale = hn::LoadU(di, strip.local_scale + column);
    VI best_scale = present.local_scale;
    const V super_scale = hn::LoadU(d, strip.super_scale + column);
    const VI guess = GuessLocalScale(Power(strip.weights, column),
                                     strip.codebook->map().scale_per_sigma, super_scale);
    const VI center =
        hn::IfThenElse(hn::Eq(present.local_scale, hn::Zero(di)), guess, present.local_scale);
    Trial trial;
    for (int i = 0; i <= 2 * strip.local_scale_radius; ++i) {
      const VI local_scale = LocalScaleNear(center, i);
      TrySweep(group, strip, present, local_scale, GroupScale(local_scale, super_scale), false,
               trial);
      KeepBetter(trial, local_scale, best, best_scale);
    }
    TrySweep(group, strip, present, hn::Zero(di), super_scale, true, trial);
    KeepBetter(trial, hn::Zero(di), best, best_scale);

    for (int row = 0; row < kGroupRows; ++row) {
      hn::StoreU(best.values[row], d, delta + row * kTileColumns + column);
    }
    if (hn::AllFalse(d, hn::Lt(best.cost, hn::Zero(d)))) continue;
    any_changed = true;
    for (int block = 0; block < kGroupBlocks; ++block) {
      hn::StoreU(best.bytes[block], di, strip.bytes + block * kStripColumns + column);
    }
    hn::StoreU(best_scale, di, strip.local_scale + column);
    // From the bytes: old - (old - new) would be new with another rounding.
    DecodeLanes(strip, column, decoded);
  }
  return any_changed;
}

void DecodeGroup(const Wint2Strip& strip, float* decoded) {
  for (int column = 0; column < kStripColumns; column += kLanes) {
    DecodeLanes(strip, column, decoded);
  }
}

void FillTable(const Codebook& codebook, const float* basis, float* table) {
  const D d;
  for (int byte = 0; byte < kNumBytes; byte += kLanes) {
    V half_square = hn::Zero(d);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      V sum = hn::Zero(d);
      for (int j = 0; j < kWeightsOfByte; ++j) {
        sum = hn::MulAdd(hn::Set(d, basis[slot * kWeightsOfByte + j]),
                         hn::LoadU(d, codebook.slots()[j].data() + byte), sum);
      }
      hn::StoreU(sum, d, table + slot * kNumBytes + byte);
      half_square = hn::MulAdd(hn::Mul(sum, hn::Set(d, 0.5f)), sum, half_square);
    }
    hn::StoreU(half_square, d, table + kWeightsOfByte * kNumBytes + byte);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer::calibrate {
namespace {

HWY_EXPORT(FillTable);
HWY_EXPORT(FeedbackGroup);
HWY_EXPORT(SweepGroup);
HWY_EXPORT(DecodeGroup);

}  // namespace

void BlockTables::Fill(const Codebook& codebook, const float* basis) {
  for (int block = 0; block < kGroupBlocks; ++block) {
    HWY_DYNAMIC_DISPATCH(FillTable)
    (codebook, basis + block * kWeightsOfByte * kWeightsOfByte, values.data() + block * kTableSize);
  }
}

void GroupFactor::Fill(const FeedbackFactor& whole, int64_t group) {
  const int64_t first = group * kGroupRows;
  for (int row = 0; row < kGroupRows; ++row) {
    const float* from = whole.factor() + (first + row) * whole.k() + first;
    std::copy_n(from, kGroupRows, factor[row]);
    inverse_diagonal[row] = 1 / from[row];
    std::copy_n(from + row / kWeightsOfByte * kWeightsOfByte, kWeightsOfByte,
                basis[row / kWeightsOfByte][row % kWeightsOfByte]);
  }
}

void GroupHessian::Fill(const FeedbackFactor& whole, int64_t group) {
  const int64_t first = group * kGroupRows;
  for (int row = 0; row < kGroupRows; ++row) {
    std::copy_n(whole.hessian() + (first + row) * whole.k() + first, kGroupRows, hessian[row]);
  }
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int row = block * kWeightsOfByte;
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
        basis[block][i][j] = static_cast<float>(lower[j][i]);
        inverse[block][i][j] = static_cast<float>(inverted[i][j]);
      }
    }
  }
}

void FeedbackGroup(const GroupFactor& group, const Wint2Strip& strip, const float* bias,
                   float* error, double* cost) {
  HWY_DYNAMIC_DISPATCH(FeedbackGroup)(group, strip, bias, error, cost);
}

bool SweepGroup(const GroupHessian& group, const Wint2Strip& strip, const float* gradient,
                float* decoded, float* delta) {
  return HWY_DYNAMIC_DISPATCH(SweepGroup)(group, strip, gradient, decoded, delta);
}

void DecodeGroup(const Wint2Strip& strip, float* decoded) {
  HWY_DYNAMIC_DISPATCH(DecodeGroup)(strip, decoded);
}

}  // namespace wintserve::quantizer::calibrate
#endif
