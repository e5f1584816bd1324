#include "api_server/scheduler/scheduler.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "absl/strings/cord.h"
#include "api_server/scheduler/scheduler_impl.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr char kRetryAfterPayload[] = "wintserve/retry-after-seconds";
constexpr int kMaxRetryAfterSeconds = 600;

absl::Status TooBusy(const std::string& text, double seconds) {
  const double bounded = std::clamp(seconds, 1.0, double{kMaxRetryAfterSeconds});
  const int whole_seconds = static_cast<int>(std::ceil(bounded));
  absl::Status status = absl::ResourceExhaustedError(text);
  status.SetPayload(kRetryAfterPayload, absl::Cord(std::to_string(whole_seconds)));
  return status;
}

std::string SecondsText(int64_t milliseconds) {
  return fmt::format("{}", static_cast<double>(milliseconds) / 1e3);
}

}  // namespace

int RetryAfterSeconds(const absl::Status& status) {
  int seconds = 1;
  if (const auto payload = status.GetPayload(kRetryAfterPayload); payload.has_value()) {
    const std::string text(*payload);
    std::from_chars(text.data(), text.data() + text.size(), seconds);
  }
  return std::max(seconds, 1);
}

Scheduler::Impl::Impl(SchedulerConfig config)
    : config_(std::move(config)),
      step_times_(config_.max_num_seqs, config_.restore_us_per_block),
      ledger_(config_.num_blocks),
      waiting_(config_.max_seqs_per_tenant),
      last_step_(config_.first_step - 1),
      last_done_step_(config_.first_step - 1) {
  CHECK(config_.first_step > 0);
  CHECK(config_.max_num_seqs > 0 && config_.max_num_batched_tokens >= config_.max_num_seqs,
        "max_num_seqs={} max_num_batched_tokens={}", config_.max_num_seqs,
        config_.max_num_batched_tokens);
  CHECK(config_.max_partial_prefills > 0 && config_.max_long_partial_prefills > 0 &&
            config_.async_depth >= 0 && config_.block_size_tokens > 0,
        "max_partial_prefills={} max_long_partial_prefills={} async_depth={} block_size_tokens={}",
        config_.max_partial_prefills, config_.max_long_partial_prefills, config_.async_depth,
        config_.block_size_tokens);
  for (int slot = 0; slot < config_.max_num_seqs; ++slot) free_slots_.insert(slot);
}

// What a choice of a new request has to compute, before a look at the cache: the choices after the
// first are going to share its full blocks, unless each is on its own.
int64_t Scheduler::Impl::TokensOfChoice(int prompt_len, bool bypass_cache_match,
                                        uint32_t choice) const {
  if (choice == 0 || !caching() || bypass_cache_match) return prompt_len;
  const int num_shareable = (prompt_len - 1) / config_.block_size_tokens;
  return prompt_len - num_shareable * config_.block_size_tokens;
}

