// What always holds, checked the slow way: for tests.
#include <fmt/core.h>

#include <map>
#include <set>
#include <string>
#include <unordered_map>

#include "api_server/scheduler/scheduler_impl.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

std::string NameOf(const Sequence& sequence) {
  return fmt::format("sequence {}/{}", sequence.key.request, sequence.key.choice);
}

}  // namespace

absl::Status Scheduler::Impl::CheckInvariants() const {
  if (num_plans_in_flight() > 1 + config_.async_depth) {
    return absl::InternalError(fmt::format("{} plans are in flight", in_flight_.size()));
  }
  RETURN_IF_ERROR(CheckSlots());
  RETURN_IF_ERROR(CheckBlocks());
  RETURN_IF_ERROR(CheckTenants());
  return CheckCounters();
}

// Each slot is free, about to be released, or has one owner.
absl::Status Scheduler::Impl::CheckSlots() const {
  std::set<uint32_t> slots(free_slots_.begin(), free_slots_.end());
  slots.insert(slots_to_release_.begin(), slots_to_release_.end());
  if (slots.size() != free_slots_.size() + slots_to_release_.size()) {
    return absl::InternalError("a slot is released twice");
  }
  for (const Sequence& sequence : sequences_) {
    if (sequence.phase == Phase::kRunning && !slots.insert(sequence.slot).second) {
      return absl::InternalError(fmt::format("{} shares slot {}", NameOf(sequence), sequence.slot));
    }
  }
  if (static_cast<int>(slots.size()) != config_.max_num_seqs) {
    return absl::InternalError(
        fmt::format("{} of {} slots are accounted for", slots.size(), config_.max_num_seqs));
  }
  return absl::OkStatus();
}

// The ledger has what is in the tables, and a table has room for what is planned.
absl::Status Scheduler::Impl::CheckBlocks() const {
  int num_leased = ledger_.num_leased_ahead();
  std::unordered_map<uint64_t, uint32_t> pins;
  for (const Sequence& sequence : sequences_) {
    for (const HeldBlock& held : sequence.blocks) {
      if (held.leased) ++num_leased;
      if (held.entry != 0) ++pins[held.entry];
      if (!held.leased && held.entry == 0) {
        return absl::InternalError(
            fmt::format("{} holds block {} by nothing", NameOf(sequence), held.block.id));
      }
    }
    if (sequence.num_done > sequence.num_planned ||
        BlocksFor(sequence.num_planned) > static_cast<int>(sequence.blocks.size())) {
      return absl::InternalError(fmt::format("{} has done {} and planned {} tokens in {} blocks",
                                             NameOf(sequence), sequence.num_done,
                                             sequence.num_planned, sequence.blocks.size()));
    }
  }
  if (num_leased != ledger_.num_leased() || pins != ledger_.pins()) {
    return absl::InternalError(
        fmt::format("{} leased blocks and {} pinned entries are held, the ledger has {} and {}",
                    num_leased, pins.size(), ledger_.num_leased(), ledger_.pins().size()));
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Impl::CheckTenants() const {
  std::map<const Tenant*, int> num_requests, num_running;
  for (const auto& [id, request] : requests_) {
    if (request->tenant != nullptr) ++num_requests[request->tenant];
  }
  for (const Sequence& sequence : sequences_) {
    if (sequence.phase == Phase::kRunning) ++num_running[sequence.request->tenant];
  }
  for (const auto& [name, tenant] : tenants_) {
    if (const int found = num_requests[&tenant]; found == 0 || found != tenant.num_requests) {
      return absl::InternalError(fmt::format("tenant {} has {} requests, counted were {}", name,
                                             found, tenant.num_requests));
    }
    if (const int found = num_running[&tenant];
        found > config_.max_seqs_per_tenant || found != tenant.num_running) {
      return absl::InternalError(
          fmt::format("tenant {} runs {} sequences of at most {}, counted were {}", name, found,
                      config_.max_seqs_per_tenant, tenant.num_running));
    }
  }
  return waiting_.CheckInvariants(tenants_);
}

absl::Status Scheduler::Impl::CheckCounters() const {
  int num_leaving = 0;
  int num_matching = 0;
  int num_matched = 0;
  int num_restoring = 0;
  int num_preempted = 0;
  int64_t num_preempted_tokens = 0;
  for (const Sequence& sequence : sequences_) {
    const bool waits = sequence.phase == Phase::kWaiting;
    const bool is_matched = sequence.match == MatchState::kDone;
    if (is_matched ? !waits : waits && !sequence.blocks.empty()) {
      return absl::InternalError(fmt::format("{} {} and holds {} blocks", NameOf(sequence),
                                             is_matched ? "is matched" : "waits without a match",
                                             sequence.blocks.size()));
    }
    if (sequence.leaving()) ++num_leaving;
    if (sequence.match == MatchState::kAsked) ++num_matching;
    if (is_matched) ++num_matched;
    if (sequence.restoring()) ++num_restoring;
    if (sequence.phase != Phase::kPreempted) continue;
    ++num_preempted;
    num_preempted_tokens += sequence.length();
  }
  const struct {
    const char* what;
    int64_t found;
    int64_t counted;
  } counters[] = {{"leave", num_leaving, num_leaving_},
                  {"are matching", num_matching, num_matching_},
                  {"are matched", num_matched, static_cast<int64_t>(matched_waiting_.size())},
                  {"are restoring", num_restoring, num_restoring_},
                  {"are preempted", num_preempted, num_preempted_},
                  {"preempted tokens wait", num_preempted_tokens, num_preempted_tokens_}};
  for (const auto& counter : counters) {
    if (counter.found == counter.counted) continue;
    return absl::InternalError(
        fmt::format("{} {}, counted were {}", counter.found, counter.what, counter.counted));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
