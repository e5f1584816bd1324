#include "api_server/llm/poison_guard.h"

#include <algorithm>

namespace wintserve {

std::optional<uint64_t> PoisonGuard::OnFault(const std::vector<uint64_t>& in_flight) {
  num_tokens_ = 0;
  const std::optional<uint64_t> alone = isolated();
  if (alone.has_value() && in_flight == std::vector<uint64_t>{*alone}) {
    OnEnded(*alone);
    return alone;
  }
  for (const uint64_t request : in_flight) {
    if (++num_faults_[request] == kSuspiciousFaults) suspects_.push_back(request);
  }
  return std::nullopt;
}

void PoisonGuard::OnToken(uint64_t request) {
  if (isolated() == request && ++num_tokens_ >= kProofTokens) OnEnded(request);
}

void PoisonGuard::OnEnded(uint64_t request) {
  if (isolated() == request) num_tokens_ = 0;
  num_faults_.erase(request);
  suspects_.erase(std::remove(suspects_.begin(), suspects_.end(), request), suspects_.end());
}

std::optional<uint64_t> PoisonGuard::isolated() const {
  return suspects_.empty() ? std::nullopt : std::optional(suspects_.front());
}

}  // namespace wintserve
