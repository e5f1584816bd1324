#include "common/config/command_line.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/config/flag.h"
#include "common/config/queue_flags.h"
#include "common/config/yaml_file.h"
#include "common/exit_code.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr char kUsage[] =
    "wintserve serves ERNIE-4.5 MoE models whose experts are compressed to 2 bits.\n"
    "\n"
    "  wintserve serve [--flag value ...]           OpenAI-compatible HTTP server\n"
    "  wintserve generate --prompt TEXT [...]       answer one prompt on stdout, without a server\n"
    "  wintserve quantize --model DIR --output DIR  a checkpoint in WINT2, WINT4 or WINT8 from one "
    "in "
    "bfloat16\n"
    "  wintserve inspect DIR [...]                  what a checkpoint is, and whether it is whole\n"
    "  wintserve eval --model DIR [...]             how good a model is: perplexity, choices, "
    "answers\n"
    "  wintserve --version\n"
    "\n"
    "`wintserve VERB --help` lists the flags of a verb.\n";
constexpr char kServeHelp[] =
    "Serves a model over an OpenAI-compatible HTTP API.\n"
    "Flags take --name value or --name=value, with dashes or underscores; switches also --no-name.";
constexpr char kGenerateHelp[] =
    "Answers one prompt on stdout, with the processes of `serve` but no HTTP.\n"
    "--prompt is one user message in the model's chat template; --raw continues it as plain text.\n"
    "Logs go to stderr, at level warning unless --log-level says otherwise.";

// Verbs that are programs of their own, whose flags are not ours.
struct ProgramVerb {
  const char* name;
  const char* program;
};
constexpr ProgramVerb kProgramVerbs[] = {
    {"quantize", "wintserve-quantize"},
    {"inspect", "wintserve-inspect"},
    {"eval", "wintserve-eval"},
};

// ---- Names.

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = std::exchange(row[0], static_cast<int>(i));
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

// " (did you mean X?)", or nothing when no name is near.
std::string Suggestion(const std::string& wrong, const std::vector<std::string>& names,
                       std::string_view prefix) {
  const std::string* nearest = nullptr;
  int best = std::max<int>(2, static_cast<int>(wrong.size()) / 3) + 1;
  for (const std::string& name : names) {
    const int distance = EditDistance(wrong, name);
    if (distance < best) {
      best = distance;
      nearest = &name;
    }
  }
  return nearest == nullptr ? "" : fmt::format(" (did you mean {}{}?)", prefix, *nearest);
}

