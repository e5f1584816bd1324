#include "launcher/child.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <cstdlib>
#include <filesystem>

#include "common/check.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/sibling_path.h"
#include "common/status_macros.h"
#include "launcher/child_environment.h"

namespace wintserve {
namespace {

// Numbers of the descriptors in a child.
constexpr int kInstanceFd = 3;
constexpr int kHttpFd = 4;
constexpr int kMetricsFd = 5;
constexpr int kStartFd = 6;

// Never 0, which says that there is none.
uint64_t RandomWorkerId() {
  uint64_t id = 0;
  while (id == 0) {
    CHECK(::getrandom(&id, sizeof(id), 0) == sizeof(id), "getrandom: errno={}", errno);
  }
  return id;
}

const char* ProgramOf(ChildRole role) {
  switch (role) {
    case ChildRole::kApiServer:
      return "wintserve-api-server";
    case ChildRole::kEngineWorker:
      return "wintserve-engine-worker";
    case ChildRole::kCacheManager:
      return "wintserve-cache-manager";
  }
  return "";
}

}  // namespace

std::string LogNameOf(ChildRole role, int rank) {
  switch (role) {
    case ChildRole::kApiServer:
      return "api_server";
    case ChildRole::kEngineWorker:
      return fmt::format("engine_worker.{}", rank);
    case ChildRole::kCacheManager:
      return "cache_manager";
  }
  return "";
}

Child MakeChild(ChildRole role, int rank, const Instance& instance, const ReservedPorts& ports,
                InstanceLog* log) {
  Child child;
  child.output = ChildOutput(LogNameOf(role, rank), log);
  child.role = role;
  child.instance = instance;
  child.instance.start_fd = kStartFd;
  switch (role) {
    case ChildRole::kApiServer:
      child.name = "api server";
      child.keeps_stdout = instance.mode == "generate";  // the answer, as it is
      child.instance.http_fd = ports.http.valid() ? kHttpFd : -1;
      child.instance.metrics_fd = ports.metrics.valid() ? kMetricsFd : -1;
      break;
    case ChildRole::kEngineWorker:
      child.name = fmt::format("engine worker {}", rank);
      child.instance.rank = rank;
      break;
    case ChildRole::kCacheManager:
      child.name = "cache manager";
      break;
  }
  if (role != ChildRole::kApiServer) {
    child.instance.options.api_keys.clear();
    child.instance.generate_json.clear();
  }
  return child;
}

absl::Status SpawnChild(const ReservedPorts& ports, Child* child) {
  Instance& instance = child->instance;
  if (child->role == ChildRole::kEngineWorker) {
    instance.worker_id = RandomWorkerId();
    instance.restarted = child->num_starts > 0;
  }
  ASSIGN_OR_RETURN(const UniqueFd instance_fd, WriteInstance(instance));
  ASSIGN_OR_RETURN(const std::filesystem::path program, SiblingPath(ProgramOf(child->role)));
  ChildOptions options;
  options.argv = {program.string(), fmt::format("--instance-fd={}", kInstanceFd)};
  options.environment = {HeapTunables(
      child->role == ChildRole::kCacheManager ? HeapArenas::kOne : HeapArenas::kGlibcsChoice,
      std::getenv("GLIBC_TUNABLES"))};
  options.inherits = &IsForChildren;
  options.descriptors.push_back({instance_fd.get(), kInstanceFd});
  if (instance.http_fd >= 0) options.descriptors.push_back({ports.http.get(), kHttpFd});
  ASSIGN_OR_RETURN(const UniqueFd output, child->output.Open());
  options.output_fd = output.get();
  options.keeps_stdout = child->keeps_stdout;
  if (instance.metrics_fd >= 0) options.descriptors.push_back({ports.metrics.get(), kMetricsFd});
  child->start_signs = MakeStartPulse();
  if (!child->start_signs.valid()) return absl::ErrnoToStatus(errno, "eventfd");
  options.descriptors.push_back({child->start_signs.get(), kStartFd});
  ++child->num_starts;
  child->at_fault = child->hung = false;
  ASSIGN_OR_RETURN(child->process, ChildProcess::Spawn(options));
  child->started = Child::Clock::now();
  child->start_watch = StartWatch(StartLimit(instance.options.stall_timeout_ms), child->started);
  LOG_DEBUG("{} is process {}", child->name, child->process.pid());
  return absl::OkStatus();
}

}  // namespace wintserve
