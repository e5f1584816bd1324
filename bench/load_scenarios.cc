#include "bench/load_scenarios.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <list>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

namespace wintserve::bench {
namespace {

using nlohmann::json;

constexpr int kUnlimitedTokens = 1'000'000;  // the server lowers it to what the model length leaves

void RequireOk(const StreamResult& result, const char* what) {
  if (result.ok() && !result.arrivals.empty()) return;
  throw std::runtime_error(
      fmt::format("{}: status {}, {}", what, result.status,
                  result.error.empty() ? "the stream broke off" : result.error));
}

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

json Percentiles(const std::vector<double>& seconds) {
  if (seconds.empty()) return nullptr;
  return {{"count", seconds.size()},
          {"p50_ms", 1000 * Quantile(seconds, 0.5)},
          {"p99_ms", 1000 * Quantile(seconds, 0.99)},
          {"max_ms", 1000 * Quantile(seconds, 1)}};
}

// Streams that decode until they are stopped; each starts anew when it reaches the model's length.
class DecodingStreams {
 public:
  // Returns once every stream has had a token.
  DecodingStreams(const Target& target, int num_streams) : target_(target) {
    for (int i = 0; i < num_streams; ++i) threads_.emplace_back([this, i] { Run(i); });
    const auto deadline = Clock::now() + std::chrono::seconds(60);
    while (num_started_ < num_streams && Clock::now() < deadline) Sleep(0.01);
    if (num_started_ == num_streams) return;
    Stop();
    throw std::runtime_error("the decoding streams did not all start within 60 s");
  }
  ~DecodingStreams() { Stop(); }

  int64_t num_events() const { return num_events_; }

  // Ends the streams. Gaps between tokens that lie wholly within [from, to], over all streams.
  std::vector<double> StopAndTakeGaps(Clock::time_point from, Clock::time_point to) {
    Stop();
    if (!failure_.empty()) throw std::runtime_error(failure_);
    std::vector<double> gaps;
    for (const StreamResult& result : results_) {
      for (size_t i = 1; i < result.arrivals.size(); ++i) {
        const auto begin = result.arrivals[i - 1];
        const auto end = result.arrivals[i];
        if (begin >= from && end <= to) gaps.push_back(Seconds(end - begin));
      }
    }
    return gaps;
  }

 private:
  void Run(int index) {
    bool started = false;
    const auto on_event = [&] {
      ++num_events_;
      if (!std::exchange(started, true)) ++num_started_;
    };
    for (int round = 0; !stop_; ++round) {
      const json body = {{"prompt", RandomPrompt(32, 1'000'000 + index * 1000 + round)},
                         {"max_tokens", kUnlimitedTokens},
                         {"ignore_eos", true},
                         {"seed", index}};
      StreamResult result = RunStream(target_, body, &stop_, on_event);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!stop_ && !result.ok()) {
        failure_ =
            fmt::format("a decoding stream broke off: status {}, {}", result.status, result.error);
        return;
      }
      results_.push_back(std::move(result));
    }
  }
  void Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  const Target target_;
  std::atomic<bool> stop_ = false;
  std::atomic<int> num_started_ = 0;
  std::atomic<int64_t> num_events_ = 0;
  std::mutex mutex_;
  std::vector<StreamResult> results_;  // guarded by mutex_, as is failure_
  std::string failure_;
  std::vector<std::thread> threads_;
};

struct PromptLoop {
  std::vector<double> seconds_to_first;
  double tokens_per_second = 0;
};

// Prompts one after the other, each asking for one token, for as long as `seconds`.
PromptLoop RunPrompts(const Target& target, int prompt_tokens, double seconds, uint64_t seed) {
  PromptLoop loop;
  const auto start = Clock::now();
  auto last = start;
  while (Seconds(Clock::now() - start) < seconds) {
    const StreamResult result =
        RunStream(target, {{"prompt", RandomPrompt(prompt_tokens, ++seed)}, {"max_tokens", 1}});
    // A token without text gives no event of its own, so the whole request counts.
    if (!result.ok()) RequireOk(result, "a prompt");
    last = Clock::now();
    loop.seconds_to_first.push_back(Seconds(last - result.sent));
  }
  loop.tokens_per_second =
      static_cast<double>(loop.seconds_to_first.size()) * prompt_tokens / Seconds(last - start);
  return loop;
}

// Open streams of requests that the server has queued.
class WaitingStreams {
 public:
  WaitingStreams(const Target& target, int num_streams) {
    for (int i = 0; i < num_streams; ++i) {
      threads_.emplace_back([this, &target, i] {
        const StreamResult result = RunStream(
            target, {{"prompt", RandomPrompt(16, 2'000'000 + i)}, {"max_tokens", 8}}, &stop_);
        num_comments_ += result.num_comments;
        if (result.status != 200) ++num_refused_;
        if (!result.arrivals.empty()) ++num_served_;
      });
    }
  }
  ~WaitingStreams() { Stop(); }
  // They leave at their next keep-alive.
  void Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }
  int64_t num_comments() const { return num_comments_; }
  int num_refused() const { return num_refused_; }
  int num_served() const { return num_served_; }