std::string WithDashes(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

bool Accepts(const Flag& flag, Verb verb) {
  return verb == Verb::kServe ? !flag.generate_only : !flag.serve_only;
}

const Flag* FindFlag(const std::string& name, Verb verb) {
  for (const Flag& flag : FlagTable()) {
    if (flag.name == name && Accepts(flag, verb)) return &flag;
  }
  return nullptr;
}

// Flags and their "no-" forms, as the command line may spell them.
std::vector<std::string> Spellings(Verb verb) {
  std::vector<std::string> names = {"config", "help"};
  for (const Flag& flag : FlagTable()) {
    if (!Accepts(flag, verb)) continue;
    names.push_back(flag.name);
    if (flag.type == FlagType::kSwitch) names.push_back("no-" + flag.name);
  }
  return names;
}

absl::StatusOr<std::string> ResolveName(const std::string& written,
                                        const std::vector<std::string>& names, Verb verb) {
  const std::string name = WithDashes(written);
  if (std::find(names.begin(), names.end(), name) != names.end()) return name;
  std::vector<std::string> matches;
  for (const std::string& candidate : names) {
    if (candidate.starts_with(name)) matches.push_back("--" + candidate);
  }
  if (!matches.empty()) {
    // Of names that continue one of them, that one: --max-num-s is --max-num-seqs.
    const std::string shortest = *std::min_element(
        matches.begin(), matches.end(),
        [](const std::string& a, const std::string& b) { return a.size() < b.size(); });
    const bool is_meant =
        std::all_of(matches.begin(), matches.end(),
                    [&](const std::string& match) { return match.starts_with(shortest); });
    if (is_meant) return shortest.substr(2);
    return absl::InvalidArgumentError(
        fmt::format("--{}: could be {}", ForErrorLine(written), absl::StrJoin(matches, ", ")));
  }
  const Verb other = verb == Verb::kServe ? Verb::kGenerate : Verb::kServe;
  if (FindFlag(name, other) != nullptr) {
    return absl::InvalidArgumentError(fmt::format("--{}: is a flag of `wintserve {}`",
                                                  ForErrorLine(written),
                                                  other == Verb::kServe ? "serve" : "generate"));
  }
  return absl::InvalidArgumentError(
      fmt::format("--{}: unknown flag{}", ForErrorLine(written), Suggestion(name, names, "--")));
}

// Rewrites every argument as "--name" and its value, so that CLI11 sees canonical names only: it
// knows neither prefixes nor -tp.
absl::StatusOr<std::vector<std::string>> Canonical(std::vector<std::string> args, Verb verb) {
  const std::vector<std::string> names = Spellings(verb);
  std::vector<std::string> canonical;
  for (size_t i = 0; i < args.size(); ++i) {
    std::string argument = args[i];
    if (argument == "-h") argument = "--help";
    if (argument == "-tp" || argument.starts_with("-tp=")) {
      argument = "--tensor-parallel-size" + argument.substr(3);
    }
    if (argument.size() < 3 || !argument.starts_with("--")) {
      return absl::InvalidArgumentError(
          fmt::format("unexpected argument {}; flags begin with --", ForErrorLine(argument)));
    }
    const size_t equals = argument.find('=');
    ASSIGN_OR_RETURN(std::string name, ResolveName(argument.substr(2, equals - 2), names, verb));
    std::optional<std::string> value;
    if (equals != std::string::npos) value = argument.substr(equals + 1);

    const Flag* flag = FindFlag(name, verb);
    const bool negated = flag == nullptr && name.starts_with("no-");
    if (name == "help" || negated) {
      if (value.has_value()) {
        return absl::InvalidArgumentError(fmt::format("--{}: takes no value", name));
      }
      if (name == "help") {
        canonical.push_back("--help");
        continue;
      }
      name = name.substr(3);
      value = "false";
    } else if (flag != nullptr && flag->type == FlagType::kSwitch) {
      value = value.value_or("true");
    } else if (!value.has_value()) {
      if (i + 1 == args.size() || args[i + 1].starts_with("--")) {
        return absl::InvalidArgumentError(
            fmt::format("--{}: needs a value{}", name,
                        i + 1 == args.size()
                            ? ""
                            : fmt::format("; write --{}=VALUE for one that begins with --", name)));
      }
      value = args[++i];
    }
    canonical.push_back("--" + name);
    canonical.push_back(*std::move(value));
  }
  return canonical;
}

// ---- Values and where they came from.

struct Source {
  std::vector<std::string> values;
  std::string place;  // "--port", "config.yaml:3: port", "FD_API_KEY"
  int exit_code = kExitUsage;
};
using Sources = std::map<std::string, Source>;  // by canonical name

class Failure {
 public:
  Failure(int exit_code, std::string message)
      : exit_code_(exit_code), message_(std::move(message)) {}
  CommandLine ToCommandLine() const {
    CommandLine command;
    command.error = "error: " + message_;
    command.exit_code = exit_code_;
    return command;
  }

 private:
  int exit_code_;
  std::string message_;
};

std::optional<Failure> AddFile(const std::string& path, Verb verb, Sources* sources) {
  const auto entries = ReadYamlFile(path);
  if (!entries.ok()) {
    return Failure(kExitConfigFile, std::string(entries.status().message()));
  }
  std::map<std::string, int> lines;
  for (const YamlEntry& entry : *entries) {
    const std::string name = WithDashes(entry.key);
    const std::string place = fmt::format("{}:{}: {}", path, entry.line, ForErrorLine(entry.key));
    const Flag* flag = FindFlag(name, verb);
    if (flag == nullptr) {
      // One file may serve both verbs.
      const bool of_serve = verb == Verb::kGenerate && FindFlag(name, Verb::kServe) != nullptr;
      if (of_serve) continue;
      std::vector<std::string> names;
      for (const Flag& known : FlagTable()) {
        if (Accepts(known, verb)) names.push_back(known.name);
      }
      return Failure(kExitConfigFile,
                     fmt::format("{}: unknown key{}", place, Suggestion(name, names, "")));
    }
    if (const auto [seen, is_new] = lines.emplace(name, entry.line); !is_new) {
      return Failure(kExitConfigFile,
                     fmt::format("{}: given twice, first on line {}", place, seen->second));
    }
    std::vector<std::string> values = entry.values;
    if (values.empty()) continue;
    if (values.size() > 1 && !flag->accumulates) {
      if (flag->type != FlagType::kText || !flag->choices.empty()) {
        return Failure(kExitConfigFile, fmt::format("{}: must be one value, not a list", place));
      }
      values = {absl::StrJoin(values, ",")};
    }
    sources->emplace(name, Source{std::move(values), place, kExitConfigFile});
  }
  return std::nullopt;
}

// ---- Rules over several flags.

struct Port {
  const char* name;
  int port;
};

// The first rule that the options break; the name is the flag's that is at fault.
struct BrokenRule {
  std::string flag;
  std::string reason;
};

std::optional<BrokenRule> CheckPorts(const ServeOptions& options) {
  const Port ports[] = {{"port", options.port},
                        {"metrics-port", options.metrics_port.value_or(0)},
                        {"engine-worker-queue-port", options.engine_worker_queue_port},
                        {"cache-queue-port", options.cache_queue_port}};
  for (const Port& second : ports) {
    for (const Port* first = ports; first != &second; ++first) {
      // Two zeros are two free ports.
      if (second.port != 0 && second.port == first->port) {
        return BrokenRule{second.name,
                          fmt::format("must differ from --{} (both {})", first->name, first->port)};
      }
    }
  }
  return std::nullopt;
}

std::optional<BrokenRule> CheckLimits(const ServeOptions& options) {
  if (options.max_num_batched_tokens < options.max_num_seqs) {
    return BrokenRule{"max-num-batched-tokens",
                      fmt::format("must be at least --max-num-seqs, {} (got {})",
                                  options.max_num_seqs, options.max_num_batched_tokens)};
  }
  if (options.max_long_partial_prefills > options.max_num_partial_prefills) {
    return BrokenRule{
        "max-long-partial-prefills",
        fmt::format("must be at most --max-num-partial-prefills, {} (got {})",
                    options.max_num_partial_prefills, options.max_long_partial_prefills)};
  }
  if (options.long_prefill_token_threshold >= options.max_model_len) {
    return BrokenRule{"long-prefill-token-threshold",
                      fmt::format("must be below --max-model-len, {} (got {})",
                                  options.max_model_len, options.long_prefill_token_threshold)};
  }
  return std::nullopt;
}

// What is said of prompts in pieces must not pass unheard where there are none. The values that
// other servers have by default ask for nothing.
std::optional<BrokenRule> CheckChunking(const ServeOptions& options, const Sources& sources) {
  if (options.enable_chunked_prefill) return std::nullopt;
  struct Setting {
    const char* flag;
    int value;
    int neutral;
  };
  const Setting settings[] = {
      {"max-num-partial-prefills", options.max_num_partial_prefills, 1},
      {"max-long-partial-prefills", options.max_long_partial_prefills, 1},
      {"long-prefill-token-threshold", options.long_prefill_token_threshold, 0},
  };
  for (const Setting& setting : settings) {
    if (!sources.contains(setting.flag) || setting.value == setting.neutral) continue;
    return BrokenRule{setting.flag,
                      fmt::format("has nothing to work on with --no-enable-chunked-prefill; must "
                                  "be {} or not given (got {})",
                                  setting.neutral, setting.value)};
  }
  return std::nullopt;
}

std::optional<BrokenRule> CheckDevice(const ServeOptions& options) {
  if (options.dummy_router_skew > 0 && options.load_format != "dummy") {
    return BrokenRule{"dummy-router-skew", fmt::format("needs --load-format dummy (got {:g})",
                                                       options.dummy_router_skew)};
  }
  if (options.device == "cpu" && options.kv_cache_dtype != "auto") {
    return BrokenRule{"kv-cache-dtype",
                      fmt::format("must be auto, which is float32, on --device cpu (got {})",
                                  options.kv_cache_dtype)};
  }
  return std::nullopt;
}

std::optional<BrokenRule> CheckRole(const ServeOptions& options) {
  const bool shares = !options.runtime_dir.empty();
  if (options.role == "all" && shares) {
    return BrokenRule{"runtime-dir",
                      "is what --role api and --role engine share; one launcher "
                      "alone makes its own"};
  }
  if (options.role != "all" && !shares) {
    return BrokenRule{
        "role", fmt::format("{} needs --runtime-dir, the directory that it shares with --role "
                            "{}",
                            options.role, options.role == "api" ? "engine" : "api")};
  }
  return std::nullopt;
}

std::optional<BrokenRule> CheckCaching(const ServeOptions& options) {
  if (options.enable_prefix_caching) {
    if (options.cache_isolation == "key" && options.api_keys.empty()) {
      return BrokenRule{"cache-isolation", "key needs at least one --api-key"};
    }
    return std::nullopt;
  }
  constexpr char kNeedsCaching[] = "has nothing to work on with --no-enable-prefix-caching";
  if (options.swap_space_gib > 0) return BrokenRule{"swap-space", kNeedsCaching};
  if (options.cache_isolation != "none") return BrokenRule{"cache-isolation", kNeedsCaching};
  return std::nullopt;
}

void FillGpuDefaults(const Draft& draft) {
  ServeOptions& options = draft.command->options;
  if (!draft.given.contains("max-num-seqs")) options.max_num_seqs = kGpuMaxNumSeqs;
  if (!draft.given.contains("max-num-batched-tokens")) {
    options.max_num_batched_tokens = kGpuMaxNumBatchedTokens;
  }
  if (!draft.given.contains("use-cudagraph")) options.use_cudagraph = true;
}

void FillDefaults(const Draft& draft) {
  ServeOptions& options = draft.command->options;
  if (options.device == "cuda") FillGpuDefaults(draft);
  if (!draft.given.contains("max-num-batched-tokens")) {
    options.max_num_batched_tokens = std::max(options.max_num_batched_tokens, options.max_num_seqs);
  }
  if (options.port != 0 && options.metrics_port == options.port) options.metrics_port.reset();
}

std::optional<BrokenRule> CheckQueues(const ServeOptions& options) {
  const std::optional<QueueFlagError> error = CheckQueueFlags(options);
  if (!error.has_value()) return std::nullopt;
  return BrokenRule{error->flag, error->reason};
}

std::optional<Failure> CheckTogether(const ServeOptions& options, const Sources& sources) {
  std::optional<BrokenRule> broken = CheckPorts(options);
  if (!broken.has_value()) broken = CheckQueues(options);
  if (!broken.has_value()) broken = CheckLimits(options);
  if (!broken.has_value()) broken = CheckChunking(options, sources);
  if (!broken.has_value()) broken = CheckDevice(options);
  if (!broken.has_value()) broken = CheckRole(options);
  if (!broken.has_value()) broken = CheckCaching(options);
  if (!broken.has_value()) return std::nullopt;
  const auto source = sources.find(broken->flag);
  return source == sources.end()
             ? Failure(kExitUsage, fmt::format("--{}: {}", broken->flag, broken->reason))
             : Failure(source->second.exit_code,
                       fmt::format("{}: {}", source->second.place, broken->reason));
}

void AddNotes(Draft* draft) {
  ServeOptions& options = draft->command->options;
  if (options.use_cudagraph && options.device == "cpu") {
    draft->Note("use-cudagraph", "there are no CUDA graphs on --device cpu; ignored");
    options.use_cudagraph = false;
  }
  if (draft->given.contains("gpu-memory-utilization") && options.device == "cpu") {
    draft->Note("gpu-memory-utilization", "there is no GPU on --device cpu; ignored");
  }
  for (std::string& warning : QueueFlagWarnings(options)) {
    draft->command->notes.push_back(std::move(warning));
  }
}

// ---- CLI11.

std::string TypeName(const Flag& flag) {
  switch (flag.type) {
    case FlagType::kSwitch:
      return "";
    case FlagType::kInteger:
      return "N";
    case FlagType::kNumber:
      return "X";
    case FlagType::kJson:
      return "JSON";
    case FlagType::kText:
      return "TEXT";
  }
  return "";
}

std::unique_ptr<CLI::App> MakeApp(Verb verb) {
  const bool serve = verb == Verb::kServe;
  auto app = std::make_unique<CLI::App>(serve ? kServeHelp : kGenerateHelp,
                                        serve ? "wintserve serve" : "wintserve generate");
  app->get_formatter()->column_width(46);
  app->set_help_flag("--help", "Print this help")->group("Operation");
  auto add = [&](const std::string& name, const std::string& help) {
    return app->add_option("--" + name, help)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->allow_extra_args(false);
  };
  add("config", "YAML file with the same names; flags win")->group("Operation")->type_name("FILE");
  for (const Flag& flag : FlagTable()) {
    if (!Accepts(flag, verb)) continue;
    CLI::Option* option = add(flag.name, flag.help);
    option->group(flag.group)->type_name(TypeName(flag))->default_str(flag.default_text);
  }
  return app;
}

CommandLine Print(std::string text) {
  CommandLine command;
  command.print = std::move(text);
  return command;
}

CommandLine BecomeProgram(const ProgramVerb& verb, const std::vector<std::string>& args) {
  CommandLine command;
  command.program = verb.program;
  command.program_args = {std::string("wintserve ") + verb.name};
  command.program_args.insert(command.program_args.end(), args.begin(), args.end());
  return command;
}

CommandLine ParseVerb(Verb verb, const std::vector<std::string>& args,
                      const std::function<const char*(const char*)>& get_env) {
  auto canonical = Canonical(args, verb);
  if (!canonical.ok()) {
    return Failure(kExitUsage, std::string(canonical.status().message())).ToCommandLine();
  }
  const std::unique_ptr<CLI::App> app = MakeApp(verb);
  try {
    std::reverse(canonical->begin(), canonical->end());  // as CLI11 takes a vector
    app->parse(*std::move(canonical));
  } catch (const CLI::CallForHelp&) {
    return Print(app->help());
  } catch (const CLI::ParseError& error) {
    return Failure(kExitUsage, error.what()).ToCommandLine();
  }

  Sources sources;
  for (const Flag& flag : FlagTable()) {
    if (!Accepts(flag, verb)) continue;
    std::vector<std::string> values = app->get_option("--" + flag.name)->results();
    if (values.empty()) continue;
    if (!flag.accumulates) values.erase(values.begin(), values.end() - 1);
    sources.emplace(flag.name, Source{std::move(values), "--" + flag.name, kExitUsage});
  }
  if (const auto& files = app->get_option("--config")->results(); !files.empty()) {
    if (const auto failure = AddFile(files.back(), verb, &sources)) {
      return failure->ToCommandLine();
    }
  }
  if (const char* keys = get_env("FD_API_KEY"); keys != nullptr && verb == Verb::kServe) {
    sources.emplace("api-key", Source{absl::StrSplit(keys, ',', absl::SkipEmpty()), "FD_API_KEY"});
  }
  const char* log_dir = get_env("FD_LOG_DIR");
  if (log_dir != nullptr && *log_dir != '\0') {
    sources.emplace("log-dir", Source{{log_dir}, "FD_LOG_DIR"});
  }

  CommandLine command;
  command.verb = verb;
  if (verb == Verb::kGenerate) {
    command.options.log_level = "warning";
    command.options.drain_timeout_ms = 0;  // Ctrl-C means now
  }
  Draft draft{&command, {}};
  for (const Flag& flag : FlagTable()) {  // the table's order, not the user's
    const auto source = sources.find(flag.name);
    // Another verb's flag may have the same name.
    if (source == sources.end() || !Accepts(flag, verb)) continue;
    draft.given.insert(flag.name);
    for (const std::string& text : source->second.values) {
      const auto value = ParseFlagValue(flag, text);
      const absl::Status status = value.ok() ? flag.apply(*value, draft) : value.status();
      if (!status.ok()) {
        return Failure(source->second.exit_code,
                       fmt::format("{}: {}", source->second.place, std::string(status.message())))
            .ToCommandLine();
      }
    }
  }
  FillDefaults(draft);
  if (const auto failure = CheckTogether(command.options, sources)) return failure->ToCommandLine();
  if (verb == Verb::kGenerate && command.generate.prompt.empty()) {
    return Failure(kExitUsage, "--prompt: needs a text").ToCommandLine();
  }
  AddNotes(&draft);
  return command;
}

}  // namespace

