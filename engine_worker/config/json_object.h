// Typed, checked access to one object of a JSON file: every error is one line that names the file,
// the key, the value found and what is allowed.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

// The object that `text` is, or an error that lacks the name of the file: "not valid JSON: parse
// error at line 3, column 5: ...", on one line.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text);

// `value` as JSON on one line of printable ASCII, cut if long.
std::string ShowJson(const nlohmann::json& value);

// Views `object`, which must outlive it. `path` is the object's place in the file: "" for the root,
// "quantization_config." below it.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& object, std::string file, std::string path)
      : object_(&object), file_(std::move(file)), path_(std::move(path)) {}

  bool empty() const { return object_->empty(); }
  // False also for an explicit null.
  bool Has(std::string_view key) const { return Find(key) != nullptr; }

  // A whole number in min … max.
  absl::StatusOr<int> Int(std::string_view key, int min, int max) const;
  absl::StatusOr<int> IntOr(std::string_view key, int min, int max, int fallback) const;
  // A whole number, or a list of at least one.
  absl::StatusOr<std::vector<int>> IntOrList(std::string_view key, int min, int max) const;
  // A number above zero that a float32 holds.
  absl::StatusOr<float> PositiveFloat(std::string_view key) const;
  absl::StatusOr<float> PositiveFloatOr(std::string_view key, float fallback) const;
  absl::StatusOr<bool> BoolOr(std::string_view key, bool fallback) const;
  // One of `allowed`.
  absl::StatusOr<std::string> ChoiceOr(std::string_view key,
                                       const std::vector<std::string>& allowed,
                                       const std::string& fallback) const;
  // An object; an empty one if the key is absent.
  absl::StatusOr<JsonObject> ObjectOrEmpty(std::string_view key) const;
  // The first string of a list.
  absl::StatusOr<std::string> FirstString(std::string_view key) const;

  // INVALID_ARGUMENT "file: key is value; allowed: …".
  absl::Status Refuse(std::string_view key, std::string_view allowed) const;

 private:
  const nlohmann::json* Find(std::string_view key) const;
  absl::StatusOr<int> ToInt(std::string_view key, const nlohmann::json& value, int min,
                            int max) const;

  const nlohmann::json* object_;
  std::string file_;
  std::string path_;
};

}  // namespace wintserve
