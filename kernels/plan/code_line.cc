#include "kernels/plan/code_line.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "kernels/formats/wint2.h"

namespace wintserve::kernels::plan {
namespace {

constexpr int kBytes = 256;
constexpr int64_t kOne = int64_t{1} << 17;  // 1.0 in the line's fixed point

using Codes = std::array<int32_t, kBytes>;

// A column's codes under a multiplier m + slope, relative to the line of multiplier m through the
// code of byte 0: offset o fits byte b exactly if relative[b] - b * slope <= o - o0 <
// relative[b] - b * slope + kOne. Codes that follow a line of nearly m stay within a few kOne, so
// that 32 bits hold all of it.
class RelativeCodes {
 public:
  RelativeCodes(const Codes& codes, int64_t multiplier) : first_offset_(codes[0] * kOne) {
    // Modulo 2^32: only the difference is small.
    const auto step = static_cast<uint32_t>(multiplier);
    const auto first = static_cast<uint32_t>(codes[0]);
    for (uint32_t byte = 0; byte < kBytes; ++byte) {
      const uint32_t code = static_cast<uint32_t>(codes[byte]) - first;
      relative_[byte] = static_cast<int32_t>((code << 17) - byte * step);
    }
  }

  // Offsets in [low, high) give every byte its code.
  struct OffsetRange {
    int64_t low = 0;
    int64_t high = 0;
    int64_t size() const { return high - low; }
  };

  OffsetRange FitAll(int32_t slope) const {
    int32_t largest = 0;
    int32_t smallest = 0;
    int32_t product = 0;
    for (int byte = 1; byte < kBytes; ++byte) {
      product += slope;
      const int32_t low = relative_[byte] - product;
      largest = std::max(largest, low);
      smallest = std::min(smallest, low);
    }
    return {first_offset_ + largest, first_offset_ + smallest + kOne};
  }

  // The size of FitAll's range is a concave function of the slope: a minimum of linear functions
  // less a maximum of others. So its largest value is found by bisection of its own slope.
  int32_t WidestSlope(int32_t low, int32_t high) const {
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (FitAll(middle).size() < FitAll(middle + 1).size()) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The least offset that fits most bytes, and how many it fits.
  std::pair<int64_t, int> FitMost(int32_t slope) const {
    std::array<int32_t, kBytes> lows;
    for (int byte = 0; byte < kBytes; ++byte) lows[byte] = relative_[byte] - byte * slope;
    std::sort(lows.begin(), lows.end());
    int32_t best_low = 0;
    int best = 0;
    int first_open = 0;  // ranges before it have ended
    for (int i = 0; i < kBytes; ++i) {
      while (lows[i] - lows[first_open] >= kOne) ++first_open;
      const int num_open = i + 1 - first_open;
      if (num_open > best) {
        best = num_open;
        best_low = lows[i];
      }
    }
    return {first_offset_ + best_low, best};
  }

 private:
  const int64_t first_offset_;
  std::array<int32_t, kBytes> relative_;
};

// formats::Wint2Code of all bytes, without 256 calls of fma. A product of a byte and a float32 is
// exact in float64, and so is nearly every sum; rounding one again to float32 gives what a single
// rounding gives unless it lies halfway between two float32 numbers.
Codes CodesOfBytes(float code_scale, float code_zp) {
  const double scale = code_scale;
  const double offset = code_zp + 0.5f;
  // Loops of one kind of arithmetic each, which compilers turn into vector code.
  std::array<double, kBytes> exact;
  for (int byte = 0; byte < kBytes; ++byte) exact[byte] = byte * scale + offset;
  std::array<uint32_t, kBytes> is_halfway;
  uint32_t any_halfway = 0;
  for (int byte = 0; byte < kBytes; ++byte) {
    constexpr uint32_t kDropped = (uint32_t{1} << 29) - 1;  // float64 has 29 bits more
    const auto low_bits = static_cast<uint32_t>(std::bit_cast<uint64_t>(exact[byte]));
    is_halfway[byte] = (low_bits & kDropped) == (kDropped + 1) / 2 ? 1 : 0;
    any_halfway |= is_halfway[byte];
  }
  Codes codes;
  for (int byte = 0; byte < kBytes; ++byte) {
    const auto rounded = static_cast<float>(exact[byte]);
    const auto truncated = static_cast<int32_t>(rounded);
    codes[byte] = truncated - (static_cast<float>(truncated) > rounded ? 1 : 0);
  }
  if (any_halfway == 0) return codes;
  for (int byte = 0; byte < kBytes; ++byte) {
    if (is_halfway[byte] == 0) continue;
    codes[byte] = formats::Wint2Code(static_cast<uint8_t>(byte), code_scale, code_zp);
  }
  return codes;
}

CodeLine MakeLine(int64_t multiplier, int64_t offset, int num_wrong_bytes) {
  return {static_cast<uint32_t>(multiplier), static_cast<uint32_t>(offset), num_wrong_bytes};
}

}  // namespace

CodeLine FindCodeLine(float code_scale, float code_zp) {
  const Codes codes = CodesOfBytes(code_scale, code_zp);
  const int64_t multiplier = std::llround(double{code_scale} * static_cast<double>(kOne));
  const RelativeCodes relative(codes, multiplier);
  int32_t slope = 0;
  RelativeCodes::OffsetRange range = relative.FitAll(slope);
  if (range.size() <= 0) {
    // Beyond a whole code over 255 bytes, no multiplier can fit.
    constexpr int32_t kSteepest = kOne / 255;
    slope = relative.WidestSlope(-kSteepest, kSteepest);
    range = relative.FitAll(slope);
  }
  if (range.size() > 0) return MakeLine(multiplier + slope, range.low + range.size() / 2, 0);

  constexpr int kNeighbours = 32;
  CodeLine best = {0, 0, kBytes};
  for (int32_t s = slope - kNeighbours; s <= slope + kNeighbours; ++s) {
    const auto [offset, num_right] = relative.FitMost(s);
    if (kBytes - num_right >= best.num_wrong_bytes) continue;
    best = MakeLine(multiplier + s, offset, kBytes - num_right);
    if (best.num_wrong_bytes == 1) break;  // none fits all
  }
  return best;
}

}  // namespace wintserve::kernels::plan