 private:
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> num_comments_ = 0;
  std::atomic<int> num_refused_ = 0;
  std::atomic<int> num_served_ = 0;
  std::vector<std::thread> threads_;
};

void WaitForQueue(const Target& target, double num_waiting, Clock::time_point deadline) {
  while (ReadMetrics(target)["fastdeploy:num_requests_waiting"] < num_waiting) {
    if (Clock::now() > deadline) {
      throw std::runtime_error(fmt::format("fewer than {} requests came to wait", num_waiting));
    }
    Sleep(0.2);
  }
}

struct ActiveRate {
  double events_per_second = 0;
  int64_t num_comments = 0;
};

// Steps take longer as contexts grow, so the streams are as old in every phase when they are
// measured.
ActiveRate MeasureActive(const Target& target, const WaitingStreamsOptions& options,
                         int num_waiting) {
  DecodingStreams active(target, options.active);
  const auto from = Clock::now() + std::chrono::seconds(8);
  WaitingStreams waiting(target, num_waiting);
  WaitForQueue(target, num_waiting, from);
  std::this_thread::sleep_until(from);
  const int64_t before = active.num_events();
  Sleep(options.seconds);
  const double rate =
      static_cast<double>(active.num_events() - before) / Seconds(Clock::now() - from);
  waiting.Stop();  // before the active ones, whose end would let them in
  if (waiting.num_refused() > 0 || waiting.num_served() > 0) {
    throw std::runtime_error(fmt::format(
        "of the waiting streams {} were refused and {} served: the server needs {} slots and a "
        "queue of {}",
        waiting.num_refused(), waiting.num_served(), options.active, num_waiting));
  }
  return {rate, waiting.num_comments()};
}

// ShareGPT's first turns, roughly: log-normal lengths with medians of 60 and 150 tokens.
int LogNormalLength(std::mt19937_64* random, double median, double sigma, int maximum) {
  std::lognormal_distribution<double> lengths(std::log(median), sigma);
  return std::clamp(static_cast<int>(lengths(*random)), 4, maximum);
}

json TraceRequest(const TraceOptions& options, int index, std::mt19937_64* random) {
  std::uniform_real_distribution<double> uniform(0, 1);
  const int prompt_tokens = LogNormalLength(random, 60, 1.3, options.max_prompt_tokens);
  const int output_tokens = LogNormalLength(random, 150, 0.9, options.max_output_tokens);
  std::vector<int> prompt = RandomPrompt(prompt_tokens, options.seed * 1'000'000 + index);
  if (uniform(*random) < options.shared_prefix_share) {
    const std::vector<int> prefix = RandomPrompt(256, 3'000'000 + (*random)() % 8);
    prompt.insert(prompt.begin(), prefix.begin(), prefix.end());
  }
  return {{"prompt", prompt},
          {"max_tokens", output_tokens},
          {"ignore_eos", true},
          {"seed", index},
          {"user", fmt::format("user-{}", index % 7)}};
}

// What an overloaded server's refusal has to look like.
bool IsWellFormedRefusal(const StreamResult& result) {
  if (result.status != 429 || std::atoi(result.retry_after.c_str()) < 1) return false;
  const json body = json::parse(result.error, nullptr, /*allow_exceptions=*/false);
  return body.is_object() && body.contains("error") && body["error"].value("message", "") != "" &&
         body["error"].value("type", "") != "";
}

// The clients of a trace, each a thread.
class Trace {
 public:
  Trace(const Target& target, const TraceOptions& options)
      : target_(target), options_(options), random_(options.seed) {}

  json Run() {
    std::exponential_distribution<double> pauses(std::max(options_.requests_per_second, 1e-9));
    const auto start = Clock::now();
    auto due = start;
    auto burst_due = start + After(options_.burst_seconds);
    const auto goes_on = [&] {
      return options_.duration_seconds > 0 ? Seconds(due - start) < options_.duration_seconds
                                           : num_requests_ < options_.requests;
    };
    while (goes_on()) {
      if (options_.requests_per_second > 0) due += After(pauses(random_));
      while (options_.burst_requests > 0 && burst_due <= due) {
        std::this_thread::sleep_until(burst_due);
        for (int i = 0; i < options_.burst_requests; ++i) StartClient();
        burst_due += After(options_.burst_seconds);
      }
      std::this_thread::sleep_until(due);
      StartClient();
      JoinThoseThatEnded();
    }
    for (Client& client : clients_) client.thread.join();
    clients_.clear();
    return Report(Seconds(Clock::now() - start));
  }

