#include "tests/simulation/cache_process.h"

#include <utility>

namespace wintserve::simulation {
namespace {

template <typename... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <typename... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

}  // namespace

CacheProcess::CacheProcess(const SimulationConfig& config, EventQueue* clock, Report* report,
                           Events events)
    : config_(config),
      clock_(*clock),
      report_(*report),
      events_(std::move(events)),
      random_(config.seed, /*stream=*/3) {
  CreatePool();
}

void CacheProcess::CreatePool() {
  pool_.emplace(PrefixCacheConfig{
      .num_blocks = static_cast<uint32_t>(config_.scheduler.num_blocks),
      .num_host_slots = static_cast<uint32_t>(config_.num_host_slots),
      .block_size_tokens = config_.scheduler.block_size_tokens,
      .root_seed = "simulation",
  });
  write_backs_.clear();
  ++num_pools_;
}

void CacheProcess::DropPool() {
  AddTotals(&report_.counters);
  pool_.reset();
}

void CacheProcess::AddTotals(Counters* counters) const {
  if (!pool_) return;
  const PrefixCacheStats stats = pool_->stats();
  counters->evicted_blocks += stats.evicted_device_blocks;
  counters->evicted_host_slots += stats.evicted_host_slots;
  counters->commits += stats.committed_blocks;
}

void CacheProcess::Send(CacheRequest request) {
  if (!connected_) return;
  const int64_t arrival = to_process_.Arrival(clock_.now_us(), LatencyUs());
  clock_.At(arrival, [this, connection = connection_, request = std::move(request)] {
    if (connection == connection_) Handle(request);
  });
}

void CacheProcess::OpenPool() {
  clock_.After(LatencyUs(), [this] {
    DropPool();
    CreatePool();
    connected_ = true;
    grace_over_ = false;
    report_.Trace("cache: pool {} is open", num_pools_);
    events_.on_pool_opened(config_.scheduler.num_blocks);
  });
}

bool CacheProcess::LoseServer() {
  if (!connected_) return false;
  connected_ = false;
  ++connection_;
  return true;
}

void CacheProcess::Adopt() {
  clock_.After(LatencyUs(), [this] {
    pool_->EndSession();
    CheckPool("EndSession");
    write_backs_.clear();
    connected_ = true;
    report_.Trace("cache: pool {} is taken over", num_pools_);
    events_.on_adopted(pool_->num_available());
  });
}

void CacheProcess::BreakSession() {
  if (!connected_) return;
  report_.Trace("cache: the session breaks");
  ++report_.counters.cache_drops;
  LoseConnection(/*process_died=*/false);
}

void CacheProcess::Die() {
  if (!connected_) return;
  report_.Trace("cache: the process dies");
  ++report_.counters.cache_deaths;
  LoseConnection(/*process_died=*/true);
}

void CacheProcess::LoseConnection(bool process_died) {
  connected_ = false;
  ++connection_;
  if (process_died) {
    DropPool();
  } else {
    clock_.After(config_.grace_us, [this, connection = connection_] {
      if (connected_ || connection != connection_ || !pool_) return;
      report_.Trace("cache: the grace is over");
      grace_over_ = true;
      pool_->EndSession();
      CheckPool("EndSession");
    });
  }
  const int64_t noticed_after_us = random_.Between(1, 10'000);
  clock_.After(noticed_after_us, [this] { events_.on_lost(); });
  clock_.After(noticed_after_us + random_.Between(1, config_.max_outage_us),
               [this] { Reconnect(); });
}

void CacheProcess::Reconnect() {
  if (!pool_ || grace_over_) {
    report_.Trace("cache: connected, the pool is gone");
    events_.on_pool_gone();
    return;
  }
  report_.Trace("cache: the session is taken up again");
  ++report_.counters.cache_resumes;
  connected_ = true;
  events_.on_resumed();
}

void CacheProcess::Flush(const std::optional<std::string>& salt) {
  if (!pool_) return;
  ++report_.counters.flushes;
  const uint64_t num_entries = pool_->Flush(salt);
  report_.Trace("cache: flush of {} drops {} entries", salt ? *salt : "all", num_entries);
  CheckPool("Flush");
}

void CacheProcess::Handle(const CacheRequest& request) {
  CacheReply reply;
  std::vector<CopyOrder> copies;
  if (const auto* command = std::get_if<CacheCommand>(&request)) {
    reply = Answer(*command);
  } else if (const auto* held = std::get_if<HeldBlocks>(&request)) {
    CheckDone("Reconcile", pool_->Reconcile(held->pins, held->leased));
    // The session has forgotten them.
    for (const auto& [id, copy] : write_backs_) copies.push_back(copy);
  } else if (const auto* distrust = std::get_if<DistrustRequest>(&request)) {
    const uint64_t num_entries = pool_->DistrustSteps(distrust->first_step);
    report_.Trace("cache: steps from {} on are not trusted, {} entries go", distrust->first_step,
                  num_entries);
    reply = Distrusted{};
  } else {
    pool_->Fence();
  }
  CheckPool("a request");
  Reply(std::move(reply));
  if (copies.empty()) {
    copies = pool_->TakeCopyOuts(static_cast<size_t>(random_.Between(1, 4)));
    CheckPool("TakeCopyOuts");
  }
  for (const CopyOrder& copy : copies) write_backs_[copy.copy_id] = copy;
  if (!copies.empty()) Reply(CopyOut{std::move(copies)});
}

CacheReply CacheProcess::Answer(const CacheCommand& command) {
  return std::visit(
      Overloaded{
          [this](const PeekCommand& peek) -> CacheReply {
            return Peeked{peek.tag, pool_->Peek(peek.salt, *peek.tokens)};
          },
          [this](const MatchCommand& match) -> CacheReply {
            return Matched{match.tag, pool_->Match(match.salt, match.tokens, match.allow_restore)};
          },
          [this](const LeaseCommand& lease) -> CacheReply {
            absl::StatusOr<std::vector<PoolBlock>> blocks = pool_->Lease(lease.count);
            CheckDone("Lease", blocks.status());
            return Leased{lease.tag, blocks.ok() ? *std::move(blocks) : std::vector<PoolBlock>{}};
          },
          [this](const CommitCommand& commit) -> CacheReply {
            auto entries = pool_->Commit(commit.request);
            CheckDone("Commit", entries.status());
            return Committed{commit.tag, entries.ok() ? *std::move(entries)
                                                      : std::vector<CommittedBlock>(
                                                            commit.request.blocks.size())};
          },
          [this](const ReleaseCommand& release) -> CacheReply {
            CheckDone("Release", pool_->Release(release.entries));
            return Done{};
          },
          [this](const ReturnCommand& give_back) -> CacheReply {
            CheckDone("Return", pool_->Return(give_back.blocks));
            return Done{};
          },
          [this](const CopyDoneCommand& copies) -> CacheReply {
            for (const uint64_t id : copies.copy_ids) FinishCopy(id, copies.step);
            return Done{};
          },
      },
      command);
}

void CacheProcess::Reply(CacheReply reply) {
  const int64_t arrival = from_process_.Arrival(clock_.now_us(), LatencyUs());
  clock_.At(arrival, [this, connection = connection_, reply = std::move(reply),
                      available = pool_->num_available()] {
    if (connection == connection_) events_.on_reply(reply, available);
  });
}

// One that is no longer under way was cancelled by a Reconcile and then fenced.
void CacheProcess::FinishCopy(uint64_t copy_id, uint64_t step) {
  write_backs_.erase(copy_id);
  pool_->CopyDone(copy_id, step).IgnoreError();
}

void CacheProcess::CheckDone(const char* request, const absl::Status& status) {
  if (!status.ok()) report_.Violation("I2", "{} was refused: {}", request, status.ToString());
}

void CacheProcess::CheckPool(const char* after) {
  const absl::Status status = pool_->CheckInvariants();
  if (!status.ok()) report_.Violation("I2", "after {}: {}", after, status.ToString());
  const PrefixCacheStats stats = pool_->stats();
  const uint32_t num_blocks = stats.num_free + stats.num_leased + stats.num_committed_pinned +
                              stats.num_committed_unpinned + stats.num_restoring +
                              stats.num_copying_out + stats.num_quarantined;
  if (num_blocks != static_cast<uint32_t>(config_.scheduler.num_blocks)) {
    report_.Violation("I2", "after {}: the block states sum up to {}, there are {} blocks", after,
                      num_blocks, config_.scheduler.num_blocks);
  }
}

int64_t CacheProcess::LatencyUs() {
  const int64_t us = random_.Around(static_cast<double>(config_.cache_latency_us));
  return random_.Chance(config_.cache_stall_chance) ? 100 * us : us;
}

}  // namespace wintserve::simulation
