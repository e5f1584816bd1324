#include "tools/quantizer/encode/code_map.h"

#include <fmt/core.h>

#include <cmath>

#include "common/check.h"
#include "kernels/formats/wint2.h"
#include "kernels/plan/code_line.h"

namespace wintserve::quantizer {
namespace {

constexpr int32_t kLargestCode = 32767;

// Found by random search for maps whose codewords suit a normal distribution, with all four slots
// of a byte equally good.
constexpr CodeMap kDefaultMaps[] = {
    {120.96099f, 1240.0f, 0.0615f},
    {120.91775f, 1260.003f, 0.0615f},
    {120.96519f, 1648.289f, 0.0615f},
    {120.03964f, 1641.737f, 0.0615f},
};

}  // namespace

std::span<const CodeMap> DefaultCodeMaps() { return kDefaultMaps; }

absl::Status CheckCodeMap(const CodeMap& map) {
  const auto wrong = [&map](std::string_view what) {
    return absl::InvalidArgumentError(
        fmt::format("code map (code_scale {}, code_zp {}, scale_per_sigma {}): {}", map.code_scale,
                    map.code_zp, map.scale_per_sigma, what));
  };
  // Also false for a NaN.
  if (!(map.scale_per_sigma > 0) || !std::isfinite(map.scale_per_sigma)) {
    return wrong("scale_per_sigma must be positive and finite");
  }
  // Within these bounds no product or sum leaves int32.
  if (!(std::abs(map.code_scale) <= kLargestCode) || !(std::abs(map.code_zp) <= 0x1p23f)) {
    return wrong("code_scale must lie in -32767 … 32767, code_zp within 2^23 of 0");
  }
  for (const uint8_t byte : {uint8_t{0}, uint8_t{255}}) {  // a line's extremes
    const int32_t code = formats::Wint2Code(byte, map.code_scale, map.code_zp);
    if (code < 0 || code > kLargestCode) {
      return wrong(
          fmt::format("byte {} has code {}, allowed are 0 … {}", byte, code, kLargestCode));
    }
  }
  const int num_wrong = kernels::plan::FindCodeLine(map.code_scale, map.code_zp).num_wrong_bytes;
  if (num_wrong != 0) {
    return wrong(fmt::format("{} bytes have another code in integer arithmetic", num_wrong));
  }
  return absl::OkStatus();
}

Codebook::Codebook(const CodeMap& map) : map_(map) {
  const absl::Status status = CheckCodeMap(map);
  CHECK(status.ok(), "{}", status.ToString());
  for (int byte = 0; byte < kNumBytes; ++byte) {
    const int32_t code =
        formats::Wint2Code(static_cast<uint8_t>(byte), map.code_scale, map.code_zp);
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      const int value = formats::Wint2Value(code, slot);
      values_[byte][slot] = static_cast<int8_t>(value);
      vectors_[byte][slot] = static_cast<float>(value);
      slots_[slot][byte] = static_cast<float>(value);
    }
  }
}

}  // namespace wintserve::quantizer
