// Which requests may be what makes engine workers fail, and have to run alone until that is known.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <vector>

namespace wintserve {

// A fault that a worker has brought about itself (a crash, a device error, ranks that diverge, a
// step that is not done by its deadline) may come from one request's input. One that was in flight
// at two of them runs alone. If the group fails once more then, it is that request, which fails; if
// it gets as far as kProofTokens, it is not. So the others are not sacrificed to one input.
// Threading: thread-compatible.
class PoisonGuard {
 public:
  static constexpr int kSuspiciousFaults = 2;
  static constexpr int kProofTokens = 16;  // sampled alone

  // The group is lost by a fault of its own while plans of these requests were in flight. The
  // request that was proved to be the cause; it has to be failed, and is forgotten.
  std::optional<uint64_t> OnFault(const std::vector<uint64_t>& in_flight);
  void OnToken(uint64_t request);
  void OnEnded(uint64_t request);

  // That is to run alone now.
  std::optional<uint64_t> isolated() const;

 private:
  std::map<uint64_t, int> num_faults_;  // while it was in flight
  std::deque<uint64_t> suspects_;       // the first one runs alone
  int num_tokens_ = 0;                  // that it has sampled alone
};

}  // namespace wintserve
