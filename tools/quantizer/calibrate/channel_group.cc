#include "tools/quantizer/calibrate/channel_group.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/calibrate/channel_group.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "tools/quantizer/calibrate/column_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {

// 1 / scale, 0 for columns of zeros.
HWY_INLINE V InverseScale(V scale) {
  const D d;
  const auto is_zero = hn::Eq(scale, hn::Zero(d));
  return hn::IfThenZeroElse(is_zero, hn::Div(hn::Set(d, 1.0f), scale));
}

HWY_INLINE V NearestCode(V wanted, V inverse_scale, float largest_code) {
  const D d;
  return hn::Clamp(hn::Round(hn::Mul(wanted, inverse_scale)), hn::Set(d, -largest_code),
                   hn::Set(d, largest_code));
}

// start + sum over j < row of matrix[row][j] * values[j]; four sums, as one would wait for itself.
HWY_INLINE V AddRow(const float (*matrix)[kGroupRows], int row, const V* values, V start) {
  const D d;
  V sums[4] = {start, hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int j = 0;
  for (; j + 4 <= row; j += 4) {
    WINTSERVE_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[i] = hn::MulAdd(hn::Set(d, matrix[row][j + i]), values[j + i], sums[i]);
    }
  }
  for (; j < row; ++j) sums[0] = hn::MulAdd(hn::Set(d, matrix[row][j]), values[j], sums[0]);
  return hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
}

void FeedbackChannelGroup(const GroupBlock& factor, const ChannelStrip& strip, const float* weights,
                          const float* bias, float* error, double* cost) {
  const D d;
  const DI di;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    const V scale = hn::LoadU(d, strip.scale + column);
    const V inverse_scale = InverseScale(scale);
    V errors[kGroupRows];
    V total = hn::Zero(d);
    for (int row = 0; row < kGroupRows; ++row) {
      const int64_t i = row * kTileColumns + column;
      const V b = AddRow(factor.values, row, errors, hn::LoadU(d, bias + i));
      const V weight = hn::LoadU(d, weights + i);
      const V wanted = hn::MulAdd(b, hn::Set(d, factor.inverse_diagonal[row]), weight);
      const V code = NearestCode(wanted, inverse_scale, strip.largest_code);
      errors[row] = hn::Sub(weight, RoundToBfloat16(hn::Mul(code, scale)));
      hn::StoreU(hn::NearestInt(code), di, strip.codes + row * kStripColumns + column);
      hn::StoreU(errors[row], d, error + i);
      const V sum = hn::MulAdd(hn::Set(d, factor.values[row][row]), errors[row], b);
      total = hn::MulAdd(sum, sum, total);
    }
    float totals[kLanes];
    hn::StoreU(total, d, totals);
    for (int lane = 0; lane < kLanes; ++lane) cost[column + lane] += totals[lane];
  }
}

bool SweepChannelGroup(const GroupBlock& hessian, const ChannelStrip& strip, const float* gradient,
                       float* decoded, float* delta) {
  const D d;
  const DI di;
  bool any_changed = false;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    const V scale = hn::LoadU(d, strip.scale + column);
    const V inverse_scale = InverseScale(scale);
    V deltas[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) {
      const int64_t i = row * kTileColumns + column;
      const V g = AddRow(hessian.values, row, deltas, hn::LoadU(d, gradient + i));
      const V old = hn::LoadU(d, decoded + i);
      const V wanted = hn::MulAdd(g, hn::Set(d, hessian.inverse_diagonal[row]), old);
      const V code = NearestCode(wanted, inverse_scale, strip.largest_code);
      const V value = RoundToBfloat16(hn::Mul(code, scale));
      const V step = hn::Sub(old, value);
      // The error changes by step (2 g + H_ii step).
      const V slope = hn::MulAdd(hn::Set(d, hessian.values[row][row]), step, hn::Add(g, g));
      const auto changes = hn::Lt(hn::Mul(slope, step), hn::Zero(d));
      deltas[row] = hn::IfThenElseZero(changes, step);
      hn::StoreU(deltas[row], d, delta + i);
      if (hn::AllFalse(d, changes)) continue;
      any_changed = true;
      hn::StoreU(hn::IfThenElse(changes, value, old), d, decoded + i);
      int32_t* codes = strip.codes + row * kStripColumns + column;
      const VI kept = hn::LoadU(di, codes);
      hn::StoreU(hn::IfThenElse(hn::RebindMask(di, changes), hn::NearestInt(code), kept), di,
                 codes);
    }
  }
  return any_changed;
}

void DecodeChannelGroup(const ChannelStrip& strip, float* decoded) {
  const D d;
  const DI di;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    const V scale = hn::LoadU(d, strip.scale + column);
    for (int row = 0; row < kGroupRows; ++row) {
      const V code = hn::ConvertTo(d, hn::LoadU(di, strip.codes + row * kStripColumns + column));
      hn::StoreU(RoundToBfloat16(hn::Mul(code, scale)), d, decoded + row * kTileColumns + column);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer::calibrate {
namespace {

HWY_EXPORT(FeedbackChannelGroup);
HWY_EXPORT(SweepChannelGroup);
HWY_EXPORT(DecodeChannelGroup);

}  // namespace

void GroupBlock::Fill(const float* matrix, int64_t stride, int64_t group) {
  for (int row = 0; row < kGroupRows; ++row) {
    const float* from = matrix + (group * kGroupRows + row) * stride + group * kGroupRows;
    std::copy_n(from, kGroupRows, values[row]);
    inverse_diagonal[row] = 1 / from[row];
  }
}

void FeedbackChannelGroup(const GroupBlock& factor, const ChannelStrip& strip, const float* weights,
                          const float* bias, float* error, double* cost) {
  HWY_DYNAMIC_DISPATCH(FeedbackChannelGroup)(factor, strip, weights, bias, error, cost);
}

bool SweepChannelGroup(const GroupBlock& hessian, const ChannelStrip& strip, const float* gradient,
                       float* decoded, float* delta) {
  return HWY_DYNAMIC_DISPATCH(SweepChannelGroup)(hessian, strip, gradient, decoded, delta);
}

void DecodeChannelGroup(const ChannelStrip& strip, float* decoded) {
  HWY_DYNAMIC_DISPATCH(DecodeChannelGroup)(strip, decoded);
}

}  // namespace wintserve::quantizer::calibrate
#endif