absl::Status Scheduler::Impl::AdmitToQueue(const ScheduledRequest& request, int64_t now_us) const {
  const int prompt_len = static_cast<int>(request.prompt_ids.size());
  const int blocks_needed = BlocksFor(prompt_len + request.max_tokens - 1);
  if (blocks_needed > config_.num_blocks) {
    return absl::InvalidArgumentError(fmt::format(
        "the request needs {} KV blocks for {} prompt tokens and max_tokens {}, the pool has {}",
        blocks_needed, prompt_len, request.max_tokens, config_.num_blocks));
  }
  // An empty queue takes any request: a limit below its size would shut it out for ever.
  if (waiting_.empty()) return absl::OkStatus();
  const int num_after = waiting_.size() + request.num_choices;
  if (config_.max_queue_requests > 0 && num_after > config_.max_queue_requests) {
    return TooBusy(fmt::format("the queue is full: {} sequences wait, {} more would exceed {}",
                               waiting_.size(), request.num_choices, config_.max_queue_requests),
                   waiting_.RetrySecondsFor(num_after - config_.max_queue_requests));
  }
  const bool bypass = request.bypass_cache_match;
  const int64_t num_new_tokens = TokensOfChoice(prompt_len, bypass, 0) +
                                 (request.num_choices - 1) * TokensOfChoice(prompt_len, bypass, 1);
  const int64_t num_excess_tokens =
      waiting_.num_tokens() + num_new_tokens - config_.max_queue_tokens;
  if (config_.max_queue_tokens > 0 && num_excess_tokens > 0) {
    const double tokens_each =
        std::max(1.0, static_cast<double>(waiting_.num_tokens()) / waiting_.size());
    return TooBusy(
        fmt::format("the queue is full: {} prompt tokens wait to be computed, {} more would "
                    "exceed {}",
                    waiting_.num_tokens(), num_new_tokens, config_.max_queue_tokens),
        waiting_.RetrySecondsFor(static_cast<double>(num_excess_tokens) / tokens_each));
  }
  const auto tenant = tenants_.find(request.tenant);
  const auto wait =
      waiting_.WaitSeconds(request.priority, tenant == tenants_.end() ? nullptr : &tenant->second);
  if (!request.deadline_us.has_value() || !wait.has_value()) return absl::OkStatus();
  const int64_t allowed_us = *request.deadline_us - now_us;
  const double excess_seconds = *wait - static_cast<double>(allowed_us) / 1e6;
  if (excess_seconds <= 0) return absl::OkStatus();
  return TooBusy(fmt::format("the queue takes about {:.1f} s, longer than the timeout of {} s",
                             *wait, SecondsText(request.timeout_ms)),
                 excess_seconds);
}

absl::Status Scheduler::Impl::Submit(ScheduledRequest request, int64_t now_us) {
  CHECK(!request.prompt_ids.empty() && request.max_tokens > 0 && request.num_choices > 0 &&
            request.min_tokens >= 0,
        "prompt_len={} max_tokens={} num_choices={} min_tokens={}", request.prompt_ids.size(),
        request.max_tokens, request.num_choices, request.min_tokens);
  waiting_.Advance(now_us);
  if (absl::Status status = AdmitToQueue(request, now_us); !status.ok()) return status;
  auto shared = std::make_shared<Request>();
  const bool is_new = requests_.emplace(request.id, shared).second;
  CHECK(is_new, "request {} was submitted twice", request.id);
  shared->id = request.id;
  shared->prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(request.prompt_ids));
  shared->sampling = request.sampling;
  shared->sampling.first_stop_position =
      static_cast<uint32_t>(shared->prompt_len() + request.min_tokens);
  shared->max_tokens = request.max_tokens;
  shared->ignore_eos = request.ignore_eos;
  shared->stop_tokens = std::move(request.stop_tokens);
  shared->salt = std::move(request.cache_salt);
  shared->bypass_cache_match = request.bypass_cache_match;
  shared->deadline_us = request.deadline_us;
  shared->timeout_ms = request.timeout_ms;
  if (!request.tenant.empty() && config_.max_seqs_per_tenant > 0) {
    shared->tenant = &tenants_[request.tenant];
    shared->tenant->name = std::move(request.tenant);
    ++shared->tenant->num_requests;
  }
  const int shareable = (shared->prompt_len() - 1) / config_.block_size_tokens;
  for (int choice = 0; choice < request.num_choices; ++choice) {
    Sequence& sequence = sequences_.emplace_back();
    sequence.place = std::prev(sequences_.end());
    sequence.key = {shared->id, static_cast<uint32_t>(choice)};
    sequence.rank = {request.priority, next_arrival_++};
    sequence.request = shared;
    sequence.length_planned = shared->prompt_len();
    shared->choices.push_back(&sequence);
    if (shared->deadline_us.has_value()) deadlines_.emplace(*shared->deadline_us, sequence.key);
    waiting_.Insert(&sequence, TokensOfChoice(shared->prompt_len(), shared->bypass_cache_match,
                                              sequence.key.choice));
  }
  const bool may_match =
      !shared->bypass_cache_match && shared->sampling.num_prompt_top_logprobs < 0;
  if (caching() && may_match && shareable > 0) {
    peeked_[next_tag_] = shared->id;
    peeks_.push_back(
        PeekCommand{.tag = next_tag_++, .salt = shared->salt, .tokens = shared->prompt_ids});
  }
  return absl::OkStatus();
}

