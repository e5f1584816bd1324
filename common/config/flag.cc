#include "common/config/flag.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"

namespace wintserve {
namespace {

constexpr size_t kMaxShownBytes = 120;

bool IsUtf8(const std::string& text) {
  try {
    nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

absl::Status OutOfBounds(const Flag& flag, std::string_view kind, const std::string& text) {
  // Any bound beyond 32 bits is "no bound" to a person.
  constexpr double kUnbounded = std::numeric_limits<int32_t>::max();
  std::string allowed;
  const bool has_min = flag.min > -kUnbounded;
  const bool has_max = flag.max < kUnbounded;
  if (has_min && has_max) {
    allowed = fmt::format("{}..{}", flag.min, flag.max);
  } else if (has_min) {
    allowed = fmt::format("at least {}", flag.min);
  } else if (has_max) {
    allowed = fmt::format("at most {}", flag.max);
  }
  return absl::InvalidArgumentError(fmt::format("must be {}{}{} (got {})", kind,
                                                kind.empty() || allowed.empty() ? "" : ", ",
                                                allowed, ForErrorLine(text)));
}

absl::Status ParseSwitch(const std::string& text, FlagValue* value) {
  const std::string lower = absl::AsciiStrToLower(text);
  static const auto* const kOn = new std::set<std::string>{"true", "yes", "on", "1"};
  static const auto* const kOff = new std::set<std::string>{"false", "no", "off", "0"};
  value->on = kOn->contains(lower);
  if (value->on || kOff->contains(lower)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("must be true or false (got {})", ForErrorLine(text)));
}

absl::Status ParseNumber(const Flag& flag, FlagValue* value) {
  if (flag.type == FlagType::kInteger) {
    if (!absl::SimpleAtoi(value->text, &value->integer)) {
      return OutOfBounds(flag, "an integer", value->text);
    }
    value->number = static_cast<double>(value->integer);
  } else if (!absl::SimpleAtod(value->text, &value->number)) {
    return OutOfBounds(flag, "a number", value->text);
  }
  // Written so that not-a-number is outside.
  if (!(value->number >= flag.min && value->number <= flag.max)) {
    return OutOfBounds(flag, "", value->text);
  }
  return absl::OkStatus();
}

}  // namespace

std::string ForErrorLine(std::string_view text) {
  if (text.empty()) return "nothing";
  std::string shown(text.substr(0, kMaxShownBytes));
  if (shown.size() < text.size()) {
    // Not through the middle of a character.
    while (!shown.empty() && (text[shown.size()] & 0xC0) == 0x80) shown.pop_back();
    shown += "...";
  }
  std::replace_if(
      shown.begin(), shown.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }, ' ');
  return shown;
}

void Draft::Note(std::string_view name, std::string_view text) {
  command->notes.push_back(fmt::format("--{}: {}", name, text));
}

absl::StatusOr<FlagValue> ParseFlagValue(const Flag& flag, const std::string& text) {
  FlagValue value;
  value.text = text;
  if (!IsUtf8(text)) return absl::InvalidArgumentError("must be UTF-8");
  if (text.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError("must not contain a zero byte");
  }
  absl::Status status;
  switch (flag.type) {
    case FlagType::kSwitch:
      status = ParseSwitch(text, &value);
      break;
    case FlagType::kInteger:
    case FlagType::kNumber:
      status = ParseNumber(flag, &value);
      break;
    case FlagType::kText:
      if (!flag.choices.empty() &&
          std::find(flag.choices.begin(), flag.choices.end(), text) == flag.choices.end()) {
        status = absl::InvalidArgumentError(
            fmt::format("must be {}{} (got {})", flag.choices.size() > 1 ? "one of " : "",
                        absl::StrJoin(flag.choices, ", "), ForErrorLine(text)));
      }
      break;
    case FlagType::kJson:
      if (!nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false).is_object()) {
        status = absl::InvalidArgumentError(
            fmt::format("must be a JSON object (got {})", ForErrorLine(text)));
      }
      break;
  }
  if (!status.ok()) return status;
  return value;
}

}  // namespace wintserve
