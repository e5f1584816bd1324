// The command line of `wintserve`: flags, the YAML file of --config, FD_API_KEY. Flags win over the
// file, the file over the environment. Names are FastDeploy's, with dashes or underscores; a prefix
// that fits one flag only is enough; of repeats the last counts, but --api-key and --stop add up.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/config/serve_options.h"

namespace wintserve {

enum class Verb { kServe, kGenerate };

// The request of `wintserve generate`.
struct GenerateOptions {
  std::string prompt;
  bool raw = false;                   // the prompt as it is, not as a user message
  std::optional<double> temperature;  // unset: the model's default
  std::optional<double> top_p;
  int64_t top_k = 0;                  // 0: off
  std::optional<int64_t> max_tokens;  // unset: what the model length leaves
  std::optional<int64_t> seed;        // unset: a random one
  std::vector<std::string> stop;
  bool print_ids = false;

  std::string ToJson() const;  // Instance::generate_json
};

struct CommandLine {
  // Exactly one of these four holds.
  std::string error;         // one line for stderr; exit with exit_code
  std::string print;         // help or version for stdout; exit with exit_code
  std::optional<Verb> verb;  // run it
  std::string program;       // of the launcher's own directory: becomes it, with program_args

  int exit_code = 0;
  ServeOptions options;      // effective: checked, defaults filled in
  GenerateOptions generate;  // verb kGenerate
  // argv of `program`, which reads it itself: "wintserve quantize", then what stood behind the
  // verb.
  std::vector<std::string> program_args;
  std::vector<std::string> notes;  // one warning a line: what was accepted and has no effect
};

// args: without the program's name. get_env: null pointer when unset, as std::getenv. Reads the
// file of --config and nothing else; never exits or prints.
CommandLine ParseCommandLine(const std::vector<std::string>& args,
                             const std::function<const char*(const char*)>& get_env);

}  // namespace wintserve