void Scheduler::Impl::Cancel(uint64_t request_id) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return;
  const std::shared_ptr<Request> request = found->second;  // End may drop the last reference
  for (Sequence* sequence : std::vector<Sequence*>(request->choices)) {
    if (sequence != nullptr) End(sequence);
  }
}

void Scheduler::Impl::Cancel(const SequenceKey& key) {
  const auto found = requests_.find(key.request);
  if (found == requests_.end() || key.choice >= found->second->choices.size()) return;
  if (Sequence* sequence = found->second->choices[key.choice]) End(sequence);
}

// From any phase. Its blocks go back once nothing names them, and then it is gone.
void Scheduler::Impl::End(Sequence* sequence) {
  CHECK(sequence->phase != Phase::kEnded);
  Request& request = *sequence->request;
  if (request.deadline_us.has_value()) deadlines_.erase({*request.deadline_us, sequence->key});
  request.choices[sequence->key.choice] = nullptr;
  if (!sequence->leaving()) ++num_leaving_;
  if (sequence->phase == Phase::kWaiting) {
    waiting_.Remove(sequence);
    if (sequence->match == MatchState::kDone) SetMatch(sequence, MatchState::kNone);
  }
  if (sequence->phase == Phase::kRunning) {
    GiveUpSlot(sequence);
    std::erase(running_, sequence);
  }
  if (sequence->phase == Phase::kPreempted) UncountPreempted(*sequence);
  sequence->phase = Phase::kEnded;
  if (std::all_of(request.choices.begin(), request.choices.end(),
                  [](const Sequence* choice) { return choice == nullptr; })) {
    Forget(&request);
  }
  RetireIfUnnamed(sequence);
}

// REQUIRES: all its choices have ended.
void Scheduler::Impl::Forget(Request* request) {
  // Clients invent names of tenants, so none may stay behind.
  if (request->tenant != nullptr && --request->tenant->num_requests == 0) {
    tenants_.erase(tenants_.find(request->tenant->name));
  }
  request->tenant = nullptr;
  if (isolated_ == request->id) isolated_.reset();
  requests_.erase(request->id);
}

// In the next plan, if a worker knows of it at all.
void Scheduler::Impl::GiveUpSlot(Sequence* sequence) {
  if (sequence->slot_initialised) {
    slots_to_release_.push_back(sequence->slot);
  } else {
    free_slots_.insert(sequence->slot);
  }
  sequence->slot_initialised = false;
  if (Tenant* tenant = sequence->request->tenant) waiting_.StopRunning(tenant);
}

// Of a sequence that leaves: when no plan, copy or answer under way names it, its last blocks are
// committed, and then all of them go back.
void Scheduler::Impl::RetireIfUnnamed(Sequence* sequence) {
  if (HasBlocksToCommit(*sequence)) {
    QueueCommit(sequence);
    return;
  }
  if (sequence->last_plan_step > last_done_step_ || sequence->num_copies_to_plan > 0 ||
      sequence->commit_tag != 0 || sequence->match == MatchState::kAsked ||
      sequence->phase == Phase::kLastTokenInFlight) {
    return;
  }
  ledger_.Drop(&sequence->blocks);
  --num_leaving_;
  if (sequence->phase == Phase::kPreempted) {
    UncountPreempted(*sequence);
    Requeue(sequence);
    return;
  }
  if (sequence->commit_queued) std::erase(to_commit_, sequence);
  SetRestored(sequence, false, /*known_tag=*/0);
  sequences_.erase(sequence->place);
}

// Its slot is given up, or it had none. It queues again once nothing names its blocks.
void Scheduler::Impl::QueueAgainLater(Sequence* sequence) {
  sequence->phase = Phase::kPreempted;
  ++num_leaving_;
  ++num_preempted_;
  num_preempted_tokens_ += sequence->length();
  RetireIfUnnamed(sequence);
}

void Scheduler::Impl::UncountPreempted(const Sequence& sequence) {
  --num_preempted_;
  num_preempted_tokens_ -= sequence.length();
}

