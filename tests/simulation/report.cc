#include "tests/simulation/report.h"

#include <fmt/ranges.h>

namespace wintserve::simulation {
namespace {

struct NamedCounter {
  const char* name;
  uint64_t Counters::*value;
};

constexpr NamedCounter kCounters[] = {
    {"events", &Counters::events},
    {"requests", &Counters::requests},
    {"sequences finished", &Counters::sequences_finished},
    {"plans", &Counters::plans},
    {"rows", &Counters::rows},
    {"prompt chunks", &Counters::prompt_chunks},
    {"tokens", &Counters::tokens},
    {"prompt logprobs", &Counters::prompt_logprobs},
    {"overshoot rows", &Counters::overshoot_rows},
    {"preemptions", &Counters::preemptions},
    {"refusals", &Counters::refusals},
    {"expired", &Counters::expired},
    {"cancelled", &Counters::cancelled},
    {"cached tokens", &Counters::cached_tokens},
    {"device hit tokens", &Counters::device_hit_tokens},
    {"host hit tokens", &Counters::host_hit_tokens},
    {"evicted blocks", &Counters::evicted_blocks},
    {"evicted host slots", &Counters::evicted_host_slots},
    {"commits", &Counters::commits},
    {"duplicate commits", &Counters::duplicate_commits},
    {"orphan commits", &Counters::orphan_commits},
    {"write-backs", &Counters::write_backs},
    {"restores", &Counters::restores},
    {"shared siblings", &Counters::shared_siblings},
    {"tombstones", &Counters::tombstones},
    {"flushes", &Counters::flushes},
    {"cache drops", &Counters::cache_drops},
    {"cache resumes", &Counters::cache_resumes},
    {"cache deaths", &Counters::cache_deaths},
    {"pools replaced", &Counters::pools_replaced},
    {"worker kills", &Counters::worker_kills},
    {"worker crashes", &Counters::worker_crashes},
    {"worker hangs", &Counters::worker_hangs},
    {"workers ended", &Counters::workers_ended},
    {"late writes", &Counters::late_writes},
    {"groups lost", &Counters::groups_lost},
    {"groups distrusted", &Counters::groups_distrusted},
    {"plans lost", &Counters::plans_lost},
    {"copies lost", &Counters::copies_lost},
    {"resumed sequences", &Counters::resumed_sequences},
    {"recomputed sequences", &Counters::recomputed_sequences},
    {"isolations", &Counters::isolations},
    {"cache lost meanwhile", &Counters::cache_losses_in_recovery},
    {"server deaths", &Counters::server_deaths},
    {"streams lost", &Counters::streams_lost},
    {"adoptions", &Counters::adoptions},
};

}  // namespace

void Counters::Add(const Counters& other) {
  for (const NamedCounter& counter : kCounters) this->*counter.value += other.*counter.value;
}

std::string Counters::ToString() const {
  std::string text;
  for (const NamedCounter& counter : kCounters) {
    text += fmt::format("  {:<20}{:>12}\n", counter.name, this->*counter.value);
  }
  return text;
}

void Report::AddLine(const std::string& text) {
  std::string line = fmt::format("{:>9} us  {}", clock_.now_us(), text);
  if (tracing_ == Tracing::kPrint) fmt::print("{}\n", line);
  for (const char c : line) digest_ = MixBits(digest_, static_cast<uint64_t>(c));
  lines_.push_back(std::move(line));
  if (lines_.size() > kMaxLines) lines_.pop_front();
}

std::string Report::LastLines() const { return fmt::format("{}\n", fmt::join(lines_, "\n")); }

}  // namespace wintserve::simulation
