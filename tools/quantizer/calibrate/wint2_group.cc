#include "tools/quantizer/calibrate/wint2_group.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/wint2_group.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "tools/quantizer/calibrate/wint2_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

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

void FeedbackGroup(const GroupFactor& group, const BlockTables& tables, const Wint2Strip& strip,
                   const float* bias, float* error, double* cost) {
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
    TryFeedback(group, tables, *strip.codebook, weights, biases, nullptr, best);
    for (int i = 0; i <= 2 * strip.local_scale_radius; ++i) {
      const VI local_scale = LocalScaleNear(center, i);
      V scales[kGroupBlocks];
      std::fill(std::begin(scales), std::end(scales), GroupScale(local_scale, super_scale));
      Trial trial;
      TryFeedback(group, tables, *strip.codebook, weights, biases, scales, trial);
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

void DecodeGroup(const Wint2Strip& strip, float* decoded) {
  const D d;
  const DI di;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    const V scale = GroupScale(hn::LoadU(di, strip.local_scale + column),
                               hn::LoadU(d, strip.super_scale + column));
    for (int block = 0; block < kGroupBlocks; ++block) {
      V values[kWeightsOfByte];
      DecodeByte(*strip.codebook, hn::LoadU(di, strip.bytes + block * kStripColumns + column),
                 scale, values);
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        hn::StoreU(values[slot], d,
                   decoded + (block * kWeightsOfByte + slot) * kTileColumns + column);
      }
    }
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
HWY_EXPORT(DecodeGroup);

}  // namespace

void BlockTables::Fill(const Codebook& codebook, const BlockBasis* basis) {
  for (int block = 0; block < kGroupBlocks; ++block) {
    HWY_DYNAMIC_DISPATCH(FillTable)
    (codebook, &basis[block][0][0], values.data() + block * kTableSize);
  }
}

void GroupFactor::Fill(const FeedbackFactor& whole, int64_t group) {
  const int64_t first = group * kGroupRows;
  for (int row = 0; row < kGroupRows; ++row) {
    std::copy_n(whole.factor() + (first + row) * whole.k() + first, kGroupRows, factor[row]);
  }
  SetBlocks();
}

void GroupFactor::SetBlocks() {
  for (int row = 0; row < kGroupRows; ++row) {
    inverse_diagonal[row] = 1 / factor[row][row];
    std::copy_n(factor[row] + row / kWeightsOfByte * kWeightsOfByte, kWeightsOfByte,
                basis[row / kWeightsOfByte][row % kWeightsOfByte]);
  }
}

void FeedbackGroup(const GroupFactor& group, const BlockTables& tables, const Wint2Strip& strip,
                   const float* bias, float* error, double* cost) {
  HWY_DYNAMIC_DISPATCH(FeedbackGroup)(group, tables, strip, bias, error, cost);
}

void DecodeGroup(const Wint2Strip& strip, float* decoded) {
  HWY_DYNAMIC_DISPATCH(DecodeGroup)(strip, decoded);
}

}  // namespace wintserve::quantizer::calibrate
#endif