// REQUIRES: it holds nothing. It is computed again from its tokens.
void Scheduler::Impl::Requeue(Sequence* sequence) {
  sequence->phase = Phase::kWaiting;
  sequence->num_done = 0;
  sequence->num_planned = 0;
  sequence->length_planned = sequence->length();
  sequence->num_committed = 0;
  sequence->commits_stopped = sequence->never_commits;
  SetMatch(sequence, MatchState::kNone);
  sequence->match_outdated = false;
  sequence->num_host_blocks = 0;
  SetRestored(sequence, false, /*known_tag=*/0);
  sequence->slot_initialised = false;
  sequence->token_in_slot = false;
  sequence->must_fit_whole = true;
  waiting_.Insert(sequence, sequence->length());
}

void Scheduler::Impl::ExpireDeadlines(int64_t now_us) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_us) {
    const SequenceKey key = deadlines_.begin()->second;
    Sequence* sequence = requests_.at(key.request)->choices[key.choice];
    const Request& request = *sequence->request;
    failed_.push_back({key, absl::DeadlineExceededError(fmt::format(
                                "the timeout of {} s is over, after {} of at most {} tokens",
                                SecondsText(request.timeout_ms), sequence->generated.size(),
                                request.max_tokens))});
    End(sequence);
  }
}

std::optional<int64_t> Scheduler::Impl::NextDeadlineUs() const {
  if (deadlines_.empty()) return std::nullopt;
  return deadlines_.begin()->first;
}

absl::Status Scheduler::Impl::CheckResult(uint64_t step,
                                          const std::vector<SampledToken>& sampled) const {
  const uint64_t expected_step = in_flight_.empty() ? 0 : in_flight_.front().step;
  if (in_flight_.empty() || step != expected_step) {
    return absl::InternalError(
        fmt::format("step {} is reported done, next in flight is {}", step, expected_step));
  }
  size_t num_sampled = 0;
  for (const PlannedRow& row : in_flight_.front().rows) {
    if (!row.sample) continue;
    const size_t i = num_sampled++;
    if (i >= sampled.size()) continue;
    if (sampled[i].slot != row.slot || sampled[i].token < 0 ||
        sampled[i].token >= config_.vocab_size) {
      return absl::InternalError(
          fmt::format("step {} sampled token {} in slot {}, expected one below {} in slot {}", step,
                      sampled[i].token, sampled[i].slot, config_.vocab_size, row.slot));
    }
  }
  if (num_sampled == sampled.size()) return absl::OkStatus();
  return absl::InternalError(fmt::format("step {} sampled {} tokens, its plan asks for {}", step,
                                         sampled.size(), num_sampled));
}

// REQUIRES: CheckResult is OK.
absl::Status Scheduler::Impl::CheckPromptLogprobs(
    const std::vector<PromptRowLogprobs>& told) const {
  const PlanInFlight& plan = in_flight_.front();
  size_t num_rows = 0;
  for (const PlannedRow& row : plan.rows) {
    if (row.num_prompt_logprobs == 0) continue;
    const size_t i = num_rows++;
    if (i >= told.size()) continue;
    if (told[i].slot != row.slot ||
        std::cmp_not_equal(told[i].position, row.prompt_logprobs_from) ||
        std::cmp_not_equal(told[i].tokens.size(), row.num_prompt_logprobs)) {
      return absl::InternalError(fmt::format(
          "step {} tells log-probabilities of {} prompt tokens from position {} on in slot {}, "
          "expected {} from {} on in slot {}",
          plan.step, told[i].tokens.size(), told[i].position, told[i].slot, row.num_prompt_logprobs,
          row.prompt_logprobs_from, row.slot));
    }
  }
  if (num_rows == told.size()) return absl::OkStatus();
  return absl::InternalError(
      fmt::format("step {} tells log-probabilities of {} prompts, its plan asks for {}", plan.step,
                  told.size(), num_rows));
}

// Those that were told before a recomputation stay as they are.
void Scheduler::Impl::TakePromptLogprobs(Sequence* sequence, PromptRowLogprobs told) {
  const auto first = static_cast<int>(told.position) - 1;
  CHECK(first <= sequence->num_prompt_logprobs, "position={} known={}", told.position,
        sequence->num_prompt_logprobs);
  for (auto i = static_cast<size_t>(sequence->num_prompt_logprobs - first); i < told.tokens.size();
       ++i) {
    sequence->prompt_logprobs.push_back(std::move(told.tokens[i]));
    ++sequence->num_prompt_logprobs;
  }
}

