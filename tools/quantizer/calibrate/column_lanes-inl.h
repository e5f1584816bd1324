// Lanes that hold columns. Included once per target, from inside foreach_target.
#if defined(WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_COLUMN_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_COLUMN_LANES_INL_H_
#undef WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_COLUMN_LANES_INL_H_
#else
#define WINTSERVE_TOOLS_QUANTIZER_CALIBRATE_COLUMN_LANES_INL_H_
#endif

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer::calibrate {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using kernels::cpu::HWY_NAMESPACE::D;
using kernels::cpu::HWY_NAMESPACE::kLanes;
using kernels::cpu::HWY_NAMESPACE::V;
using DI = hn::RebindToSigned<D>;
using VI = hn::Vec<DI>;

// Nearest, ties to even: formats::RoundToBfloat16 for values that are not NaN.
HWY_INLINE V RoundToBfloat16(V value) {
  const D d;
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7FFFu)), odd);
  return hn::BitCast(d, hn::And(rounded, hn::Set(du, 0xFFFF0000u)));
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer::calibrate
HWY_AFTER_NAMESPACE();

#endif
