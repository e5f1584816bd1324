// How often each token occurs in one sequence: what penalties need to know of its history.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/sampling/sampling_types.h"

namespace wintserve::kernels::cpu {

struct TokenOccurrence {
  int32_t id = 0;
  sampling::Occurrence occurrence = 0;  // not 0
};

// Memory grows with the number of different tokens. Threading: thread-compatible.
class TokenCounts {
 public:
  void AddPrompt(std::span<const int32_t> ids);
  void AddGenerated(int32_t id);
  void Clear();

  // Each id that occurs, once, in the order of first occurrence. Valid until the next change.
  std::span<const TokenOccurrence> occurrences() const { return occurrences_; }

 private:
  sampling::Occurrence& Of(int32_t id);

  std::vector<TokenOccurrence> occurrences_;
  std::unordered_map<int32_t, size_t> index_;  // of an id in occurrences_
};

}  // namespace wintserve::kernels::cpu