bool Scheduler::Impl::IsStop(const Sequence& sequence, int32_t token) const {
  const int position = sequence.length();
  const Request& request = *sequence.request;
  if (position < static_cast<int>(request.sampling.first_stop_position)) return false;
  const auto holds = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  return holds(request.stop_tokens) || (!request.ignore_eos && holds(config_.eos_ids));
}

void Scheduler::Impl::TakeToken(Sequence* sequence, const SampledToken& sampled,
                                std::vector<SequenceToken>* tokens) {
  const int32_t token = sampled.token;
  SequenceToken& news =
      tokens->emplace_back(SequenceToken{sequence->key, token, std::nullopt, sampled.logprobs,
                                         std::exchange(sequence->prompt_logprobs, {})});
  // In this order: a stop token on the last place is a stop.
  if (IsStop(*sequence, token)) {
    news.end = SequenceEnd::kStop;
  } else if (sequence->length() + 1 == sequence->max_length()) {
    news.end = SequenceEnd::kLength;
  }
  sequence->generated.push_back(token);
  if (sequence->phase == Phase::kPreempted) ++num_preempted_tokens_;
}

absl::StatusOr<std::vector<SequenceToken>> Scheduler::Impl::OnStepDone(
    uint64_t step, const std::vector<SampledToken>& sampled, int64_t step_us, int64_t now_us,
    std::vector<PromptRowLogprobs> prompt_logprobs) {
  RETURN_IF_ERROR(CheckResult(step, sampled));
  RETURN_IF_ERROR(CheckPromptLogprobs(prompt_logprobs));
  const PlanInFlight done = std::move(in_flight_.front());
  in_flight_.pop_front();
  last_done_step_ = step;
  waiting_.Advance(now_us);
  step_times_.Add(done.work, static_cast<double>(step_us));
  if (!ledger_.lost()) {
    for (const PlannedCopy& copy : done.copies) copies_done_.push_back(copy.order.copy_id);
  }
  std::vector<SequenceToken> tokens;
  tokens.reserve(sampled.size());
  size_t next_sample = 0;
  size_t next_prompt = 0;
  for (const PlannedRow& row : done.rows) {
    Sequence* sequence = row.sequence;
    for (int i = sequence->num_done / config_.block_size_tokens; i < BlocksFor(row.end); ++i) {
      sequence->blocks[i].step = step;
    }
    sequence->num_done = row.end;
    if (row.num_prompt_logprobs > 0) {
      PromptRowLogprobs& told = prompt_logprobs[next_prompt++];
      if (sequence->phase != Phase::kEnded) TakePromptLogprobs(sequence, std::move(told));
    }
    if (row.sample) {
      const SampledToken& token = sampled[next_sample++];
      if (sequence->phase == Phase::kEnded) {
        ++totals_.overshoot_rows;
      } else {
        TakeToken(sequence, token, &tokens);
        if (tokens.back().end.has_value()) {
          End(sequence);  // which may have been the last of it
          continue;
        }
      }
    }
    if (sequence->leaving()) {
      RetireIfUnnamed(sequence);
    } else if (HasBlocksToCommit(*sequence)) {
      QueueCommit(sequence);
    }
  }
  for (Sequence* sequence : done.restored) {
    // The CopyDone goes out before the next command that gets a tag.
    if (sequence->num_copies_to_plan == 0 && sequence->last_copy_step == step) {
      SetRestored(sequence, sequence->restored, /*known_tag=*/next_tag_);
    }
    if (sequence->leaving()) RetireIfUnnamed(sequence);
  }
  return tokens;
}

