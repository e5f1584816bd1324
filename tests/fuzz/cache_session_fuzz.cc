// A hostile client of the cache manager that knows the token: requests of two streams that break,
// end and take over, checked from outside after each. The input is a list of
//
//   action byte: its lowest bit names the stream, the other bits modulo 8 what happens
//   for a request (0 to 4) and an Admin (5): length byte, and so many bytes of message
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {
namespace {

constexpr uint32_t kMaxBlocks = 64;

MemoryServer* SharedMemoryServer() {
  static const InputDir* const dir = new InputDir;
  static MemoryServer* const server = [] {
    auto started = MemoryServer::Start(dir->path() / "memory.sock", "token");
    CHECK(started.ok(), "{}", started.status().ToString());
    return started->release();
  }();
  return server;
}

// As on a machine with little memory.
absl::StatusOr<std::unique_ptr<PoolMemory>> MakeSmallMemory(const PoolSize& size,
                                                            int64_t available_bytes) {
  if (size.num_blocks > kMaxBlocks || size.num_host_slots > kMaxBlocks) {
    return absl::ResourceExhaustedError("more blocks than this test's machine has");
  }
  ASSIGN_OR_RETURN(auto memory, HostPoolMemory::Create(size, available_bytes));
  return memory;
}

class Input {
 public:
  explicit Input(std::string_view bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  uint8_t TakeByte() {
    if (bytes_.empty()) return 0;
    const uint8_t byte = static_cast<uint8_t>(bytes_.front());
    bytes_.remove_prefix(1);
    return byte;
  }
  std::string Take(size_t count) {
    std::string taken(bytes_.substr(0, count));
    bytes_.remove_prefix(taken.size());
    return taken;
  }

 private:
  std::string_view bytes_;
};

class Sessions {
 public:
  Sessions() : owner_(SharedMemoryServer(), "", &MakeSmallMemory, [this] { return now_; }) {
    for (uint64_t& id : ids_) id = owner_.NewSession();
  }
  ~Sessions() {
    for (const uint64_t id : ids_) owner_.EndSession(id);
  }

  void Act(Input* input) {
    const uint8_t byte = input->TakeByte();
    uint64_t& id = ids_[byte & 1];
    switch ((byte >> 1) % 8) {
      case 5:
        return Admin(input->Take(input->TakeByte()));
      case 6:  // the stream breaks and is opened anew
        owner_.SuspendSession(id);
        id = owner_.NewSession();
        break;
      case 7:
        now_ += std::chrono::seconds(3);
        owner_.EndExpiredSession();
        break;
      default:
        Request(id, input->Take(input->TakeByte()));
    }
    CheckStats();
  }

 private:
  void Request(uint64_t id, const std::string& bytes) {
    proto::CacheRequest request;
    if (!request.ParseFromString(bytes)) return;
    // Epochs are random: 1 stands for the open pool's.
    if (request.open().adopt_pool_epoch() == 1) {
      request.mutable_open()->set_adopt_pool_epoch(owner_.Stats().pool_epoch());
    }
    const std::vector<proto::CacheReply> replies = owner_.Handle(id, request);
    CHECK(!replies.empty() && replies.size() <= 2, "{}", replies.size());
    CHECK(replies[0].reply_case() != proto::CacheReply::REPLY_NOT_SET);
    CHECK(replies[0].seq() == request.seq());
    if (replies[0].has_refusal()) {
      CHECK(replies.size() == 1 && replies[0].refusal().status_code() != 0);
      CHECK(
          replies[0].refusal().status_code() != static_cast<uint32_t>(absl::StatusCode::kInternal),
          "{}", replies[0].refusal().text());
    }
    CheckStats();
  }

  void Admin(const std::string& bytes) {
    proto::AdminRequest request;
    if (request.ParseFromString(bytes)) owner_.Admin(request).IgnoreError();
    CheckStats();
  }

  void CheckStats() {
    const proto::StatsReply stats = owner_.Stats();
    const uint32_t sum = stats.num_free() + stats.num_leased() + stats.num_committed_pinned() +
                         stats.num_committed_unpinned() + stats.num_restoring() +
                         stats.num_copying_out() + stats.num_quarantined();
    CHECK(sum == stats.num_blocks(), "{} of {} blocks have a state", sum, stats.num_blocks());
    const uint32_t host = stats.num_host_free() + stats.num_host_filling() +
                          stats.num_host_valid() + stats.num_host_quarantined();
    CHECK(host == stats.num_host_slots(), "{} of {} slots", host, stats.num_host_slots());
  }

  PoolOwner::Clock::time_point now_{};
  PoolOwner owner_;
  uint64_t ids_[2] = {};
};

}  // namespace

void FuzzInput(std::string_view bytes) {
  Sessions sessions;
  Input input(bytes);
  while (!input.empty()) sessions.Act(&input);
}

}  // namespace wintserve
