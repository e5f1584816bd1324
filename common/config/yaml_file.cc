#include "common/config/yaml_file.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <yaml-cpp/yaml.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr int64_t kMaxFileBytes = 1 << 20;
// Of all settings together, and how deep a mapping may be: through aliases a small file can stand
// for any number of values, and a mapping can hold itself.
constexpr int kMaxValues = 100'000;
constexpr int kMaxDepth = 64;

// A plain scalar keeps YAML's meaning (true, 1, 0.5); a quoted one is text. Null once there are
// more than *num_values_left or it is nested deeper than depth_left.
nlohmann::json ToJson(const YAML::Node& node, int depth_left, int* num_values_left) {
  if (depth_left == 0) *num_values_left = 0;
  if (*num_values_left == 0) return nullptr;
  --*num_values_left;
  switch (node.Type()) {
    case YAML::NodeType::Map: {
      nlohmann::json object = nlohmann::json::object();
      for (const auto& entry : node) {
        object[entry.first.Scalar()] = ToJson(entry.second, depth_left - 1, num_values_left);
      }
      return object;
    }
    case YAML::NodeType::Sequence: {
      nlohmann::json array = nlohmann::json::array();
      for (const YAML::Node& element : node) {
        array.push_back(ToJson(element, depth_left - 1, num_values_left));
      }
      return array;
    }
    case YAML::NodeType::Scalar: {
      const std::string& text = node.Scalar();
      const bool quoted = node.Tag() == "!";
      if (bool value; !quoted && YAML::convert<bool>::decode(node, value)) return value;
      if (int64_t value; !quoted && absl::SimpleAtoi(text, &value)) return value;
      if (double value; !quoted && absl::SimpleAtod(text, &value)) return value;
      return text;
    }
    default:
      return nullptr;
  }
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0) {
    return absl::NotFoundError(fmt::format("{}: {}", path, std::strerror(errno)));
  }
  if (S_ISDIR(info.st_mode)) return absl::InvalidArgumentError(path + ": is a directory");
  std::ifstream file(path, std::ios::binary);
  // A pipe has no size, so the limit is on what is read.
  std::string text(kMaxFileBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.eof() && !file.good()) return absl::NotFoundError(path + ": cannot be read");
  text.resize(file.gcount());
  if (static_cast<int64_t>(text.size()) > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        fmt::format("{}: is longer than {} bytes", path, kMaxFileBytes));
  }
  return text;
}

absl::StatusOr<YamlEntry> ToEntry(const std::string& path, const YAML::Node& key,
                                  const YAML::Node& value, int* num_values_left) {
  YamlEntry entry;
  entry.line = key.Mark().line + 1;
  if (!key.IsScalar()) {
    return absl::InvalidArgumentError(
        fmt::format("{}:{}: a key must be the name of a setting", path, entry.line));
  }
  entry.key = key.Scalar();
  if (value.IsScalar()) {
    entry.values.push_back(value.Scalar());
  } else if (value.IsMap()) {
    entry.values.push_back(ToJson(value, kMaxDepth, num_values_left).dump());
  } else if (value.IsSequence()) {
    for (const YAML::Node& element : value) {
      if (!element.IsScalar()) {
        return absl::InvalidArgumentError(fmt::format(
            "{}:{}: {}: a list may hold plain values only", path, entry.line, entry.key));
      }
      if (*num_values_left > 0) --*num_values_left;
      if (*num_values_left == 0) break;
      entry.values.push_back(element.Scalar());
    }
  }
  if (*num_values_left == 0) {
    return absl::InvalidArgumentError(
        fmt::format("{}:{}: {}: more than {} values in the file, or nested deeper than {} levels; "
                    "does an alias stand for what it is in?",
                    path, entry.line, entry.key, kMaxValues, kMaxDepth));
  }
  return entry;
}

}  // namespace

absl::StatusOr<std::vector<YamlEntry>> ReadYamlFile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  std::vector<YamlEntry> entries;
  try {
    const YAML::Node root = YAML::Load(text);
    if (root.IsNull()) return entries;
    if (!root.IsMap()) {
      return absl::InvalidArgumentError(
          fmt::format("{}:1: must be a mapping, one `name: value` a line", path));
    }
    int num_values_left = kMaxValues;
    for (const auto& item : root) {
      ASSIGN_OR_RETURN(YamlEntry entry, ToEntry(path, item.first, item.second, &num_values_left));
      entries.push_back(std::move(entry));
    }
  } catch (const YAML::Exception& error) {
    // The text can quote a character of the file, such as the end of a line.
    return absl::InvalidArgumentError(
        fmt::format("{}:{}: {}", path, error.mark.line + 1, absl::Utf8SafeCEscape(error.msg)));
  } catch (const nlohmann::json::exception&) {
    return absl::InvalidArgumentError(fmt::format("{}: is not UTF-8", path));
  }
  return entries;
}

}  // namespace wintserve
