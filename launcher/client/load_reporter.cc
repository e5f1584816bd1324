#include "launcher/client/load_reporter.h"

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "launcher/client/supervisor_client.h"

namespace wintserve {
namespace {

// The next report makes up for one that does not come through, but none for the last, without which
// the bar would stay for a while.
constexpr int64_t kTimeoutMs = 200;
constexpr int64_t kLastTimeoutMs = 2000;

}  // namespace

bool IsLoadingLine(std::string_view log_line) {
  constexpr std::string_view kLevel = "INFO ";
  constexpr std::string_view kEndOfHead = ": ";
  if (!log_line.starts_with(kLevel)) return false;
  const size_t head_end = log_line.find(kEndOfHead);
  if (head_end == log_line.npos) return false;
  const std::string_view message = log_line.substr(head_end + kEndOfHead.size());
  if (!message.starts_with(kLoadingLabel)) return false;
  const std::string_view rest = message.substr(kLoadingLabel.size());
  return rest.starts_with(": ") || rest.starts_with(", rank ");
}

LoadReporter::LoadReporter(Place place, std::chrono::milliseconds interval)
    : place_(std::move(place)), interval_(interval), thread_([this] { Run(); }) {}

LoadReporter::~LoadReporter() {
  {
    const MutexLock lock(&mu_);
    stopping_ = true;
  }
  changed_.NotifyAll();
  thread_.join();
}

void LoadReporter::Set(int64_t done_bytes, int64_t total_bytes) {
  const MutexLock lock(&mu_);
  total_bytes_ = total_bytes;
  done_bytes_ = std::clamp<int64_t>(done_bytes, 0, total_bytes);
  if (done_bytes_ == total_bytes_) changed_.NotifyAll();
}

void LoadReporter::Run() {
  bool has_told = false;
  while (true) {
    LoadProgressNotice notice = {.rank = place_.rank, .worker_id = place_.worker_id};
    {
      const MutexLock lock(&mu_);
      const bool is_over = changed_.WaitFor(&mu_, interval_, [this]() NO_THREAD_SAFETY_ANALYSIS {
        return stopping_ || (total_bytes_ > 0 && done_bytes_ == total_bytes_);
      });
      notice.done_bytes = done_bytes_;
      notice.total_bytes = total_bytes_;
      const bool is_loaded = total_bytes_ > 0 && done_bytes_ == total_bytes_;
      // Whoever has heard nothing need not hear that it is over.
      if (is_over && !(is_loaded && has_told)) return;
    }
    if (notice.total_bytes == 0) continue;
    const bool is_last = notice.done_bytes == notice.total_bytes;
    const absl::Status told = TellLoadProgress(place_.supervisor_socket, place_.token, notice,
                                               is_last ? kLastTimeoutMs : kTimeoutMs);
    if (!told.ok()) LOG_DEBUG("the launcher is not told: {}", std::string(told.message()));
    if (is_last) return;
    has_told = true;
  }
}

}  // namespace wintserve