 private:
  struct Client {
    std::thread thread;
    std::atomic<bool> ended = false;
  };

  static Clock::duration After(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }

  void StartClient() {
    const json body = TraceRequest(options_, num_requests_++, &random_);
    const double kind = std::uniform_real_distribution<double>(0, 1)(random_);
    const bool leaves = kind < options_.abort_share;
    const bool whole = !leaves && kind < options_.abort_share + options_.whole_share;
    Client& client = clients_.emplace_back();
    client.thread = std::thread([this, body, leaves, whole, &client] {
      if (whole) {
        Count(RunWhole(target_, body), /*left=*/false);
      } else {
        Stream(body, leaves);
      }
      client.ended = true;
    });
  }

  void Stream(const json& body, bool leaves) {
    std::atomic<bool> stop = false;
    int num_events = 0;
    const int leave_after = body["max_tokens"].get<int>() / 2;
    const StreamResult result = RunStream(target_, body, &stop, [&] {
      if (leaves && ++num_events >= leave_after) stop = true;
    });
    Count(result, stop);
  }

  void Count(const StreamResult& result, bool left) {
    const std::lock_guard<std::mutex> lock(mutex_);
    output_tokens_ += result.num_completion_tokens;
    if (left) {
      ++outcomes_["left"];
    } else if (result.ok()) {
      ++outcomes_["ok"];
      if (!result.arrivals.empty()) to_first_.push_back(result.seconds_to_first());
      const std::vector<double> own = result.gaps();
      gaps_.insert(gaps_.end(), own.begin(), own.end());
    } else if (IsWellFormedRefusal(result)) {
      ++outcomes_["refused"];
    } else {
      ++outcomes_["failed"];
      fmt::print(stderr, "status {}: {}\n", result.status, result.error);
    }
  }

  // Without waiting for any: the next request is due.
  void JoinThoseThatEnded() {
    std::erase_if(clients_, [](Client& client) {
      const bool ended = client.ended;
      if (ended) client.thread.join();
      return ended;
    });
  }

  json Report(double seconds) {
    return {{"requests_per_second", options_.requests_per_second},
            {"seed", options_.seed},
            {"seconds", seconds},
            {"outcomes", outcomes_},
            {"output_tokens_per_second", static_cast<double>(output_tokens_) / seconds},
            {"time_to_first_token", Percentiles(to_first_)},
            {"inter_token_latency", Percentiles(gaps_)}};
  }

  const Target target_;
  const TraceOptions options_;
  std::mt19937_64 random_;
  int num_requests_ = 0;
  std::list<Client> clients_;

  std::mutex mutex_;  // guards what follows
  std::vector<double> to_first_;
  std::vector<double> gaps_;
  std::map<std::string, int64_t> outcomes_;
  int64_t output_tokens_ = 0;
};

}  // namespace

json MeasureCachedPrefix(const Target& target, const CachedPrefixOptions& options) {
  std::vector<double> cold;
  std::vector<double> cached;
  const int shared_tokens = options.prompt_tokens - options.block_size_tokens;
  for (int i = 0; i <= options.repeats; ++i) {
    std::vector<int> prompt = RandomPrompt(options.prompt_tokens, 10 + i);
    // Several tokens, so that one without text does not leave the stream without an event.
    const auto run = [&] {
      StreamResult result = RunStream(
          target,
          {{"prompt", prompt}, {"max_tokens", 4}, {"ignore_eos", true}, {"temperature", 0}});
      RequireOk(result, "a prompt");
      return result;
    };
    const StreamResult first = run();
    const std::vector<int> tail = RandomPrompt(options.block_size_tokens, 1000 + i);
    std::copy(tail.begin(), tail.end(), prompt.begin() + shared_tokens);
    const StreamResult second = run();
    if (first.num_cached_tokens != 0 || second.num_cached_tokens != shared_tokens) {
      throw std::runtime_error(fmt::format(
          "cached tokens were {} and {}, expected 0 and {}: is prefix caching on, and new?",
          first.num_cached_tokens, second.num_cached_tokens, shared_tokens));
    }
    if (i == 0) continue;  // warms up
    cold.push_back(first.seconds_to_first());
    cached.push_back(second.seconds_to_first());
  }
  return {{"prompt_tokens", options.prompt_tokens},
          {"cached_tokens", shared_tokens},
          {"cold", Percentiles(cold)},
          {"cached", Percentiles(cached)},
          {"cached_to_cold", Median(cached) / Median(cold)}};
}

