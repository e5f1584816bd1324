// One setting: its spelling, type, bounds, default, help, and what it does to the options. The
// table of all of them serves the command line, the YAML file and the help text
// alike.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/config/command_line.h"

namespace wintserve {

enum class FlagType {
  kSwitch,  // --name, --no-name, --name=true
  kInteger,
  kNumber,
  kText,
  kJson,  // an object
};

// A value that passed the flag's type, bounds and choices.
struct FlagValue {
  std::string text;
  bool on = false;      // kSwitch
  int64_t integer = 0;  // kInteger
  double number = 0;    // kInteger, kNumber
};

// What a whole command line and file build up.
struct Draft {
  CommandLine* command;
  std::set<std::string> given;  // names of the flags that have a value, wherever it came from

  void Note(std::string_view name, std::string_view text);
};

struct Flag {
  std::string name;  // with dashes, without the leading two
  const char* group = "";
  FlagType type = FlagType::kText;
  std::string default_text;  // as the help shows it; empty: none
  std::string help;
  double min = 0;  // kInteger, kNumber; both inclusive
  double max = 0;
  std::vector<std::string> choices;  // kText; empty: any
  bool accumulates = false;          // a repeat adds a value instead of replacing it
  bool serve_only = false;
  bool generate_only = false;
  // Error: a reason without the flag's name, such as "must be 64 (got 32)".
  std::function<absl::Status(const FlagValue&, Draft&)> apply;
};

// Every flag of `serve` and `generate` but --config, --help and --version; built once.
const std::vector<Flag>& FlagTable();

// INVALID_ARGUMENT: "must be 1..65535 (got 99999)", without the flag's name.
absl::StatusOr<FlagValue> ParseFlagValue(const Flag& flag, const std::string& text);

// `text` on one line and not longer than an error line should be.
std::string ForErrorLine(std::string_view text);

}  // namespace wintserve
