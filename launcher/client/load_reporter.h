// Tells the launcher how far an engine worker's loading is, for the bar on its console.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <thread>

#include "common/mutex.h"

namespace wintserve {

// How a worker's lines about loading begin: "loading: …", or "loading, rank 0 of 2: …" where it has
// several ranks. The launcher leaves them out where it draws a bar.
inline constexpr std::string_view kLoadingLabel = "loading";

// Whether that is such a line, as common/log.h writes it, at level INFO.
bool IsLoadingLine(std::string_view log_line);

// Owns a thread that tells what it knows every interval, the first time after one, so that short
// loads are silent, and the last time when all is done. Without a launcher in reach nothing is told
// and nothing is logged. Threading: any thread; nothing blocks but the destructor, for at most
// 0.4 s if a report is under way and the launcher does not answer, or 4 s if that is the last.
class LoadReporter {
 public:
  struct Place {
    std::string supervisor_socket;
    std::string token;
    uint32_t rank = 0;
    uint64_t worker_id = 0;  // of this process
  };

  explicit LoadReporter(Place place,
                        std::chrono::milliseconds interval = std::chrono::milliseconds(200));
  ~LoadReporter();
  LoadReporter(const LoadReporter&) = delete;
  LoadReporter& operator=(const LoadReporter&) = delete;

  // Bytes of the files, or of dummy weights; done_bytes == total_bytes: loaded. REQUIRES:
  // total_bytes > 0.
  void Set(int64_t done_bytes, int64_t total_bytes) EXCLUDES(mu_);

 private:
  void Run() EXCLUDES(mu_);

  const Place place_;
  const std::chrono::milliseconds interval_;
  Mutex mu_;
  CondVar changed_;
  int64_t done_bytes_ GUARDED_BY(mu_) = 0;
  int64_t total_bytes_ GUARDED_BY(mu_) = 0;  // 0: nothing to tell yet
  bool stopping_ GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace wintserve
