// WINT2 codes by integer arithmetic. A column's reference map from byte to code,
// floor(fma(byte, code_scale, code_zp + 0.5)) in float32, is replaced by a line
//     code = (byte * multiplier + offset) >> 17        modulo 2^15, in uint32 arithmetic
// of which only the 15 bits that the weights are cut from are ever used, so that wrap-around does
// no harm and negative codes work.
#pragma once

#include <cstdint>

namespace wintserve::kernels::plan {

struct CodeLine {
  uint32_t multiplier = 0;
  uint32_t offset = 0;
  int num_wrong_bytes = 0;  // of 256, whose 15-bit code differs from the reference
};

constexpr uint32_t CodeOfLine(uint8_t byte, uint32_t multiplier, uint32_t offset) {
  return ((byte * multiplier + offset) >> 17) & 0x7FFF;
}

// A line without a wrong byte if there is one: the lines that fit a byte form a strip of the
// (multiplier, offset) plane, and the search finds an integer point of all 256 strips'
// intersection. There is none where float32 rounding in the reference lifts a value to the next
// integer that the exact line misses (about 1 column of 5,000); then the line with the fewest wrong
// bytes that the neighbouring multipliers have. Such bytes are ties that kernels of the reference's
// own family already resolve differently among each other. REQUIRES: 255 * |code_scale| + |code_zp|
// < 2^22.
CodeLine FindCodeLine(float code_scale, float code_zp);

}  // namespace wintserve::kernels::plan