SchedulerOutput Scheduler::Impl::Schedule(int64_t now_us) {
  SchedulerOutput output;
  waiting_.Advance(now_us);
  ExpireDeadlines(now_us);
  if (!copies_done_.empty()) {
    output.cache.push_back(
        CopyDoneCommand{.copy_ids = std::exchange(copies_done_, {}), .step = last_done_step_});
  }
  for (PeekCommand& peek : peeks_) output.cache.push_back(std::move(peek));
  peeks_.clear();
  SendCommits(&output.cache);  // before the matches that they could lengthen
  BuildPlan(&output);
  AskMatches(&output.cache);
  SendCommits(&output.cache);  // of what ended meanwhile
  ledger_.TakeDrops(&output.cache);
  RefillLease(&output.cache);
  output.failed = std::exchange(failed_, {});
  return output;
}

SchedulerStats Scheduler::Impl::stats() const {
  SchedulerStats stats = totals_;
  stats.num_running = static_cast<int>(running_.size());
  stats.num_waiting = waiting_.size() + num_preempted_;
  stats.num_waiting_tokens = waiting_.num_tokens() + num_preempted_tokens_;
  stats.num_matching = num_matching_;
  stats.num_restoring = num_restoring_;
  stats.num_blocks_held = ledger_.num_held();
  stats.num_blocks_leased_ahead = ledger_.num_leased_ahead();
  stats.num_blocks_available = ledger_.num_available();
  stats.num_plans_in_flight = num_plans_in_flight();
  return stats;
}

Scheduler::Scheduler(SchedulerConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Scheduler::~Scheduler() = default;
absl::Status Scheduler::Submit(ScheduledRequest request, int64_t now_us) {
  return impl_->Submit(std::move(request), now_us);
}
void Scheduler::Cancel(uint64_t request_id) { impl_->Cancel(request_id); }
void Scheduler::Cancel(const SequenceKey& key) { impl_->Cancel(key); }
void Scheduler::OnPeeked(uint64_t tag, const PeekResult& result) { impl_->OnPeeked(tag, result); }
void Scheduler::OnMatched(uint64_t tag, MatchResult result) {
  impl_->OnMatched(tag, std::move(result));
}
void Scheduler::OnLeased(uint64_t tag, std::vector<PoolBlock> blocks) {
  impl_->OnLeased(tag, std::move(blocks));
}
void Scheduler::OnCommitted(uint64_t tag, const std::vector<CommittedBlock>& blocks) {
  impl_->OnCommitted(tag, blocks);
}
void Scheduler::OnCopyOut(std::vector<CopyOrder> copies) { impl_->OnCopyOut(std::move(copies)); }
void Scheduler::OnAvailable(uint32_t num_blocks) { impl_->OnAvailable(num_blocks); }
void Scheduler::OnCacheLost() { impl_->OnCacheLost(); }
HeldBlocks Scheduler::OnCacheResumed() { return impl_->OnCacheResumed(); }
void Scheduler::OnPoolReplaced(int num_blocks) { impl_->OnPoolReplaced(num_blocks); }
void Scheduler::OnGroupLost(bool kv_trusted) { impl_->OnGroupLost(kv_trusted); }
void Scheduler::SetIsolated(std::optional<uint64_t> request_id) { impl_->SetIsolated(request_id); }
std::optional<uint64_t> Scheduler::isolated() const { return impl_->isolated(); }
std::vector<uint64_t> Scheduler::RequestsInFlight() const { return impl_->RequestsInFlight(); }
void Scheduler::SetPaused(bool paused) { impl_->SetPaused(paused); }
absl::StatusOr<std::vector<SequenceToken>> Scheduler::OnStepDone(
    uint64_t step, const std::vector<SampledToken>& sampled, int64_t step_us, int64_t now_us,
    std::vector<PromptRowLogprobs> prompt_logprobs) {
  return impl_->OnStepDone(step, sampled, step_us, now_us, std::move(prompt_logprobs));
}
SchedulerOutput Scheduler::Schedule(int64_t now_us) { return impl_->Schedule(now_us); }
std::optional<int64_t> Scheduler::NextDeadlineUs() const { return impl_->NextDeadlineUs(); }
SchedulerStats Scheduler::stats() const { return impl_->stats(); }
int Scheduler::num_plans_in_flight() const { return impl_->num_plans_in_flight(); }
absl::Status Scheduler::CheckInvariants() const { return impl_->CheckInvariants(); }

}  // namespace wintserve
