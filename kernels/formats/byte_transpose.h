// 8 x 8 bytes in 64-bit words, the first byte of a word lowest.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace wintserve::formats {

// Byte j of word i becomes byte i of word j.
inline void TransposeBytes(std::array<uint64_t, 8>* words) {
  std::array<uint64_t, 8>& w = *words;
  // Swaps the upper right and the lower left square of each block of 2 * size words and bytes.
  const auto swap = [&w](int size, uint64_t lower_bytes) {
    for (int first = 0; first < 8; ++first) {
      if ((first & size) != 0) continue;
      const uint64_t changed = ((w[first] >> (8 * size)) ^ w[first + size]) & lower_bytes;
      w[first] ^= changed << (8 * size);
      w[first + size] ^= changed;
    }
  };
  swap(4, 0x00000000FFFFFFFF);
  swap(2, 0x0000FFFF0000FFFF);
  swap(1, 0x00FF00FF00FF00FF);
}

inline uint64_t LoadWord(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

}  // namespace wintserve::formats