json MeasureDecode(const Target& target, const DecodeOptions& options) {
  std::vector<double> to_first;
  std::vector<double> gaps;
  std::vector<double> rates;
  for (int round = 0; round < options.repeats; ++round) {
    std::vector<StreamResult> results(options.streams);
    std::vector<std::thread> threads;
    for (int i = 0; i < options.streams; ++i) {
      threads.emplace_back([&, i] {
        const int seed = 3'000'000 + round * options.streams + i;
        results[i] = RunStream(target, {{"prompt", RandomPrompt(options.prompt_tokens, seed)},
                                        {"max_tokens", options.output_tokens},
                                        {"ignore_eos", true},
                                        {"temperature", 1},
                                        {"top_p", 1},
                                        {"seed", seed}});
      });
    }
    for (std::thread& thread : threads) thread.join();
    auto from = Clock::time_point::min();
    auto to = Clock::time_point::max();
    for (const StreamResult& result : results) {
      RequireOk(result, "a stream");
      to_first.push_back(result.seconds_to_first());
      from = std::max(from, result.arrivals.front());
      to = std::min(to, result.arrivals.back());
    }
    if (from >= to) {
      throw std::runtime_error(fmt::format(
          "the streams never all decoded at once; more than {} output tokens are needed",
          options.output_tokens));
    }
    int64_t num_events = 0;
    for (const StreamResult& result : results) {
      for (size_t i = 1; i < result.arrivals.size(); ++i) {
        if (result.arrivals[i - 1] < from || result.arrivals[i] > to) continue;
        gaps.push_back(Seconds(result.arrivals[i] - result.arrivals[i - 1]));
        ++num_events;
      }
    }
    rates.push_back(static_cast<double>(num_events) / Seconds(to - from));
  }
  return {{"streams", options.streams},
          {"prompt_tokens", options.prompt_tokens},
          {"output_tokens", options.output_tokens},
          {"to_first", Percentiles(to_first)},
          {"gaps", Percentiles(gaps)},
          {"tokens_per_second", Median(rates)}};
}

json MeasureInterference(const Target& target, const InterferenceOptions& options) {
  const PromptLoop alone = RunPrompts(target, options.prompt_tokens, options.seconds, 100'000);
  std::vector<double> quiet;
  {
    DecodingStreams streams(target, options.streams);
    Sleep(1);
    const auto from = Clock::now();
    Sleep(options.seconds);
    quiet = streams.StopAndTakeGaps(from, Clock::now());
  }
  DecodingStreams streams(target, options.streams);
  RunPrompts(target, options.prompt_tokens, 3, 200'000);  // lets the server measure its steps
  const auto from = Clock::now();
  const PromptLoop beside = RunPrompts(target, options.prompt_tokens, options.seconds, 300'000);
  const std::vector<double> busy = streams.StopAndTakeGaps(from, Clock::now());
  return {{"streams", options.streams},
          {"prompt_tokens", options.prompt_tokens},
          {"gaps_alone", Percentiles(quiet)},
          {"gaps_beside_prompts", Percentiles(busy)},
          {"p99_gap_ratio", Quantile(busy, 0.99) / Quantile(quiet, 0.99)},
          {"prompt_tokens_per_second_alone", alone.tokens_per_second},
          {"prompt_tokens_per_second_beside_streams", beside.tokens_per_second},
          {"prompt_rate_ratio", beside.tokens_per_second / alone.tokens_per_second},
          {"all_gaps_alone_seconds", quiet},
          {"all_gaps_beside_prompts_seconds", busy}};
}

json MeasureWaitingStreams(const Target& target, const WaitingStreamsOptions& options) {
  std::vector<double> ratios;
  json rounds = json::array();
  int64_t num_comments = 0;
  for (int round = 0; round < options.rounds; ++round) {
    const double alone = MeasureActive(target, options, 0).events_per_second;
    const ActiveRate beside = MeasureActive(target, options, options.waiting);
    num_comments += beside.num_comments;
    ratios.push_back(beside.events_per_second / alone);
    rounds.push_back({{"events_per_second_alone", alone},
                      {"events_per_second_beside", beside.events_per_second}});
  }
  return {{"active", options.active},
          {"waiting", options.waiting},
          {"rounds", rounds},
          {"keep_alive_comments", num_comments},
          {"rate_ratio", Median(ratios)}};
}

json MeasureTrace(const Target& target, const TraceOptions& options) {
  return Trace(target, options).Run();
}

}  // namespace wintserve::bench
