// The clients: what they ask, when they give up, and whether what they get is right (I1, I7, I8).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "api_server/scheduler/scheduler.h"
#include "tests/simulation/config.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/random.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

class Clients {
 public:
  struct Actions {
    std::function<bool()> is_server_there;  // else nobody submits
    std::function<absl::Status(const ScheduledRequest&)> submit;
    std::function<void(uint64_t request)> cancel_request;
    std::function<void(const SequenceKey&)> cancel_choice;
    // After any of the others, none of which calls back.
    std::function<void()> done;
  };

  Clients(const SimulationConfig& config, References* references, EventQueue* events,
          Report* report, Actions actions);

  // Schedules all arrivals.
  void Start();

  void OnStarted(const SequenceStart& start);
  void OnToken(const SequenceToken& token);
  void OnFailed(const SequenceFailure& failure);
  // All streams break.
  void OnServerLost();

  // To be called when the scheduler has seen the present time.
  void CheckDeadlines() const;
  // Nothing will ever happen again.
  void CheckAllEnded() const;
  // A sequence with this salt that begins with these tokens has not ended.
  bool IsWanted(const std::string& salt, const std::vector<int32_t>& tokens) const;

 private:
  enum class State { kLive, kFinished, kFailed, kCancelled };

  struct Stream {
    const ReferenceSequence* reference = nullptr;
    State state = State::kLive;
    bool started = false;
    bool bypasses_cache = false;
    size_t num_tokens = 0;  // received
    std::optional<int64_t> deadline_us;
  };

  void Arrive();
  void Register(const ScheduledRequest& request);
  void GiveUpLater(const ScheduledRequest& request);
  void Cancel(const SequenceKey& key);
  ScheduledRequest MakeRequest();
  std::vector<int32_t> MakePrompt();
  std::vector<int32_t> RandomTokens(int64_t count);
  void CheckPromptLogprobs(const SequenceToken& token, size_t index) const;
  Stream* FindLive(const SequenceKey& key, const char* event);

  const SimulationConfig& config_;
  References& references_;
  EventQueue& events_;
  Report& report_;
  const Actions actions_;
  Random random_;
  std::vector<std::vector<int32_t>> documents_;
  std::vector<SequenceKey> accepted_;
  uint64_t next_id_ = 1;
  std::map<SequenceKey, Stream> streams_;
};

}  // namespace wintserve::simulation
