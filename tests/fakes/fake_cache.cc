#include "tests/fakes/fake_cache.h"

#include <chrono>
#include <utility>

#include "common/check.h"

namespace wintserve {

class FakeCache::Client : public CacheClient {
 public:
  explicit Client(FakeCache* cache) : cache_(cache) {}
  ~Client() override { Close(); }

  void OpenPool(const PoolSpec& spec) override {
    cache_->calls_.Push({.kind = Call::kOpen, .spec = spec});
  }
  void LeaseBlocks(uint64_t tag, uint32_t count) override {
    cache_->calls_.Push({.kind = Call::kLease, .tag = tag, .count = count});
  }
  void ReturnBlocks(std::vector<PoolBlock> blocks) override {
    cache_->calls_.Push({.kind = Call::kReturn, .blocks = std::move(blocks)});
  }
  // Waits for an event that is being told: none comes afterwards.
  void Close() override {
    MutexLock lock(&cache_->mutex_);
    cache_->events_ = {};
  }

 private:
  FakeCache* const cache_;
};

FakeCache::FakeCache() : thread_([this] { Run(); }) {}

FakeCache::~FakeCache() {
  calls_.Push({.kind = Call::kStop});
  thread_.join();
}

CacheConnector FakeCache::Connector() {
  return [this](uint64_t, CacheEvents events) -> absl::StatusOr<std::unique_ptr<CacheClient>> {
    MutexLock lock(&mutex_);
    if (!reachable_) return absl::UnavailableError("no cache manager");
    events_ = std::move(events);
    return std::make_unique<Client>(this);
  };
}

void FakeCache::SetReachable(bool reachable) {
  MutexLock lock(&mutex_);
  reachable_ = reachable;
}

void FakeCache::Die() { calls_.Push({.kind = Call::kDie}); }

bool FakeCache::WaitUntilAllFree() {
  MutexLock lock(&mutex_);
  return freed_.WaitFor(&mutex_, std::chrono::seconds(10), [this]() NO_THREAD_SAFETY_ANALYSIS {
    return free_.size() == spec_.num_blocks;
  });
}

PoolSpec FakeCache::spec() const {
  MutexLock lock(&mutex_);
  return spec_;
}

void FakeCache::Run() {
  for (;;) {
    for (Call& call : calls_.WaitAndTake()) {
      if (call.kind == Call::kStop) return;
      Serve(std::move(call));
    }
  }
}

// Events are told under the lock, so that Close() can wait for them; the engine only pushes.
void FakeCache::Serve(Call call) {
  MutexLock lock(&mutex_);
  switch (call.kind) {
    case Call::kOpen:
      spec_ = call.spec;
      for (uint32_t i = 0; i < spec_.num_blocks; ++i) free_.push_back({static_cast<int32_t>(i), 0});
      if (events_.on_opened) {
        events_.on_opened(OpenedPool{
            .pool_epoch = 99, .memory_socket = "unused", .num_blocks = spec_.num_blocks});
      }
      return;
    case Call::kLease: {
      std::vector<PoolBlock> blocks;
      if (call.count <= free_.size()) {
        blocks.assign(free_.end() - call.count, free_.end());
        free_.resize(free_.size() - call.count);
      }
      if (events_.on_leased) events_.on_leased(call.tag, std::move(blocks));
      return;
    }
    case Call::kReturn:
      for (const PoolBlock& block : call.blocks) free_.push_back({block.id, block.generation + 1});
      CHECK(free_.size() <= spec_.num_blocks, "free={}", free_.size());
      freed_.NotifyAll();
      return;
    case Call::kDie:
      if (events_.on_closed) events_.on_closed(absl::UnavailableError("killed"));
      events_ = {};
      return;
    case Call::kStop:
      return;
  }
}

}  // namespace wintserve
