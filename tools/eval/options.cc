#include "tools/eval/options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <map>

#include "absl/strings/str_split.h"
#include "common/check.h"
#include "common/exit_code.h"

namespace wintserve::eval {
namespace {

constexpr char kFooter[] = R"(
--limit N behind a task is for that task, in front of all tasks for each. Tasks may be given more
than once. What stands behind "--" are flags of `wintserve serve`, with --model only:

  wintserve eval --model models/poet --perplexity plain.jsonl --limit 40 --exact recite.jsonl \
      --json report.json -- --device cuda --tensor-parallel-size 2
  wintserve eval --server http://127.0.0.1:8180 --tokenizer models/poet --chat-loss chats.jsonl

Files, one JSON object a line:
  --perplexity       {"text"}; a file whose name does not end in .jsonl is one document, of 16 MiB
                     at most
  --chat-loss        {"messages": [{"role", "content"}, ...]}
  --multiple-choice  {"prompt" or "question", "choices": [...], "answer": index, letter or text}
  --exact            {"prompt" or "question", "answer": text or list of texts}
)";

const std::map<std::string, TaskKind>& TaskFlags() {
  static const std::map<std::string, TaskKind> flags = {
      {"--perplexity", TaskKind::kPerplexity},
      {"--chat-loss", TaskKind::kChatLoss},
      {"--multiple-choice", TaskKind::kMultipleChoice},
      {"--exact", TaskKind::kExact}};
  return flags;
}

// As its check has read it, who takes "0x10" and "1_000", too.
int64_t Limit(const std::string& value) {
  int64_t limit = 0;
  CHECK(CLI::detail::lexical_cast(value, limit), "{}", value);
  return limit;
}

// CLI11 keeps the values of every option in order, and the order of all options: together that says
// which --limit stands behind which task.
void TakeTasks(const CLI::App& app, Options* options) {
  std::map<const CLI::Option*, size_t> num_taken;
  int64_t limit_of_all = 0;
  for (const CLI::Option* option : app.parse_order()) {
    const std::string name = option->get_name();
    const auto task = TaskFlags().find(name);
    if (task == TaskFlags().end() && name != "--limit") continue;
    const std::string& value = option->results()[num_taken[option]++];
    if (task != TaskFlags().end()) {
      options->tasks.push_back({task->second, value, limit_of_all});
    } else if (options->tasks.empty()) {
      limit_of_all = Limit(value);
    } else {
      options->tasks.back().limit = Limit(value);
    }
  }
}

// Flags of the server that are eval's to choose, and what to do instead.
std::string CheckServerFlags(const std::vector<std::string>& flags) {
  static const std::map<std::string, const char*> ours = {
      {"--model", "give it in front of \"--\""},
      {"--api-key", "give it in front of \"--\""},
      {"--host", "eval chooses one"},
      {"--port", "eval chooses one"},
      {"--metrics-port", "eval chooses one"},
      {"--engine-worker-queue-port", "eval chooses one"},
      {"--cache-queue-port", "eval chooses one"}};
  for (const std::string& flag : flags) {
    const auto found = ours.find(flag.substr(0, flag.find('=')));
    if (found == ours.end()) continue;
    return fmt::format("{}: must not stand behind \"--\"; {}", found->first, found->second);
  }
  return "";
}

// Empty if nothing is wrong.
std::string CheckTogether(const Options& options) {
  if (options.tasks.empty()) {
    return "nothing to do: give --perplexity, --chat-loss, --multiple-choice or --exact";
  }
  if (options.model.empty() == options.server.empty()) {
    return options.model.empty() ? "give --model DIR or --server URL"
                                 : "--model and --server exclude each other";
  }
  if (!options.server.empty() && !options.server_flags.empty()) {
    return fmt::format("{}: flags behind \"--\" are for the server that --model starts",
                       options.server_flags.front());
  }
  if (std::string error = CheckServerFlags(options.server_flags); !error.empty()) return error;
  if (!options.server.empty() && !options.server_log.empty()) {
    return "--server-log: is for the server that --model starts";
  }
  if (options.NeedsTokenizer() && options.tokenizer.empty()) {
    return fmt::format(
        "--tokenizer: {} needs the directory of the model's tokenizer",
        NameOf(
            std::find_if(options.tasks.begin(), options.tasks.end(), [](const TaskOptions& task) {
              return task.kind != TaskKind::kExact;
            })->kind));
  }
  return "";
}

void Declare(CLI::App* app, Options* options) {
  app->footer(kFooter);
  // An unset variable of a script is no choice of a default.
  const CLI::Validator is_given(
      [](const std::string& text) {
        return text.empty() ? std::string("must not be empty") : std::string();
      },
      "");
  const CLI::callback_t is_read_later = [](const CLI::results_t&) { return true; };
  app->add_option(
         "--model", options->model,
         "Checkpoint directory; `wintserve serve` is started on it, and stopped at the end")
      ->check(is_given);
  app->add_option("--server", options->server, "URL of a running server instead")->check(is_given);
  for (const auto& [flag, kind] : TaskFlags()) {
    app->add_option(flag, is_read_later, NameOf(kind))
        ->type_name("FILE")
        ->check(is_given)
        ->allow_extra_args(false)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  }
  app->add_option("--limit", is_read_later,
                  "The first N lines of a task's file (windows, of --perplexity)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app->add_option("--tokenizer", options->tokenizer, "Its directory; default: --model")
      ->check(is_given);
  app->add_option("--served-model-name", options->served_model_name,
                  "Which of the server's models; default: its only one")
      ->check(is_given);
  app->add_option("--api-key", options->api_key,
                  "Of the server; default: FD_API_KEY, which others cannot read");
  app->add_option("--context-tokens", options->context_tokens,
                  "Tokens of a window of --perplexity; its first one is not scored")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  app->add_option("--max-tokens", options->max_tokens, "Of an answer of --exact")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app->add_flag("--exact-match", options->exact_match,
                "An answer must equal the expected text; default: contain it");
  app->add_flag("--raw", options->raw,
                "Prompts of --multiple-choice and --exact without the chat template");
  app->add_option("--concurrency", options->concurrency, "Requests at a time")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app->add_option("--retry-seconds", options->retry_seconds,
                  "How long a request is repeated while the server is busy or away")
      ->check(CLI::Range(0, 86400))
      ->capture_default_str();
  app->add_option("--request-timeout", options->request_timeout_seconds,
                  "Seconds without a byte after which an answer is given up")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
  app->add_option("--json", options->json_path, "Write the report there")->check(is_given);
  app->add_option("--server-log", options->server_log,
                  "Log of the server that --model starts; default: shown if it fails")
      ->check(is_given);
}

}  // namespace

const char* NameOf(TaskKind kind) {
  switch (kind) {
    case TaskKind::kPerplexity:
      return "perplexity";
    case TaskKind::kChatLoss:
      return "chat loss";
    case TaskKind::kMultipleChoice:
      return "multiple choice";
    case TaskKind::kExact:
      return "exact answers";
  }
  return "";
}

bool Options::NeedsTokenizer() const {
  return std::any_of(tasks.begin(), tasks.end(),
                     [](const TaskOptions& task) { return task.kind != TaskKind::kExact; });
}

CommandLine ParseCommandLine(int argc, const char* const* argv,
                             const std::function<const char*(const char*)>& get_env) {
  CommandLine command;
  Options& options = command.options;
  const auto* const end = std::find_if(
      argv, argv + argc, [](const char* word) { return std::strcmp(word, "--") == 0; });
  if (end != argv + argc) options.server_flags.assign(end + 1, argv + argc);

  CLI::App app(
      "Measures the quality of a model: perplexity, loss of answers, multiple choice, "
      "exact answers",
      "wintserve eval");
  Declare(&app, &options);
  try {
    app.parse(static_cast<int>(end - argv), argv);
  } catch (const CLI::CallForHelp&) {
    command.print = app.help();
    return command;
  } catch (const CLI::ParseError& error) {
    command.error = error.what();
    command.exit_code = kExitUsage;
    return command;
  }
  TakeTasks(app, &options);
  if (options.tokenizer.empty()) options.tokenizer = options.model;
  if (const char* keys = get_env("FD_API_KEY"); keys != nullptr && options.api_key.empty()) {
    const std::vector<std::string> split = absl::StrSplit(keys, ',', absl::SkipEmpty());
    if (!split.empty()) options.api_key = split.front();
  }
  command.error = CheckTogether(options);
  if (!command.error.empty()) command.exit_code = kExitUsage;
  return command;
}

}  // namespace wintserve::eval
