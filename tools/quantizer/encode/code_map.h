// Code maps of WINT2: which 256 of the 32,768 codes the bytes of a column reach.
//
// A byte b becomes the code floor(b * code_scale + code_zp + 0.5), and the code four whole numbers
// in -32 … 31 (kernels/formats/wint2.h). So a map fixes a codebook of 256 vectors of four weights,
// and whoever encodes a column looks for the vectors that lie nearest to its weights.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace wintserve::quantizer {

inline constexpr int kNumBytes = 256;     // codewords of a map
inline constexpr int kWeightsOfByte = 4;  // weights of a codeword

struct CodeMap {
  float code_scale = 0;
  float code_zp = 0;
  // Where to look first for the scale of 64 weights of this map, as a multiple of their root mean
  // square: the best one for normally distributed weights.
  float scale_per_sigma = 0;
};

// The maps among which an encoder chooses for each column, the best one on average first. Each of
// them passes CheckCodeMap. Lives as long as the program.
std::span<const CodeMap> DefaultCodeMaps();

// OK if every device decodes the map alike: all codes lie in 0 … 32767, so that neither wrap-around
// nor saturation matters, and the map has a line without a wrong byte
// (kernels/plan/code_line.h), so that integer arithmetic gives the codes of float32; and if
// scale_per_sigma is positive and finite. Else InvalidArgument with the map and what is wrong.
absl::Status CheckCodeMap(const CodeMap& map);

// The 256 vectors of a map. Immutable; 9 KiB.
class Codebook {
 public:
  // REQUIRES: CheckCodeMap(map) is OK.
  explicit Codebook(const CodeMap& map);

  const CodeMap& map() const { return map_; }

  // Weight `slot` (0 … 3) of byte's vector, without a scale: -32 … 31.
  int8_t Value(int byte, int slot) const { return values_[byte][slot]; }

  // [256][4]: the vectors.
  const std::array<std::array<int8_t, kWeightsOfByte>, kNumBytes>& values() const {
    return values_;
  }
  // The same as float32.
  const std::array<std::array<float, kWeightsOfByte>, kNumBytes>& vectors() const {
    return vectors_;
  }
  // [4][256]: weight `slot` of every byte side by side, for lanes that hold bytes.
  const std::array<std::array<float, kNumBytes>, kWeightsOfByte>& slots() const { return slots_; }

 private:
  CodeMap map_;
  std::array<std::array<int8_t, kWeightsOfByte>, kNumBytes> values_;
  alignas(64) std::array<std::array<float, kWeightsOfByte>, kNumBytes> vectors_;
  alignas(64) std::array<std::array<float, kNumBytes>, kWeightsOfByte> slots_;
};

}  // namespace wintserve::quantizer
