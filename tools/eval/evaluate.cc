#include "tools/eval/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <numbers>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "common/check.h"
#include "common/mutex.h"
#include "common/progress.h"
#include "common/status_macros.h"
#include "tools/text/error_text.h"

namespace wintserve::eval {
namespace {

absl::StatusOr<Task> ReadTask(const TaskOptions& task_options, const Options& options,
                              const Tokenizer* tokenizer) {
  Task task;
  task.options = task_options;
  const std::string& file = task_options.file;
  const int64_t limit = task_options.limit;
  switch (task_options.kind) {
    case TaskKind::kPerplexity: {
      ASSIGN_OR_RETURN(task.sequences,
                       ReadWindows(file, *tokenizer, options.context_tokens, limit));
      break;
    }
    case TaskKind::kChatLoss: {
      ASSIGN_OR_RETURN(const std::vector<ChatItem> chats, ReadChats(file, limit));
      for (const ChatItem& chat : chats) {
        ASSIGN_OR_RETURN(ScoredSequence sequence, EncodeChat(chat, *tokenizer));
        task.sequences.push_back(std::move(sequence));
      }
      break;
    }
    case TaskKind::kMultipleChoice: {
      ASSIGN_OR_RETURN(task.choices, ReadChoices(file, limit));
      for (const ChoiceItem& item : task.choices) {
        ASSIGN_OR_RETURN(std::vector<ScoredSequence> sequences,
                         EncodeChoices(item, options.raw, *tokenizer));
        std::move(sequences.begin(), sequences.end(), std::back_inserter(task.sequences));
      }
      break;
    }
    case TaskKind::kExact: {
      ASSIGN_OR_RETURN(task.exact, ReadExactItems(file, limit));
      break;
    }
  }
  return task;
}

const char* NounOf(TaskKind kind) {
  switch (kind) {
    case TaskKind::kPerplexity:
      return "windows";
    case TaskKind::kChatLoss:
      return "chats";
    case TaskKind::kMultipleChoice:
      return "choices";
    case TaskKind::kExact:
      return "answers";
  }
  return "";
}

// The requests of one task, on several connections.
class Requests {
 public:
  using Work = std::function<absl::Status(HttpClient& client, size_t index)>;

  Requests(const Endpoint& endpoint, StopFlag* stop) : endpoint_(endpoint), stop_(stop) {}

  // Calls work for every index below `count`, on num_threads threads; after the first error no
  // other work begins.
  absl::Status Run(size_t count, int num_threads, Progress* progress, const Work& work)
      EXCLUDES(mu_) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min<size_t>(num_threads, count); ++i) {
      threads.emplace_back([&] { RunThread(count, progress, work); });
    }
    for (std::thread& thread : threads) thread.join();
    const MutexLock lock(&mu_);
    return status_;
  }

 private:
  void RunThread(size_t count, Progress* progress, const Work& work) EXCLUDES(mu_) {
    absl::StatusOr<HttpClient> client = HttpClient::Create(endpoint_, stop_);
    if (!client.ok()) return Fail(client.status());
    while (!has_failed_) {
      const size_t index = next_++;
      if (index >= count) return;
      const absl::Status status = work(*client, index);
      if (!status.ok()) return Fail(status);
      progress->Add(1);
    }
  }
  void Fail(const absl::Status& status) EXCLUDES(mu_) {
    has_failed_ = true;
    const MutexLock lock(&mu_);
    if (status_.ok()) status_ = status;
  }

  const Endpoint& endpoint_;
  StopFlag* const stop_;
  std::atomic<size_t> next_ = 0;
  std::atomic<bool> has_failed_ = false;
  Mutex mu_;
  absl::Status status_ GUARDED_BY(mu_);
};

double NatsOf(const ScoredSequence& sequence, const std::vector<double>& logprobs) {
  double nats = 0;
  for (size_t i = 1; i < logprobs.size(); ++i) {
    if (sequence.is_scored[i]) nats -= logprobs[i];
  }
  return nats;
}

int64_t CountScored(const Task& task) {
  int64_t count = 0;
  for (const ScoredSequence& sequence : task.sequences) count += sequence.NumScored();
  return count;
}

class Evaluation {
 public:
  Evaluation(const Options& options, const Endpoint& endpoint, StopFlag* stop)
      : options_(options), endpoint_(endpoint), stop_(stop) {}

  absl::Status Connect(ServedModel* model) {
    // A wrong URL is told at once; a server that loads its model, or that was there, is waited for.
    Endpoint impatient = endpoint_;
    impatient.retry_connecting = false;
    ASSIGN_OR_RETURN(HttpClient client, HttpClient::Create(impatient, stop_));
    ASSIGN_OR_RETURN(*model, FindModel(client, options_.served_model_name));
    if (options_.NeedsTokenizer()) {
      ASSIGN_OR_RETURN(HttpClient patient, HttpClient::Create(endpoint_, stop_));
      RETURN_IF_ERROR(FindPromptForm(patient, model));
    }
    model_ = *model;
    return absl::OkStatus();
  }

  absl::StatusOr<TaskResult> Run(const Task& task) {
    const auto begin = std::chrono::steady_clock::now();
    ASSIGN_OR_RETURN(TaskResult result,
                     task.options.kind == TaskKind::kExact ? RunExact(task) : RunScored(task));
    result.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return result;
  }

 private:
  absl::Status Send(const Task& task, size_t count, const Requests::Work& work) {
    Progress progress({.label = fmt::format("{} {}", NameOf(task.options.kind), task.options.file),
                       .total = static_cast<int64_t>(count),
                       .noun = NounOf(task.options.kind)});
    return Requests(endpoint_, stop_).Run(count, options_.concurrency, &progress, work);
  }

