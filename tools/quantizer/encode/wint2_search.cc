#include "tools/quantizer/encode/wint2_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace wintserve::quantizer {
namespace {

struct ByteTerms {
  float norm = 0;     // sum h c^2
  float product = 0;  // sum h x c
};

ByteTerms TermsOf(const GroupView& group, int column, int byte_row,
                  const std::array<float, kWeightsOfByte>& codeword) {
  ByteTerms terms;
  for (int slot = 0; slot < kWeightsOfByte; ++slot) {
    const int row = byte_row * kWeightsOfByte + slot;
    const float h = group.importance == nullptr ? 1.0f : group.importance[row];
    terms.norm = std::fma(h, codeword[slot] * codeword[slot], terms.norm);
    terms.product =
        std::fma(h * group.x[row * kTileColumns + column], codeword[slot], terms.product);
  }
  return terms;
}

}  // namespace

void SumLeastCosts(const GroupView& group, const Codebook& codebook, int num_scales,
                   const float* scales, float* costs) {
  std::fill_n(costs, num_scales * kTileColumns, 0.0f);
  for (int column = 0; column < kTileColumns; ++column) {
    for (int byte_row = 0; byte_row < kGroupBytes; ++byte_row) {
      std::array<float, kMaxScales> least;
      least.fill(std::numeric_limits<float>::infinity());
      for (int byte = 0; byte < kNumBytes; ++byte) {
        const ByteTerms terms = TermsOf(group, column, byte_row, codebook.vectors()[byte]);
        for (int s = 0; s < num_scales; ++s) {
          const float half = 0.5f * scales[s * kTileColumns + column];
          least[s] = std::min(least[s], std::fma(half, terms.norm, -terms.product));
        }
      }
      for (int s = 0; s < num_scales; ++s) costs[s * kTileColumns + column] += least[s];
    }
  }
}

void FindBytes(const GroupView& group, const Codebook& codebook, int column, float scale,
               uint8_t* bytes) {
  for (int byte_row = 0; byte_row < kGroupBytes; ++byte_row) {
    float least = std::numeric_limits<float>::infinity();
    for (int byte = 0; byte < kNumBytes; ++byte) {
      const ByteTerms terms = TermsOf(group, column, byte_row, codebook.vectors()[byte]);
      const float cost = std::fma(0.5f * scale, terms.norm, -terms.product);
      if (cost < least) {
        least = cost;
        bytes[byte_row] = static_cast<uint8_t>(byte);
      }
    }
  }
}

}  // namespace wintserve::quantizer
