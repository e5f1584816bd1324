#include "tests/simulation/trace.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <vector>

namespace wintserve::simulation {
namespace {

std::string ToString(const PoolBlock& block) {
  return fmt::format("{}@{}", block.id, block.generation);
}

std::string ToString(const std::vector<PoolBlock>& blocks) {
  std::vector<std::string> names;
  for (const PoolBlock& block : blocks) names.push_back(ToString(block));
  return fmt::format("[{}]", fmt::join(names, " "));
}

std::string ToString(const std::vector<BlockId>& blocks) {
  std::vector<int32_t> ids;
  for (const BlockId block : blocks) ids.push_back(static_cast<int32_t>(block));
  return fmt::format("[{}]", fmt::join(ids, " "));
}

std::string ToString(const std::vector<PinnedBlock>& blocks) {
  std::vector<std::string> names;
  for (const PinnedBlock& pinned : blocks) {
    names.push_back(fmt::format("e{}:{}", pinned.entry, ToString(pinned.block)));
  }
  return fmt::format("[{}]", fmt::join(names, " "));
}

std::string ToString(const std::vector<CopyOrder>& copies) {
  std::vector<std::string> names;
  for (const CopyOrder& copy : copies) {
    names.push_back(fmt::format("#{} {}{}h{}", copy.copy_id, ToString(copy.block),
                                copy.direction == CopyDirection::kToHost ? "->" : "<-",
                                copy.host_slot));
  }
  return fmt::format("[{}]", fmt::join(names, ", "));
}

}  // namespace

std::string Describe(const CacheCommand& command) {
  if (const auto* peek = std::get_if<PeekCommand>(&command)) {
    return fmt::format("peek #{} {} tokens", peek->tag, peek->tokens->size());
  }
  if (const auto* match = std::get_if<MatchCommand>(&command)) {
    return fmt::format("match #{} {} tokens{}", match->tag, match->tokens.size(),
                       match->allow_restore ? ", restore" : "");
  }
  if (const auto* lease = std::get_if<LeaseCommand>(&command)) {
    return fmt::format("lease #{} {} blocks", lease->tag, lease->count);
  }
  if (const auto* commit = std::get_if<CommitCommand>(&command)) {
    std::vector<PoolBlock> blocks;
    for (const CommitBlock& block : commit->request.blocks) blocks.push_back(block.block);
    return fmt::format("commit #{} {} below e{}", commit->tag, ToString(blocks),
                       commit->request.parent);
  }
  if (const auto* release = std::get_if<ReleaseCommand>(&command)) {
    return fmt::format("release e{}", fmt::join(release->entries, " e"));
  }
  if (const auto* give_back = std::get_if<ReturnCommand>(&command)) {
    return fmt::format("return {}", ToString(give_back->blocks));
  }
  return fmt::format("copies done #{}",
                     fmt::join(std::get<CopyDoneCommand>(command).copy_ids, " #"));
}

std::string Describe(const CacheReply& reply) {
  if (const auto* peeked = std::get_if<Peeked>(&reply)) {
    return fmt::format("peeked #{}: {} + {} blocks", peeked->tag, peeked->result.device_blocks,
                       peeked->result.host_blocks);
  }
  if (const auto* matched = std::get_if<Matched>(&reply)) {
    return fmt::format("matched #{}: {} restoring {} by {}", matched->tag,
                       ToString(matched->result.device), ToString(matched->result.restoring),
                       ToString(matched->result.copies));
  }
  if (const auto* leased = std::get_if<Leased>(&reply)) {
    return fmt::format("leased #{}: {}", leased->tag, ToString(leased->blocks));
  }
  if (const auto* committed = std::get_if<Committed>(&reply)) {
    std::vector<std::string> entries;
    for (const CommittedBlock& block : committed->blocks) {
      entries.push_back(fmt::format("e{}{}", block.entry, block.duplicate ? " (duplicate)" : ""));
    }
    return fmt::format("committed #{}: {}", committed->tag, fmt::join(entries, " "));
  }
  if (const auto* copy_out = std::get_if<CopyOut>(&reply)) {
    return fmt::format("copy out {}", ToString(copy_out->copies));
  }
  if (std::holds_alternative<Distrusted>(reply)) return "distrusted";
  return "done";
}

std::string Describe(const HeldBlocks& held) {
  std::vector<std::string> pins;
  for (const PinCount& pin : held.pins) pins.push_back(fmt::format("e{}x{}", pin.entry, pin.count));
  return fmt::format("reconcile [{}] leased {}", fmt::join(pins, " "), ToString(held.leased));
}

std::string Describe(const StepPlan& plan) {
  std::string text = fmt::format("step {}:", plan.step);
  for (const BlockCopy& copy : plan.copies) {
    text += fmt::format(" copy {}{}h{}", static_cast<int32_t>(copy.block),
                        copy.to_device ? "<-" : "->", copy.host_slot);
  }
  for (const SlotInit& init : plan.slot_init) {
    text += fmt::format(" init s{}{}", init.slot, ToString(init.block_table));
  }
  for (const BlockAppend& append : plan.block_append) {
    text += fmt::format(" append s{}{}", append.slot, ToString(append.blocks));
  }
  for (const PlanRow& row : plan.rows) {
    text += fmt::format(" row s{} {}+{}{}{}", row.slot, row.position, row.length,
                        row.sample ? " sample" : "", row.tokens.empty() ? " own" : "");
  }
  for (const uint32_t slot : plan.slot_release) text += fmt::format(" release s{}", slot);
  return text;
}

}  // namespace wintserve::simulation
