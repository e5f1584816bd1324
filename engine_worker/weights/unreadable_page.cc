#include "engine_worker/weights/unreadable_page.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/exit_code.h"
#include "common/mutex.h"

namespace wintserve {

// A node of a list that only grows and whose nodes are used again, so that a signal handler may
// walk it at any time.
struct NamedMapping::Place {
  std::atomic<uintptr_t> begin = 0;  // 0: free; then `end` and `message` may change
  std::atomic<uintptr_t> end = 0;
  std::string message;
  Place* next = nullptr;
};

struct MappingPlaces {
  using Place = NamedMapping::Place;

  static Place* Take(std::span<const uint8_t> bytes, std::string message) EXCLUDES(mutex) {
    const MutexLock lock(&mutex);
    Place* place = head.load(std::memory_order_acquire);
    while (place != nullptr && place->begin.load(std::memory_order_relaxed) != 0) {
      place = place->next;
    }
    if (place == nullptr) {
      place = new Place();
      place->next = head.load(std::memory_order_acquire);
      head.store(place, std::memory_order_release);
    }
    place->message = std::move(message);
    place->end.store(reinterpret_cast<uintptr_t>(bytes.data()) + bytes.size());
    place->begin.store(reinterpret_cast<uintptr_t>(bytes.data()), std::memory_order_release);
    return place;
  }

  // Only what a signal handler may do.
  static const Place* Find(uintptr_t address) {
    for (const Place* place = head.load(std::memory_order_acquire); place != nullptr;
         place = place->next) {
      const uintptr_t begin = place->begin.load(std::memory_order_acquire);
      if (begin != 0 && address >= begin && address < place->end.load()) return place;
    }
    return nullptr;
  }

  static inline std::atomic<Place*> head = nullptr;
  static inline Mutex mutex;
};

namespace {

struct sigaction previous_action;

void Write(std::string_view text) {
  if (::write(STDERR_FILENO, text.data(), text.size()) < 0) return;  // nobody is left to tell
}

void OnBusError(int number, siginfo_t* info, void* /*context*/) {
  const bool is_read = info->si_code > 0;  // not sent by a process
  const auto* place =
      is_read ? MappingPlaces::Find(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (place != nullptr) {
    static std::atomic_flag is_told;
    if (is_told.test_and_set()) ::pause();          // another thread says so and ends the process
    if (::isatty(STDERR_FILENO) == 1) Write("\n");  // a progress bar stands there
    Write(place->message);
    ::_exit(kExitCheckpoint);
  }
  ::sigaction(number, &previous_action, nullptr);
  // A read comes here again by itself.
  if (!is_read) ::raise(number);
}

void InstallHandler() {
  struct sigaction action = {};
  action.sa_sigaction = OnBusError;
  action.sa_flags = SA_SIGINFO;
  CHECK(::sigaction(SIGBUS, &action, &previous_action) == 0);
}

}  // namespace

NamedMapping::NamedMapping(std::span<const uint8_t> bytes, const std::filesystem::path& path) {
  [[maybe_unused]] static const bool installed = (InstallHandler(), true);
  place_ = MappingPlaces::Take(
      bytes, fmt::format("error: {}: a part of it cannot be read: an input/output error, or the "
                         "file was shortened\n",
                         path.string()));
}

NamedMapping::NamedMapping(NamedMapping&& other) noexcept
    : place_(std::exchange(other.place_, nullptr)) {}

NamedMapping& NamedMapping::operator=(NamedMapping&& other) noexcept {
  std::swap(place_, other.place_);
  return *this;
}

NamedMapping::~NamedMapping() {
  if (place_ != nullptr) place_->begin.store(0, std::memory_order_release);
}

}  // namespace wintserve
