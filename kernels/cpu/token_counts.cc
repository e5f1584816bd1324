#include "kernels/cpu/token_counts.h"

namespace wintserve::kernels::cpu {

void TokenCounts::AddPrompt(std::span<const int32_t> ids) {
  for (const int32_t id : ids) Of(id) |= sampling::kInPrompt;
}

void TokenCounts::AddGenerated(int32_t id) { ++Of(id); }

void TokenCounts::Clear() {
  occurrences_.clear();
  index_.clear();
}

sampling::Occurrence& TokenCounts::Of(int32_t id) {
  const auto [entry, is_new] = index_.try_emplace(id, occurrences_.size());
  if (is_new) occurrences_.push_back({.id = id});
  return occurrences_[entry->second].occurrence;
}

}  // namespace wintserve::kernels::cpu
