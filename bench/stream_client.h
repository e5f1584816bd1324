// One completion as a client sees it; of a streamed one, when each piece of text came.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

namespace wintserve::bench {

using Clock = std::chrono::steady_clock;

struct Target {
  std::string host = "127.0.0.1";
  int port = 8180;
  int metrics_port = 8181;
};

struct StreamResult {
  int status = 0;      // of HTTP; 0: no answer
  bool ended = false;  // the stream came to its own end
  std::string error;   // body of an answer that is not 200, or the text of an error event
  std::string retry_after;
  Clock::time_point sent;
  std::vector<Clock::time_point> arrivals;  // of every event with text, the first one included
  int64_t num_comments = 0;                 // keep-alives
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;
  int num_completion_tokens = 0;

  bool ok() const { return status == 200 && ended && error.empty(); }
  double seconds_to_first() const;
  // Seconds between one event and the next.
  std::vector<double> gaps() const;
};

// POST /v1/completions with "stream" and usage switched on. Blocks until the stream ends; a `stop`
// that has become true leaves it (the server sees the client go away). `on_event`, if any, is
// called with every event that has text.
StreamResult RunStream(const Target& target, nlohmann::json body,
                       const std::atomic<bool>* stop = nullptr,
                       const std::function<void()>& on_event = {});

// The same without "stream": `ended` says that the answer is complete; it has no arrivals.
StreamResult RunWhole(const Target& target, nlohmann::json body);

// Token ids that no prefix cache has seen, as long as the seeds differ.
std::vector<int> RandomPrompt(int num_tokens, uint64_t seed);

// Every sample of the server's /metrics, by name without labels (labelled ones are added up).
// Throws std::runtime_error when the port does not answer.
std::map<std::string, double> ReadMetrics(const Target& target);

double Seconds(Clock::duration duration);
// q from 0 to 1, of at least one value; the nearest rank.
double Quantile(std::vector<double> values, double q);
inline double Median(std::vector<double> values) { return Quantile(std::move(values), 0.5); }

}  // namespace wintserve::bench