std::string GenerateOptions::ToJson() const {
  auto or_null = [](const auto& value) {
    return value.has_value() ? nlohmann::json(*value) : nlohmann::json(nullptr);
  };
  return nlohmann::json{
      {"prompt", prompt},        {"chat", !raw},   {"temperature", or_null(temperature)},
      {"top_p", or_null(top_p)}, {"top_k", top_k}, {"max_tokens", or_null(max_tokens)},
      {"seed", or_null(seed)},   {"stop", stop},   {"print_ids", print_ids}}
      .dump();
}

CommandLine ParseCommandLine(const std::vector<std::string>& args,
                             const std::function<const char*(const char*)>& get_env) {
  if (args.empty()) {
    CommandLine command = Print(kUsage);
    command.exit_code = kExitUsage;
    return command;
  }
  const std::vector<std::string> rest(args.begin() + 1, args.end());
  if (args[0] == "serve") return ParseVerb(Verb::kServe, rest, get_env);
  if (args[0] == "generate") return ParseVerb(Verb::kGenerate, rest, get_env);
  std::vector<std::string> verbs = {"serve", "generate"};
  for (const ProgramVerb& verb : kProgramVerbs) {
    if (args[0] == verb.name) return BecomeProgram(verb, rest);
    verbs.emplace_back(verb.name);
  }
  if (args[0] == "--version") return Print("wintserve " WINTSERVE_VERSION "\n");
  if (args[0] == "--help" || args[0] == "-h" || args[0] == "help") return Print(kUsage);
  if (args[0].starts_with("-")) {
    return Failure(kExitUsage, fmt::format("{}: a verb comes first: wintserve serve {} ...",
                                           ForErrorLine(args[0]), ForErrorLine(args[0])))
        .ToCommandLine();
  }
  const std::string suggestion = Suggestion(args[0], verbs, "");
  return Failure(kExitUsage,
                 fmt::format("{}: unknown verb{}", ForErrorLine(args[0]),
                             suggestion.empty()
                                 ? fmt::format("; there are {}", absl::StrJoin(verbs, ", "))
                                 : suggestion))
      .ToCommandLine();
}

}  // namespace wintserve