  absl::StatusOr<TaskResult> RunScored(const Task& task) {
    std::vector<double> nats(task.sequences.size());
    RETURN_IF_ERROR(Send(task, task.sequences.size(), [&](HttpClient& client, size_t index) {
      const ScoredSequence& sequence = task.sequences[index];
      const auto logprobs = PromptLogprobs(client, model_, sequence.ids);
      if (!logprobs.ok()) return tools::AtPlace(sequence.place, logprobs.status());
      nats[index] = NatsOf(sequence, *logprobs);
      return absl::OkStatus();
    }));
    return task.options.kind == TaskKind::kMultipleChoice ? SumUpChoices(task, nats)
                                                          : SumUpLosses(task, nats);
  }

  absl::StatusOr<TaskResult> RunExact(const Task& task) {
    std::vector<std::string> texts(task.exact.size());
    RETURN_IF_ERROR(Send(task, task.exact.size(), [&](HttpClient& client, size_t index) {
      const ExactItem& item = task.exact[index];
      auto text = GreedyAnswer(client, model_, item.prompt, options_.raw, options_.max_tokens);
      if (!text.ok()) return tools::AtPlace(item.place, text.status());
      texts[index] = *std::move(text);
      return absl::OkStatus();
    }));
    return SumUpAnswers(task, texts, options_.exact_match);
  }

  const Options& options_;
  const Endpoint& endpoint_;
  StopFlag* const stop_;
  ServedModel model_;
};

}  // namespace

absl::StatusOr<std::vector<Task>> ReadTasks(const Options& options, const Tokenizer* tokenizer) {
  CHECK(tokenizer != nullptr || !options.NeedsTokenizer());
  std::vector<Task> tasks;
  for (const TaskOptions& task_options : options.tasks) {
    ASSIGN_OR_RETURN(Task task, ReadTask(task_options, options, tokenizer));
    tasks.push_back(std::move(task));
  }
  return tasks;
}

absl::StatusOr<Report> Evaluate(const Options& options, const std::vector<Task>& tasks,
                                const Endpoint& endpoint, StopFlag* stop) {
  Evaluation evaluation(options, endpoint, stop);
  Report report;
  RETURN_IF_ERROR(evaluation.Connect(&report.model));
  for (const Task& task : tasks) {
    ASSIGN_OR_RETURN(TaskResult result, evaluation.Run(task));
    report.tasks.push_back(std::move(result));
  }
  return report;
}

TaskResult SumUpLosses(const Task& task, const std::vector<double>& nats) {
  CHECK(nats.size() == task.sequences.size(), "{} {}", nats.size(), task.sequences.size());
  std::vector<Group> groups;
  int64_t num_bytes = 0;
  for (size_t i = 0; i < nats.size(); ++i) {
    groups.push_back({nats[i], task.sequences[i].NumScored()});
    num_bytes += task.sequences[i].num_bytes;
  }
  TaskResult result;
  result.options = task.options;
  result.num_items = std::ssize(groups);
  result.num_tokens = CountScored(task);
  const Estimate loss = NatsPerToken(groups);
  const bool is_chat = task.options.kind == TaskKind::kChatLoss;
  result.measures.push_back({is_chat ? "nats per answer token" : "nats per token", loss});
  result.measures.push_back({"perplexity", Perplexity(loss)});
  if (num_bytes > 0) {
    const double bits_per_nat = 1 / std::numbers::ln2;
    const double factor =
        bits_per_nat * static_cast<double>(result.num_tokens) / static_cast<double>(num_bytes);
    Estimate bits{loss.value * factor, loss.standard_error};
    if (bits.standard_error.has_value()) *bits.standard_error *= factor;
    result.measures.push_back({"bits per byte", bits});
  }
  return result;
}

TaskResult SumUpChoices(const Task& task, const std::vector<double>& nats) {
  CHECK(nats.size() == task.sequences.size(), "{} {}", nats.size(), task.sequences.size());
  std::vector<bool> by_sum;
  std::vector<bool> by_byte;
  size_t first = 0;
  for (const ChoiceItem& item : task.choices) {
    std::vector<double> sums;
    std::vector<double> means;
    for (size_t i = 0; i < item.choices.size(); ++i) {
      sums.push_back(-nats[first + i]);
      means.push_back(sums.back() / static_cast<double>(item.choices[i].size()));
    }
    first += item.choices.size();
    by_sum.push_back(IndexOfLargest(sums) == item.answer);
    by_byte.push_back(IndexOfLargest(means) == item.answer);
  }
  TaskResult result;
  result.options = task.options;
  result.num_items = std::ssize(task.choices);
  result.num_tokens = CountScored(task);
  result.measures = {{"accuracy", Accuracy(by_sum)}, {"accuracy, per byte", Accuracy(by_byte)}};
  return result;
}

TaskResult SumUpAnswers(const Task& task, const std::vector<std::string>& texts, bool exact_match) {
  CHECK(texts.size() == task.exact.size(), "{} {}", texts.size(), task.exact.size());
  std::vector<bool> is_right;
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::string text(absl::StripAsciiWhitespace(texts[i]));
    const std::vector<std::string>& answers = task.exact[i].answers;
    is_right.push_back(std::any_of(answers.begin(), answers.end(), [&](const std::string& answer) {
      return exact_match ? text == answer : absl::StrContains(text, answer);
    }));
  }
  TaskResult result;
  result.options = task.options;
  result.num_items = std::ssize(task.exact);
  result.measures = {{"accuracy", Accuracy(is_right)}};
  return result;
}

}  // namespace wintserve::eval
