#include "api_server/llm/cache_link.h"

#include <chrono>
#include <utility>

#include "absl/status/statusor.h"
#include "common/check.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr auto kPauseBetweenTries = std::chrono::milliseconds(200);
// A session that cannot be made anew for so long: what listens there does not answer.
constexpr auto kHangPatience = std::chrono::seconds(3);

// Holds back the end of a session until its beginning has been told: a session may be lost while
// it is being made.
class EndAfterBeginning {
 public:
  explicit EndAfterBeginning(std::function<void(absl::Status)> on_closed)
      : on_closed_(std::move(on_closed)) {}

  void TellEnd(absl::Status status) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (begun_) return on_closed_(std::move(status));
    end_ = std::move(status);
  }
  void Begin() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    begun_ = true;
    if (end_.has_value()) on_closed_(*std::move(end_));
  }

 private:
  const std::function<void(absl::Status)> on_closed_;
  Mutex mutex_;
  bool begun_ GUARDED_BY(mutex_) = false;
  std::optional<absl::Status> end_ GUARDED_BY(mutex_);
};

}  // namespace

CacheLink::CacheLink(CacheLinkOptions options)
    : options_(std::move(options)), thread_([this] { Run(); }) {}

CacheLink::~CacheLink() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void CacheLink::Reconnect(std::unique_ptr<CacheClient> client, bool hangs) {
  MutexLock lock(&mutex_);
  CHECK(!order_.has_value(), "a session was lost that was not there");
  order_ = Order{std::move(client), hangs};
  changed_.NotifyAll();
}

void CacheLink::Run() {
  while (std::optional<Order> order = NextOrder()) {
    if (order->hangs) TellHang();
    const bool anew = order->lost != nullptr;
    order->lost.reset();
    if (!Connect(anew)) return;
  }
}

std::optional<CacheLink::Order> CacheLink::NextOrder() {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_,
                [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_ || order_.has_value(); });
  if (stopping_) return std::nullopt;
  return std::exchange(order_, std::nullopt);
}

void CacheLink::TellHang() {
  if (options_.on_hang) options_.on_hang();
}

bool CacheLink::Connect(bool anew) {
  steady_clock::time_point hang_time = steady_clock::now() + kHangPatience;
  for (;;) {
    const auto order = std::make_shared<EndAfterBeginning>(options_.events.on_closed);
    CacheEvents events = options_.events;
    events.on_closed = [order](absl::Status status) { order->TellEnd(std::move(status)); };
    absl::StatusOr<std::unique_ptr<CacheClient>> client =
        options_.connect(options_.api_epoch, std::move(events));
    if (client.ok()) {
      options_.on_connected(*std::move(client));
      order->Begin();
      return true;
    }
    if (!absl::IsUnavailable(client.status()) && !absl::IsDeadlineExceeded(client.status())) {
      options_.on_refused(client.status());
      return true;
    }
    if (anew && steady_clock::now() >= hang_time) {
      TellHang();
      hang_time = steady_clock::now() + kHangPatience;
    }
    MutexLock lock(&mutex_);
    if (changed_.WaitFor(&mutex_, kPauseBetweenTries,
                         [this]() NO_THREAD_SAFETY_ANALYSIS { return stopping_; })) {
      return false;
    }
  }
}

}  // namespace wintserve
