#include "engine_worker/runner/pending_step.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <span>
#include <utility>

#include "common/status_macros.h"

namespace wintserve {
namespace {

// `from`: of one id, with `num_top` of the top; fewer if its vocabulary is smaller.
PositionLogprobs ReadLogprobs(const kernels::LogprobArrays& from, int32_t num_top) {
  PositionLogprobs logprobs = {.logprob = *from.logprobs, .rank = *from.ranks};
  for (int32_t j = 0; j < num_top && from.top_ids[j] >= 0; ++j) {
    logprobs.top.push_back({from.top_ids[j], from.top_logprobs[j]});
  }
  return logprobs;
}

}  // namespace

kernels::LogprobArrays StepResultLayout::logprobs(void* memory) const {
  const int64_t max_top = max_rows_ * kernels::sampling::kMaxTopLogprobs;
  auto* const logprobs = static_cast<float*>(memory) + max_rows_;
  int32_t* const ranks = ids(memory) + 2 * max_rows_;
  int32_t* const top_ids = ranks + max_rows_;
  return {logprobs, ranks, top_ids, static_cast<float*>(memory) + 3 * max_rows_ + max_top};
}

absl::StatusOr<std::unique_ptr<kernels::Buffer>> ResultBuffers::Take() {
  {
    MutexLock lock(&mutex_);
    if (!free_.empty()) {
      std::unique_ptr<kernels::Buffer> buffer = std::move(free_.back());
      free_.pop_back();
      return buffer;
    }
  }
  return backend_->AllocateHost(size_bytes_);
}

void ResultBuffers::GiveBack(std::unique_ptr<kernels::Buffer> buffer) {
  MutexLock lock(&mutex_);
  free_.push_back(std::move(buffer));
}

PendingStep::PendingStep(Work work, std::shared_ptr<ResultBuffers> result_buffers)
    : work_(std::move(work)), result_buffers_(std::move(result_buffers)) {}

absl::StatusOr<StepDone> PendingStep::Wait() {
  RETURN_IF_ERROR(work_.begin->Wait());
  RETURN_IF_ERROR(work_.end->Wait());
  // Whoever hears that the step is done takes its copies for done, too.
  if (work_.copies != nullptr) RETURN_IF_ERROR(work_.copies->Wait());
  if (work_.collective != nullptr) RETURN_IF_ERROR(work_.collective->DeviceStatus());
  const std::span<const int32_t> ids(work_.layout.ids(work_.results->data()), work_.sampled.size());
  StepDone done = std::move(work_.done);
  done.execute_us = static_cast<uint32_t>(work_.end->MicrosecondsSince(*work_.begin));
  const uint64_t digest = XXH3_64bits(ids.data(), ids.size_bytes());
  done.sampled_digest = digest != 0 ? digest : 1;  // 0 would be a digest that is missing
  if (work_.reports_ids) done.sampled.reserve(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    RETURN_IF_ERROR(CheckId(work_.sampled[i], ids[i]));
    if (!work_.reports_ids) continue;
    done.sampled.push_back({work_.sampled[i].slot, ids[i], LogprobsOf(static_cast<int64_t>(i))});
  }
  result_buffers_->GiveBack(std::move(work_.results));
  for (PromptPiece& piece : work_.prompt_pieces) {
    RETURN_IF_ERROR(TakePromptPiece(std::move(piece), &done.prompt_logprobs));
  }
  return done;
}

std::optional<PositionLogprobs> PendingStep::LogprobsOf(int64_t i) const {
  const int32_t num_top = work_.sampled[i].num_top_logprobs;
  if (num_top < 0) return std::nullopt;
  return ReadLogprobs(work_.layout.logprobs(work_.results->data()).From(i), num_top);
}

absl::Status PendingStep::TakePromptPiece(PromptPiece piece, std::vector<PromptRowLogprobs>* rows) {
  // A plan has one row of a slot.
  if (rows->empty() || rows->back().slot != piece.slot) {
    rows->push_back({.slot = piece.slot, .position = piece.position});
  }
  const kernels::LogprobArrays from = work_.prompt_layout.logprobs(piece.results->data());
  for (int32_t i = 0; i < piece.num_tokens; ++i) {
    rows->back().tokens.push_back(ReadLogprobs(from.From(i), piece.num_top_logprobs));
    if (rows->back().tokens.back().rank > 0) continue;
    return absl::InternalError(
        fmt::format("slot {} at position {}: a logit of the prompt is not a finite number",
                    piece.slot, piece.position + static_cast<uint32_t>(i)));
  }
  work_.prompt_buffers->GiveBack(std::move(piece.results));
  return absl::OkStatus();
}

absl::Status PendingStep::CheckId(const Sampled& row, int32_t id) const {
  if (id < 0) {
    return absl::InternalError(
        fmt::format("slot {} at position {}: the logit of token {} is not a "
                    "finite number",
                    row.slot, row.position, -1 - id));
  }
  if (id >= work_.sampled_vocab_size) {
    return absl::InternalError(
        fmt::format("slot {} at position {}: rank 0 shared the token {}, allowed are 0 … {}",
                    row.slot, row.position, id, work_.sampled_vocab_size - 1));
  }
  return absl::OkStatus();
}

}  // namespace wintserve
