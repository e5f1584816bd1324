// Random numbers that are the same on every platform for the same seed; <random>'s distributions
// are not.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace wintserve::simulation {

// A bijection of 64-bit words that spreads every input bit (the finaliser of splitmix64).
inline uint64_t MixBits(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

inline uint64_t MixBits(uint64_t a, uint64_t b) { return MixBits(MixBits(a) ^ b); }

class Random {
 public:
  // `stream` separates the consumers of one seed: what one of them draws does not shift the others.
  Random(uint64_t seed, uint64_t stream) : state_(MixBits(seed, stream)) {}

  uint64_t Next() { return MixBits(state_++); }

  // REQUIRES: low <= high. Both ends are possible.
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }
  bool Chance(double probability) {
    return static_cast<double>(Next() >> 11) * 0x1.0p-53 < probability;
  }
  // Exponentially distributed.
  int64_t Around(double mean) {
    const double uniform = (static_cast<double>(Next() >> 11) + 0.5) * 0x1.0p-53;
    return static_cast<int64_t>(-mean * std::log(uniform));
  }
  template <typename T>
  T Pick(std::initializer_list<T> choices) {
    return *(choices.begin() + Between(0, static_cast<int64_t>(choices.size()) - 1));
  }
  template <typename T>
  const T& Pick(const std::vector<T>& choices) {
    return choices[Between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

}  // namespace wintserve::simulation
