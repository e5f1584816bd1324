#include "engine_worker/runner/step_graphs.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {

std::vector<int64_t> StepGraphs::SizesUpTo(int64_t max_rows) {
  constexpr int64_t kFirstWithSteps = 16;
  std::vector<int64_t> sizes;
  for (int64_t size = 1; size < max_rows; size *= 2) {
    sizes.push_back(size);
    const int64_t between = size + size / 2;
    if (size >= kFirstWithSteps && between < max_rows) sizes.push_back(between);
  }
  if (max_rows > 0) sizes.push_back(max_rows);
  return sizes;
}

absl::Status StepGraphs::CaptureUpTo(int64_t max_rows, const PrepareFn& prepare) {
  CHECK(entries_.empty(), "{} graphs", entries_.size());
  const auto begin = std::chrono::steady_clock::now();
  std::vector<int64_t> sizes = SizesUpTo(max_rows);
  // The largest first: what grows does so once.
  std::reverse(sizes.begin(), sizes.end());
  std::vector<std::unique_ptr<Entry>> captured;
  for (const int64_t num_rows : sizes) {
    ASSIGN_OR_RETURN(std::unique_ptr<Entry> entry, Capture(num_rows, prepare));
    captured.push_back(std::move(entry));
  }
  std::reverse(captured.begin(), captured.end());
  entries_ = std::move(captured);
  capture_seconds_ =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<StepGraphs::Entry>> StepGraphs::Capture(int64_t num_rows,
                                                                       const PrepareFn& prepare) {
  auto entry = std::make_unique<Entry>();
  entry->num_rows = num_rows;
  ASSIGN_OR_RETURN(std::function<absl::Status()> operators, prepare(num_rows, &entry->logits));
  ASSIGN_OR_RETURN(entry->graph, backend_->Capture(fmt::format("'decode of {} rows'", num_rows),
                                                   std::move(operators)));
  return entry;
}

int64_t StepGraphs::size_bytes() const {
  int64_t bytes = 0;
  for (const auto& entry : entries_) bytes += entry->graph->size_bytes();
  return bytes;
}

const StepGraphs::Entry* StepGraphs::Find(int64_t num_rows) const {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [num_rows](const auto& entry) {
    return entry->num_rows >= num_rows;
  });
  return found == entries_.end() ? nullptr : found->get();
}

}  // namespace wintserve
