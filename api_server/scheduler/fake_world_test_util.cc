#include <algorithm>
#include <numeric>
#include <utility>

#include "api_server/scheduler/scheduler_test_util.h"

namespace wintserve {
namespace {

template <typename... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <typename... F>
Overloaded(F...) -> Overloaded<F...>;  // clang 14 does not find it by itself

}  // namespace

uint64_t NextHash(uint64_t hash, int32_t token) {
  hash = (hash ^ static_cast<uint64_t>(token + 1)) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

int32_t SampleFrom(uint64_t hash, const SamplingParams& sampling, int position) {
  const uint64_t mixed =
      NextHash(NextHash(hash, static_cast<int32_t>(sampling.seed)), sampling.choice_index);
  // Every sixteenth or so is a stop token.
  if (mixed >> 60 == 0) {
    return position < static_cast<int>(sampling.first_stop_position) ? kEos + 1 : kEos;
  }
  return static_cast<int32_t>(3 + (mixed >> 20) % (kVocabSize - 3));
}

std::vector<int32_t> ExpectedTokens(const ScheduledRequest& request, uint32_t choice) {
  SamplingParams sampling = request.sampling;
  sampling.choice_index = choice;
  int position = static_cast<int>(request.prompt_ids.size());
  sampling.first_stop_position = static_cast<uint32_t>(position + request.min_tokens);
  uint64_t hash = 0;
  for (const int32_t token : request.prompt_ids) hash = NextHash(hash, token);
  std::vector<int32_t> tokens;
  while (static_cast<int>(tokens.size()) < request.max_tokens) {
    tokens.push_back(SampleFrom(hash, sampling, position++));
    if (tokens.back() == kEos && !request.ignore_eos) break;
    hash = NextHash(hash, tokens.back());
  }
  return tokens;
}

PositionLogprobs LogprobsAfter(uint64_t hash, int32_t token) {
  const uint64_t mixed = NextHash(hash, token);
  return {.logprob = -static_cast<float>(mixed >> 44), .rank = static_cast<int32_t>(mixed % 999)};
}

std::vector<PositionLogprobs> ExpectedPromptLogprobs(const ScheduledRequest& request,
                                                     uint32_t choice) {
  std::vector<PositionLogprobs> expected;
  if (request.sampling.num_prompt_top_logprobs < 0 || choice != 0) return expected;
  uint64_t hash = 0;
  for (size_t i = 0; i + 1 < request.prompt_ids.size(); ++i) {
    hash = NextHash(hash, request.prompt_ids[i]);
    expected.push_back(LogprobsAfter(hash, request.prompt_ids[i + 1]));
  }
  return expected;
}

FakeWorld::FakeWorld(SchedulerConfig config, int num_host_slots)
    : config_(std::move(config)), num_host_slots_(num_host_slots) {
  if (config_.num_blocks == 0) config_.num_blocks = 100;
  config_.vocab_size = kVocabSize;
  config_.eos_ids = {kEos};
  last_step_ = config_.first_step - 1;
  const size_t size = config_.block_size_tokens;
  cache_ =
      std::make_unique<FakeCache>(config_.num_blocks, num_host_slots, config_.block_size_tokens);
  scheduler_ = std::make_unique<Scheduler>(config_);
  scheduler_->OnAvailable(config_.num_blocks);
  slots_.resize(config_.max_num_seqs);
  executed_.resize(config_.max_num_seqs);
  device_.resize(config_.num_blocks, std::vector<Cell>(size));
  host_.resize(num_host_slots, std::vector<Cell>(size));
}

absl::Status FakeWorld::Submit(ScheduledRequest request) {
  const ScheduledRequest copy = request;
  const absl::Status status = scheduler_->Submit(std::move(request), now_us);
  last_id_ = std::max(last_id_, copy.id);
  if (status.ok()) requests_[copy.id] = copy;
  return status;
}

uint64_t FakeWorld::Submit(int prompt_len, int max_tokens, int num_choices) {
  const uint64_t id = last_id_ + 1;
  const absl::Status status = Submit({.id = id,
                                      .prompt_ids = Prompt(prompt_len),
                                      .sampling = {.seed = static_cast<int64_t>(id)},
                                      .num_choices = num_choices,
                                      .max_tokens = max_tokens,
                                      .ignore_eos = true});
  EXPECT_TRUE(status.ok()) << status;
  return id;
}

uint64_t FakeWorld::SubmitPrompt(std::vector<int32_t> prompt, int max_tokens) {
  const uint64_t id = last_id_ + 1;
  const absl::Status status =
      Submit({.id = id,
              .prompt_ids = std::move(prompt),
              .sampling = {.seed = static_cast<int64_t>(id), .repetition_penalty = 1.5f},
              .max_tokens = max_tokens,
              .ignore_eos = true});
  EXPECT_TRUE(status.ok()) << status;
  return id;
}

void FakeWorld::Cancel(uint64_t id) {
  cancelled_.insert(id);
  scheduler_->Cancel(id);
}

// A block is given up, in whole or one of several times: at last no plan in flight may name it.
void FakeWorld::Drop(int block) {
  ASSERT_GT(held_[block], 0) << "block " << block << " is given up by nobody who holds it";
  if (--held_[block] > 0) return;
  for (const std::set<int>& named : named_) {
    EXPECT_FALSE(named.contains(block)) << "block " << block << " is named by a plan in flight";
  }
}

void FakeWorld::CheckDrops(const CacheCommand& command) {
  if (const auto* release = std::get_if<ReleaseCommand>(&command)) {
    for (const uint64_t entry : release->entries) Drop(pin_block_.at(entry));
  } else if (const auto* given_back = std::get_if<ReturnCommand>(&command)) {
    for (const PoolBlock& block : given_back->blocks) Drop(block.id);
  }
}

bool FakeWorld::Schedule() {
  const std::optional<uint64_t> isolated = scheduler_->isolated();
  SchedulerOutput output = scheduler_->Schedule(now_us);
  for (const SequenceStart& start : output.started) {
    EXPECT_TRUE(started_.emplace(start.sequence, start.num_cached_tokens).second);
  }
  for (const SequenceFailure& failure : output.failed) {
    EXPECT_TRUE(failed_.emplace(failure.sequence, failure.error).second);
  }
  const bool progress = !output.cache.empty() || output.plan.has_value();
  EXPECT_TRUE(output.cache.empty() || !cache_lost_) << "a command while the session is lost";
  if (output.plan.has_value()) {
    EXPECT_EQ(output.plan->step, ++last_step_);
    Check(*output.plan);
    // It ends by itself, before a plan is made.
    if (isolated.has_value() && scheduler_->isolated() == isolated) {
      CheckIsolated(*output.plan, *isolated);
    }
  }
  for (CacheCommand& command : output.cache) {
    CheckDrops(command);
    if (const auto* commit = std::get_if<CommitCommand>(&command)) CheckStep(commit->request);
    commands_.push_back(std::move(command));
  }
  if (output.plan.has_value()) plans_.push_back(*std::move(output.plan));
  const absl::Status status = scheduler_->CheckInvariants();
  EXPECT_TRUE(status.ok()) << status;
  return progress;
}

// As a worker would, and that the session holds all blocks that it names.
void FakeWorld::Check(const StepPlan& plan) {
  ASSERT_LE(plans_.size(), static_cast<size_t>(config_.async_depth));
  std::set<int> named;
  // Of copies to the host the cache manager itself keeps the block.
  for (const BlockCopy& copy : plan.copies) {
    if (!copy.to_device) continue;
    named.insert(static_cast<int>(copy.block));
    EXPECT_GT(held_[static_cast<int>(copy.block)], 0);
  }
  for (const SlotInit& init : plan.slot_init) {
    ASSERT_LT(init.slot, slots_.size());
    Slot& slot = slots_[init.slot];
    ASSERT_FALSE(slot.in_use) << "slot " << init.slot << " is used twice";
    slot = {.in_use = true,
            .owner = {static_cast<uint64_t>(init.sampling.seed), init.sampling.choice_index},
            .sampling = init.sampling};
    for (const BlockId block : init.block_table) slot.table.push_back(static_cast<int>(block));
    slot.num_planned = -1;
    // Penalties need the sequence as it is, with nothing in flight. (Some tests give no seed.)
    slot.num_tokens = -1;
    if (!requests_.contains(slot.owner.request)) continue;
    const std::vector<int32_t>& prompt = requests_.at(slot.owner.request).prompt_ids;
    const std::vector<int32_t>& generated = tokens_[slot.owner];
    slot.num_tokens = static_cast<int>(prompt.size() + generated.size());
    const bool counts_prompt = init.sampling.repetition_penalty != 1;
    const bool counts_generated = init.sampling.has_penalties();
    EXPECT_EQ(init.prompt_tokens, counts_prompt ? prompt : std::vector<int32_t>());
    EXPECT_EQ(init.generated_tokens, counts_generated ? generated : std::vector<int32_t>());
  }
  for (const BlockAppend& append : plan.block_append) {
    ASSERT_TRUE(slots_.at(append.slot).in_use);
    for (const BlockId block : append.blocks) {
      slots_[append.slot].table.push_back(static_cast<int>(block));
    }
  }
  std::set<uint32_t> seen;
  int num_tokens = 0;
  for (const PlanRow& row : plan.rows) {
    Slot& slot = slots_.at(row.slot);
    ASSERT_TRUE(slot.in_use);
    ASSERT_TRUE(seen.insert(row.slot).second);
    ASSERT_TRUE(slot.num_planned < 0 || static_cast<int>(row.position) == slot.num_planned);
    slot.num_planned = static_cast<int>(row.position + row.length);
    ASSERT_GT(row.length, 0u);
    ASSERT_TRUE(row.tokens.size() == row.length || (row.tokens.empty() && row.length == 1));
    if (slot.num_tokens >= 0) {
      ASSERT_EQ(row.sample, slot.num_planned == slot.num_tokens);
      slot.num_tokens += row.sample ? 1 : 0;
    }
    const int num_blocks = (slot.num_planned - 1) / config_.block_size_tokens + 1;
    ASSERT_LE(num_blocks, static_cast<int>(slot.table.size()));
    for (int i = 0; i < num_blocks; ++i) {
      named.insert(slot.table[i]);
      EXPECT_GT(held_[slot.table[i]], 0) << "block " << slot.table[i] << " is not held";
    }
    num_tokens += static_cast<int>(row.length);
  }
  EXPECT_TRUE(num_tokens <= config_.max_num_batched_tokens ||
              (!config_.chunked_prefill && plan.rows.size() == 1));
  for (const uint32_t slot : plan.slot_release) {
    ASSERT_TRUE(slots_.at(slot).in_use);
    slots_[slot].in_use = false;
  }
  EXPECT_FALSE(plan.rows.empty() && plan.copies.empty() && plan.slot_release.empty());
  named_.push_back(std::move(named));
}

void FakeWorld::CheckIsolated(const StepPlan& plan, uint64_t request) {
  for (const PlanRow& row : plan.rows) {
    EXPECT_EQ(slots_[row.slot].owner.request, request) << "another request runs beside it";
  }
}

// It names the newest step that wrote to one of the blocks.
void FakeWorld::CheckStep(const CommitRequest& request) const {
  uint64_t newest = 0;
  for (const CommitBlock& commit : request.blocks) {
    for (const Cell& cell : device_[commit.block.id]) newest = std::max(newest, cell.step);
  }
  EXPECT_EQ(request.step, newest);
}

// It may have run on some ranks, or in part.
void FakeWorld::ScribbleOn(const StepPlan& plan) {
  const size_t size = config_.block_size_tokens;
  const Cell garbage{.hash = 0xdead0000 + plan.step, .step = plan.step};
  for (const BlockCopy& copy : plan.copies) {
    auto& target = copy.to_device ? device_[static_cast<int>(copy.block)] : host_[copy.host_slot];
    target.assign(size, garbage);
  }
  for (const SlotInit& init : plan.slot_init) {
    executed_[init.slot].table.clear();
    for (const BlockId block : init.block_table) {
      executed_[init.slot].table.push_back(static_cast<int>(block));
    }
  }
  for (const BlockAppend& append : plan.block_append) {
    for (const BlockId block : append.blocks) {
      executed_[append.slot].table.push_back(static_cast<int>(block));
    }
  }
  for (const PlanRow& row : plan.rows) {
    for (uint32_t position = row.position; position < row.position + row.length; ++position) {
      device_[executed_[row.slot].table.at(position / size)][position % size] = garbage;
    }
  }
}

void FakeWorld::LoseGroup(std::optional<uint64_t> first_bad_step) {
  for (const StepPlan& plan : plans_) ScribbleOn(plan);
  plans_.clear();
  named_.clear();
  for (Slot& slot : slots_) slot = {};
  for (Slot& slot : executed_) slot = {};
  if (first_bad_step.has_value()) SpoilSince(*first_bad_step);
  scheduler_->OnGroupLost(/*kv_trusted=*/!first_bad_step.has_value());
  const absl::Status status = scheduler_->CheckInvariants();
  EXPECT_TRUE(status.ok()) << status;
}

void FakeWorld::SpoilSince(uint64_t first_bad_step) {
  for (Memory* memory : {&device_, &host_}) {
    for (auto& block : *memory) {
      for (Cell& cell : block) {
        if (cell.step >= first_bad_step) cell.hash = 0xbad0000 + cell.step;
      }
    }
  }
  if (cache_lost_) {
    distrust_in_next_session_ =
        std::min(first_bad_step, distrust_in_next_session_.value_or(first_bad_step));
  } else {
    distrusts_.push_back({.num_commands_before = commands_.size(), .first_step = first_bad_step});
  }
}

bool FakeWorld::AnswerOne() {
  if (!distrusts_.empty() && distrusts_.front().num_commands_before == 0) {
    cache_->DistrustSteps(distrusts_.front().first_step);
    distrusts_.pop_front();
    scheduler_->OnAvailable(cache_->num_available());
    return true;
  }
  if (commands_.empty()) return false;
  for (Distrust& distrust : distrusts_) --distrust.num_commands_before;
  const CacheCommand command = std::move(commands_.front());
  commands_.pop_front();
  const auto available = [this] { scheduler_->OnAvailable(cache_->num_available()); };
  std::visit(Overloaded{
                 [&](const PeekCommand& peek) {
                   scheduler_->OnPeeked(peek.tag, cache_->Peek(peek.salt, *peek.tokens));
                 },
                 [&](const MatchCommand& match) {
                   MatchResult result =
                       cache_->Match(match.salt, match.tokens, match.allow_restore);
                   for (const auto* blocks : {&result.device, &result.restoring}) {
                     for (const PinnedBlock& pinned : *blocks) {
                       ++held_[pinned.block.id];
                       pin_block_[pinned.entry] = pinned.block.id;
                     }
                   }
                   available();
                   scheduler_->OnMatched(match.tag, std::move(result));
                 },
                 [&](const LeaseCommand& lease) {
                   std::vector<PoolBlock> blocks = cache_->Lease(lease.count);
                   for (const PoolBlock& block : blocks) ++held_[block.id];
                   available();
                   scheduler_->OnLeased(lease.tag, std::move(blocks));
                 },
                 [&](const CommitCommand& commit) {
                   const std::vector<CommittedBlock> results = cache_->Commit(commit.request);
                   for (const CommittedBlock& result : results) {
                     if (result.entry == 0) continue;
                     pin_block_[result.entry] = cache_->BlockOf(result.entry);
                     if (result.duplicate) ++held_[pin_block_[result.entry]];
                   }
                   available();
                   scheduler_->OnCommitted(commit.tag, results);
                 },
                 [&](const ReleaseCommand& release) {
                   cache_->Release(release.entries);
                   available();
                 },
                 [&](const ReturnCommand& given_back) {
                   cache_->Return(given_back.blocks);
                   available();
                 },
                 [&](const CopyDoneCommand& done) {
                   for (const uint64_t copy : done.copy_ids) cache_->CopyDone(copy, done.step);
                   available();
                 },
             },
             command);
  if (std::vector<CopyOrder> copies = cache_->TakeCopyOuts(); !copies.empty()) {
    scheduler_->OnCopyOut(std::move(copies));
  }
  return true;
}

void FakeWorld::Settle() {
  for (bool progress = true; progress && !testing::Test::HasFatalFailure();) {
    progress = Schedule();
    while (AnswerOne()) progress = true;
  }
}

int32_t FakeWorld::RunRow(const PlanRow& row, uint64_t step,
                          std::vector<PromptRowLogprobs>* prompts) {
  Slot& slot = executed_[row.slot];
  const size_t size = config_.block_size_tokens;
  const auto at = [&](uint32_t position) -> Cell& {
    return device_[slot.table.at(position / size)][position % size];
  };
  uint64_t hash = row.position == 0 ? 0 : at(row.position - 1).hash;
  for (uint32_t i = 0; i < row.length; ++i) {
    EXPECT_TRUE(!row.tokens.empty() || slot.token.has_value()) << "no token in slot " << row.slot;
    const int32_t token = row.tokens.empty() ? slot.token.value_or(0) : row.tokens[i];
    hash = NextHash(hash, token);
    at(row.position + i) = {.hash = hash, .step = step};
  }
  if (row.prompt_logprobs) {
    EXPECT_GE(slot.sampling.num_prompt_top_logprobs, 0);
    EXPECT_GT(row.num_prompt_logprobs(), 0u);
    PromptRowLogprobs& told =
        prompts->emplace_back(PromptRowLogprobs{.slot = row.slot, .position = row.position + 1});
    for (uint32_t i = 1; i <= row.num_prompt_logprobs(); ++i) {
      told.tokens.push_back(LogprobsAfter(at(row.position + i - 1).hash,
                                          i < row.length ? row.tokens.at(i) : row.next_token));
    }
  }
  const int32_t token = forced_token.value_or(
      SampleFrom(hash, slot.sampling, static_cast<int>(row.position + row.length)));
  if (row.sample) slot.token = token;
  return token;
}

std::vector<SequenceToken> FakeWorld::FinishPlan(int64_t step_us) {
  if (plans_.empty()) {
    ADD_FAILURE() << "no plan is in flight";
    return {};
  }
  const StepPlan plan = std::move(plans_.front());
  plans_.pop_front();
  named_.pop_front();
  for (const BlockCopy& copy : plan.copies) {
    auto& on_device = device_[static_cast<int>(copy.block)];
    auto& on_host = host_[copy.host_slot];
    auto& target = copy.to_device ? on_device : on_host;
    target = copy.to_device ? on_host : on_device;
    for (Cell& cell : target) cell.step = plan.step;
  }
  for (const SlotInit& init : plan.slot_init) {
    Slot& slot = executed_[init.slot];
    slot = {.in_use = true, .owner = {}, .sampling = init.sampling};
    for (const BlockId block : init.block_table) slot.table.push_back(static_cast<int>(block));
  }
  for (const BlockAppend& append : plan.block_append) {
    for (const BlockId block : append.blocks) {
      executed_[append.slot].table.push_back(static_cast<int>(block));
    }
  }
  std::vector<SampledToken> sampled;
  std::vector<PromptRowLogprobs> prompts;
  for (const PlanRow& row : plan.rows) {
    const int32_t token = RunRow(row, plan.step, &prompts);
    if (row.sample) sampled.push_back({row.slot, token});
  }
  now_us += step_us;
  auto tokens = scheduler_->OnStepDone(plan.step, sampled, step_us, now_us, std::move(prompts));
  EXPECT_TRUE(tokens.ok()) << tokens.status();
  if (!tokens.ok()) return {};
  for (const SequenceToken& news : *tokens) {
    EXPECT_FALSE(cancelled_.contains(news.sequence.request));
    EXPECT_FALSE(failed_.contains(news.sequence));
    EXPECT_FALSE(ends_.contains(news.sequence)) << "a token after the end";
    if (!news.prompt_logprobs.empty()) {
      EXPECT_TRUE(tokens_[news.sequence].empty()) << "not with the first token";
      prompt_logprobs_[news.sequence] = news.prompt_logprobs;
    }
    tokens_[news.sequence].push_back(news.token);
    if (news.end.has_value()) ends_[news.sequence] = *news.end;
  }
  return *tokens;
}

void FakeWorld::RunToEnd(int max_steps) {
  for (int i = 0; i < max_steps && !testing::Test::HasFailure(); ++i) {
    Settle();
    if (plans_.empty()) return;
    FinishPlan();
  }
  ADD_FAILURE() << "it does not come to an end";
}

void FakeWorld::LoseCache(int num_unanswered) {
  for (const CacheCommand& command : commands_) {
    if (num_unanswered-- <= 0) break;
    std::visit(
        Overloaded{[&](const PeekCommand&) {},
                   [&](const MatchCommand& match) {
                     cache_->Match(match.salt, match.tokens, match.allow_restore);
                   },
                   [&](const LeaseCommand& lease) { cache_->Lease(lease.count); },
                   [&](const CommitCommand& commit) { cache_->Commit(commit.request); },
                   [&](const ReleaseCommand& release) { cache_->Release(release.entries); },
                   [&](const ReturnCommand& given_back) { cache_->Return(given_back.blocks); },
                   [&](const CopyDoneCommand& done) {
                     for (const uint64_t copy : done.copy_ids) cache_->CopyDone(copy, done.step);
                   }},
        command);
  }
  commands_.clear();
  for (const Distrust& distrust : distrusts_) {
    distrust_in_next_session_ =
        std::min(distrust.first_step, distrust_in_next_session_.value_or(distrust.first_step));
  }
  distrusts_.clear();
  cache_lost_ = true;
  scheduler_->OnCacheLost();
  // What was given up when the message got lost is still held, as far as the plans are concerned.
}

void FakeWorld::ResumeCache() {
  ASSERT_TRUE(plans_.empty());
  const HeldBlocks held = scheduler_->OnCacheResumed();
  cache_->Reconcile(held);
  cache_->Fence();
  if (distrust_in_next_session_.has_value()) cache_->DistrustSteps(*distrust_in_next_session_);
  distrust_in_next_session_.reset();
  cache_lost_ = false;
  held_.clear();
  for (const PoolBlock& block : held.leased) ++held_[block.id];
  for (const PinCount& pin : held.pins) held_[cache_->BlockOf(pin.entry)] += pin.count;
  scheduler_->OnAvailable(cache_->num_available());
}

void FakeWorld::ReplacePool(int num_blocks) {
  ASSERT_TRUE(plans_.empty());
  commands_.clear();
  cache_lost_ = false;
  config_.num_blocks = num_blocks;
  cache_ = std::make_unique<FakeCache>(num_blocks, num_host_slots_, config_.block_size_tokens);
  held_.clear();
  for (Slot& slot : slots_) slot = {};
  for (Slot& slot : executed_) slot = {};
  device_.assign(num_blocks, std::vector<Cell>(config_.block_size_tokens));
  distrusts_.clear();
  distrust_in_next_session_.reset();
  scheduler_->OnPoolReplaced(num_blocks);
}

void FakeWorld::ExpectAllBlocksBack() {
  const SchedulerStats stats = scheduler_->stats();
  EXPECT_EQ(stats.num_running, 0);
  EXPECT_EQ(stats.num_waiting, 0);
  EXPECT_EQ(stats.num_waiting_tokens, 0);
  EXPECT_EQ(stats.num_blocks_held, 0);
  EXPECT_EQ(cache_->num_pins(), 0);
  EXPECT_EQ(cache_->num_leased(), 0);
  EXPECT_EQ(cache_->num_available(), config_.num_blocks);
  for (const Slot& slot : slots_) EXPECT_FALSE(slot.in_use);
}

void FakeWorld::ExpectAllTokens() {
  for (const auto& [id, request] : requests_) {
    for (uint32_t choice = 0; choice < static_cast<uint32_t>(request.num_choices); ++choice) {
      const SequenceKey key{id, choice};
      std::vector<int32_t> expected = ExpectedTokens(request, choice);
      if (cancelled_.contains(id) || failed_.contains(key)) {  // it has got a beginning
        ASSERT_LE(tokens_[key].size(), expected.size());
        expected.resize(tokens_[key].size());
      } else {
        EXPECT_TRUE(ends_.contains(key)) << "request " << id << " has not ended";
        const bool stopped = expected.back() == kEos && !request.ignore_eos;
        EXPECT_EQ(ends_[key], stopped ? SequenceEnd::kStop : SequenceEnd::kLength);
      }
      EXPECT_EQ(tokens_[key], expected) << "request " << id << " choice " << choice;
      if (tokens_[key].empty()) continue;
      EXPECT_EQ(prompt_logprobs_[key], ExpectedPromptLogprobs(request, choice))
          << "request " << id << " choice " << choice;
    }
  }
}

std::vector<int32_t> Prompt(int length, int first) {
  std::vector<int32_t> prompt(length);
  std::iota(prompt.begin(), prompt.end(), first);
  return prompt;
}

std::vector<int> RowLengths(const StepPlan& plan) {
  std::vector<int> lengths;
  for (const PlanRow& row : plan.rows) lengths.push_back(static_cast<int>(row.length));
  return lengths;
}

StepPlan NextPlan(FakeWorld* world) {
  world->Settle();
  if (world->plans().size() != 1) ADD_FAILURE() << world->plans().size() << " plans in flight";
  return world->plans().empty() ? StepPlan{} : world->plans().back();
}

void FillHostTier(FakeWorld* world) {
  world->default_step_us = 0;  // nothing is measured: restoring is worthwhile
  for (int i = 0; i < 2; ++i) {
    world->SubmitPrompt(Prompt(13), 1);
    world->RunToEnd();
  }
  world->SubmitPrompt(Prompt(4 * world->config().num_blocks, 500), 1);
  world->RunToEnd();
  ASSERT_EQ(world->cache().Peek("", Prompt(13)).host_blocks, 3u);
}

}  // namespace wintserve
