#include "launcher/loading_bar.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/check.h"
#include "launcher/client/load_reporter.h"

namespace wintserve {

void LoadingBar::Report(int rank, int64_t done_bytes, int64_t total_bytes, Time now) {
  CHECK(0 <= done_bytes && done_bytes <= total_bytes && total_bytes > 0, "{} of {}", done_bytes,
        total_bytes);
  const bool is_new = !ranks_.contains(rank);
  if (is_new && done_bytes == total_bytes) return;
  if (ranks_.empty()) {
    begin_ = now;
    next_row_ = now + interval_;  // by then the others have told, too
  }
  Rank& known = ranks_[rank];
  if (is_new) known.done_before = done_bytes;
  known.done_bytes = done_bytes;
  known.total_bytes = total_bytes;
  known.last_report = now;
}

void LoadingBar::Remove(int rank) {
  if (ranks_.erase(rank) > 0) next_row_ = begin_;
}

bool LoadingBar::AnyLoads(Time now) const {
  return std::ranges::any_of(ranks_, [now](const auto& entry) {
    const Rank& rank = entry.second;
    return rank.done_bytes < rank.total_bytes && now - rank.last_report < kPatience;
  });
}

bool LoadingBar::IsDue(Time now) const { return AnyLoads(now) ? now >= next_row_ : is_shown_; }

std::optional<LoadingBar::Time> LoadingBar::next_time() const {
  return ranks_.empty() ? std::nullopt : std::optional(next_row_);
}

bool LoadingBar::Advance(Time now, std::string* label, ProgressState* state) {
  is_shown_ = AnyLoads(now);
  if (!is_shown_) {
    ranks_.clear();
    return false;
  }
  next_row_ = now + interval_;
  *label = Label();
  *state = {.label = *label,
            .noun = "",
            .note = "",
            .seconds = std::chrono::duration<double>(now - begin_).count()};
  for (const auto& [number, rank] : ranks_) {
    state->done += rank.done_bytes;
    state->total += rank.total_bytes;
    state->done_before += rank.done_before;
  }
  return true;
}

std::string LoadingBar::Row(Time now, int columns, bool utf8) {
  std::string label;
  ProgressState state;
  return Advance(now, &label, &state) ? ProgressBar(state, columns, utf8) : "";
}

std::string LoadingBar::Line(Time now) {
  std::string label;
  ProgressState state;
  return Advance(now, &label, &state) ? ProgressLine(state) : "";
}

std::string LoadingBar::Label() const {
  if (num_ranks_ == 1) return std::string(kLoadingLabel);
  if (ranks_.size() == 1) return fmt::format("{} rank {}", kLoadingLabel, ranks_.begin()->first);
  return fmt::format("{} {} ranks", kLoadingLabel, ranks_.size());
}

}  // namespace wintserve
