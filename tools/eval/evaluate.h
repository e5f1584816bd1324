// The tasks: read, run against a server, summed up.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/tokenizer.h"
#include "tools/eval/http_client.h"
#include "tools/eval/model_server.h"
#include "tools/eval/options.h"
#include "tools/eval/sequences.h"
#include "tools/eval/statistics.h"

namespace wintserve::eval {

// A task with everything that is sent for it.
struct Task {
  TaskOptions options;
  std::vector<ScoredSequence> sequences;  // one a window, a chat, or a choice (in order of items)
  std::vector<ChoiceItem> choices;        // of multiple choice
  std::vector<ExactItem> exact;           // of exact answers
};

struct Measure {
  std::string name;  // "nats per token"
  Estimate estimate;
};

struct TaskResult {
  TaskOptions options;
  int64_t num_items = 0;   // windows, chats, questions
  int64_t num_tokens = 0;  // scored; 0 for exact answers
  std::vector<Measure> measures;
  double seconds = 0;
};

struct Report {
  ServedModel model;
  std::vector<TaskResult> tasks;
};

// Reads every file, so that a bad line is found before a server is asked or started. tokenizer may
// be null if no task needs token ids (Options::NeedsTokenizer).
absl::StatusOr<std::vector<Task>> ReadTasks(const Options& options, const Tokenizer* tokenizer);

// Runs the tasks one after another, options.concurrency requests at a time, with progress on
// stderr. The first error ends it; the text names file and line. `stop`: as of HttpClient.
absl::StatusOr<Report> Evaluate(const Options& options, const std::vector<Task>& tasks,
                                const Endpoint& endpoint, StopFlag* stop);

// What the log-probabilities of a task's sequences come to; nats: one sum per sequence.
TaskResult SumUpLosses(const Task& task, const std::vector<double>& nats);
TaskResult SumUpChoices(const Task& task, const std::vector<double>& nats);
TaskResult SumUpAnswers(const Task& task, const std::vector<std::string>& texts, bool exact_match);

}  // namespace wintserve::eval
