// The command line of `wintserve eval`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace wintserve::eval {

enum class TaskKind { kPerplexity, kChatLoss, kMultipleChoice, kExact };

// "perplexity", "chat loss", "multiple choice", "exact answers".
const char* NameOf(TaskKind kind);

struct TaskOptions {
  TaskKind kind = TaskKind::kPerplexity;
  std::string file;
  int64_t limit = 0;  // of lines, or of windows; 0: all
};

struct Options {
  std::vector<TaskOptions> tasks;  // in the order of the command line
  // Exactly one of these two is set.
  std::string model;   // directory of a checkpoint, which a server of our own serves
  std::string server;  // URL
  std::vector<std::string> server_flags;  // of our own server: what stands behind "--"
  std::string server_log;                 // file for its log; empty: shown only if it fails
  std::string tokenizer;                  // directory; `model` unless said otherwise
  std::string served_model_name;          // empty: the only one of the server
  std::string api_key;
  std::string json_path;  // the report; empty: none
  int context_tokens = 1024;
  int max_tokens = 160;  // of an exact answer
  bool exact_match = false;
  bool raw = false;  // prompts as they are, without the chat template
  int concurrency = 16;
  int retry_seconds = 60;
  int request_timeout_seconds = 600;

  // Whether a task needs token ids.
  bool NeedsTokenizer() const;
};

struct CommandLine {
  // Exactly one holds: an error for stderr, a text for stdout, or `options` to run.
  std::string error;
  std::string print;
  int exit_code = 0;
  Options options;
};

// Never prints or exits. argv as main's; get_env as ::getenv. Without --api-key the key is the
// first one of FD_API_KEY, which other users of the machine cannot read.
CommandLine ParseCommandLine(int argc, const char* const* argv,
                             const std::function<const char*(const char*)>& get_env);

}  // namespace wintserve::eval
