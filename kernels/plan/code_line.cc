#include "kernels/plan/code_line.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels/formats/wint2.h"

namespace wintserve::kernels::plan {
namespace {

constexpr int kBytes = 256;
constexpr int64_t kOne = int64_t{1} << 17;  // 1.0 in the line's fixed point

using Codes = std::array<int64_t, kBytes>;

// Offsets in [low, high) give every byte its code.
struct OffsetRange {
  int64_t low = 0;
  int64_t high = 0;
  int64_t size() const { return high - low; }
};

OffsetRange FitAll(const Codes& codes, int64_t multiplier) {
  OffsetRange range = {codes[0] * kOne, (codes[0] + 1) * kOne};
  int64_t product = 0;
  for (int byte = 1; byte < kBytes; ++byte) {
    product += multiplier;
    const int64_t low = codes[byte] * kOne - product;
    range.low = std::max(range.low, low);
    range.high = std::min(range.high, low + kOne);
  }
  return range;
}

// formats::Wint2Code of all bytes, without 256 calls of fma. A product of a byte and a float32 is
// exact in float64, and so is nearly every sum; rounding one again to float32 gives what a single
// rounding gives unless it lies halfway between two float32 numbers.
Codes CodesOfBytes(float code_scale, float code_zp) {
  constexpr uint64_t kDropped = (uint64_t{1} << 29) - 1;  // float64 has 29 bits more
  constexpr uint64_t kHalfway = uint64_t{1} << 28;
  const double offset = code_zp + 0.5f;
  Codes codes;
  bool halfway = false;
  for (int byte = 0; byte < kBytes; ++byte) {
    const double exact = byte * double{code_scale} + offset;
    halfway |= (std::bit_cast<uint64_t>(exact) & kDropped) == kHalfway;
    const auto rounded = static_cast<float>(exact);
    const auto truncated = static_cast<int32_t>(rounded);
    codes[byte] = truncated - (static_cast<float>(truncated) > rounded ? 1 : 0);
  }
  if (!halfway) return codes;
  for (int byte = 0; byte < kBytes; ++byte) {
    codes[byte] = formats::Wint2Code(static_cast<uint8_t>(byte), code_scale, code_zp);
  }
  return codes;
}

// The size of FitAll's range is a concave function of the multiplier: a minimum of linear functions
// less a maximum of others. So its largest value is found by bisection of its slope.
int64_t WidestMultiplier(const Codes& codes, int64_t low, int64_t high) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (FitAll(codes, middle).size() < FitAll(codes, middle + 1).size()) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The offset that fits most bytes, and how many it fits: a sweep over the ends of their ranges.
std::pair<int64_t, int> FitMost(const Codes& codes, int64_t multiplier) {
  std::vector<std::pair<int64_t, int>> ends;
  for (int byte = 0; byte < kBytes; ++byte) {
    const int64_t low = codes[byte] * kOne - byte * multiplier;
    ends.emplace_back(low, 1);
    ends.emplace_back(low + kOne, -1);
  }
  std::sort(ends.begin(), ends.end());
  int64_t best_offset = 0;
  int best = 0;
  int open = 0;
  for (const auto& [offset, change] : ends) {
    open += change;
    if (open > best) {
      best = open;
      best_offset = offset;
    }
  }
  return {best_offset, best};
}

CodeLine MakeLine(int64_t multiplier, int64_t offset, int num_wrong_bytes) {
  return {static_cast<uint32_t>(multiplier), static_cast<uint32_t>(offset), num_wrong_bytes};
}

}  // namespace

CodeLine FindCodeLine(float code_scale, float code_zp) {
  const Codes codes = CodesOfBytes(code_scale, code_zp);
  int64_t multiplier = std::llround(double{code_scale} * static_cast<double>(kOne));
  OffsetRange range = FitAll(codes, multiplier);
  if (range.size() <= 0) {
    // Beyond a whole code over 255 bytes, no multiplier can fit.
    multiplier = WidestMultiplier(codes, multiplier - kOne / 255, multiplier + kOne / 255);
    range = FitAll(codes, multiplier);
  }
  if (range.size() > 0) return MakeLine(multiplier, range.low + range.size() / 2, 0);

  constexpr int kNeighbours = 32;
  CodeLine best = {0, 0, kBytes};
  for (int64_t m = multiplier - kNeighbours; m <= multiplier + kNeighbours; ++m) {
    const auto [offset, num_right] = FitMost(codes, m);
    if (kBytes - num_right < best.num_wrong_bytes) best = MakeLine(m, offset, kBytes - num_right);
  }
  return best;
}

}  // namespace wintserve::kernels::plan
