#include "engine_worker/runner/pending_step.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <span>
#include <utility>

#include "common/status_macros.h"

namespace wintserve {

absl::StatusOr<std::unique_ptr<kernels::Buffer>> IdBuffers::Take() {
  {
    MutexLock lock(&mutex_);
    if (!free_.empty()) {
      std::unique_ptr<kernels::Buffer> buffer = std::move(free_.back());
      free_.pop_back();
      return buffer;
    }
  }
  return backend_->AllocateHost(max_ids_ * static_cast<int64_t>(sizeof(int32_t)));
}

void IdBuffers::GiveBack(std::unique_ptr<kernels::Buffer> buffer) {
  MutexLock lock(&mutex_);
  free_.push_back(std::move(buffer));
}

PendingStep::PendingStep(Work work, std::shared_ptr<IdBuffers> id_buffers)
    : work_(std::move(work)), id_buffers_(std::move(id_buffers)) {}

absl::StatusOr<StepDone> PendingStep::Wait() {
  RETURN_IF_ERROR(work_.begin->Wait());
  RETURN_IF_ERROR(work_.end->Wait());
  const std::span ids(static_cast<const int32_t*>(work_.ids->data()), work_.sampled.size());
  StepDone done = std::move(work_.done);
  done.execute_us = static_cast<uint32_t>(work_.end->MicrosecondsSince(*work_.begin));
  done.sampled_digest = XXH3_64bits(ids.data(), ids.size_bytes());
  for (size_t i = 0; i < ids.size(); ++i) {
    RETURN_IF_ERROR(CheckId(work_.sampled[i], ids[i]));
    if (work_.reports_ids) done.sampled.push_back({work_.sampled[i].slot, ids[i]});
  }
  id_buffers_->GiveBack(std::move(work_.ids));
  return done;
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
