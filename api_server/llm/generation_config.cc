#include "api_server/llm/generation_config.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "common/json_depth.h"
#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxId = std::numeric_limits<int32_t>::max();

class Reader {
 public:
  Reader(std::string file, const Json& object) : file_(std::move(file)), object_(object) {}

  absl::Status ReadNumber(const char* key, double min, double max, float* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_number() || value->get<double>() < min || value->get<double>() > max) {
      return Bad(key, *value, fmt::format("a number from {} to {}", min, max));
    }
    *out = value->get<float>();
    return absl::OkStatus();
  }

  // Above 0.
  absl::Status ReadPositive(const char* key, float* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    const float number = value->is_number() ? value->get<float>() : 0.0f;
    if (!(number > 0) || !std::isfinite(number)) return Bad(key, *value, "a number above 0");
    *out = number;
    return absl::OkStatus();
  }

  // -1, "off" in some checkpoints, becomes 0.
  absl::Status ReadTopK(int32_t* out) const {
    const Json* value = Find("top_k");
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_number_integer() || value->get<int64_t>() < -1 ||
        value->get<int64_t>() > kMaxId) {
      return Bad("top_k", *value, "an integer, -1 or more");
    }
    *out = std::max(0, value->get<int32_t>());
    return absl::OkStatus();
  }

  absl::Status ReadBool(const char* key, bool* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean()) return Bad(key, *value, "true or false");
    *out = value->get<bool>();
    return absl::OkStatus();
  }

  // One id or a list of ids.
  absl::Status ReadIds(const char* key, std::vector<int32_t>* out) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    const Json list = value->is_array() ? *value : Json::array({*value});
    for (const Json& id : list) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kMaxId) {
        return Bad(key, *value, "a token id or a list of them");
      }
      out->push_back(id.get<int32_t>());
    }
    return absl::OkStatus();
  }

 private:
  const Json* Find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  absl::Status Bad(const char* key, const Json& value, const std::string& allowed) const {
    return absl::InvalidArgumentError(
        fmt::format("{}: {} is {}, must be {}", file_, key, value.dump(), allowed));
  }

  const std::string file_;
  const Json& object_;
};

}  // namespace

absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "generation_config.json";
  GenerationConfig config;
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return config;
  RETURN_IF_ERROR(text.status());
  if (IsNestedTooDeep(*text)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: is nested deeper than {} levels", path.string(), kMaxJsonDepth));
  }
  const Json object = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(fmt::format("{}: is no JSON object", path.string()));
  }
  const Reader reader(path.string(), object);
  bool do_sample = true;
  RETURN_IF_ERROR(reader.ReadBool("do_sample", &do_sample));
  RETURN_IF_ERROR(reader.ReadNumber("temperature", 0, 2, &config.defaults.temperature));
  RETURN_IF_ERROR(reader.ReadNumber("top_p", 0, 1, &config.defaults.top_p));
  RETURN_IF_ERROR(reader.ReadTopK(&config.defaults.top_k));
  RETURN_IF_ERROR(reader.ReadNumber("min_p", 0, 1, &config.defaults.min_p));
  RETURN_IF_ERROR(reader.ReadPositive("repetition_penalty", &config.defaults.repetition_penalty));
  RETURN_IF_ERROR(reader.ReadNumber("presence_penalty", -kMaxAbsPenalty, kMaxAbsPenalty,
                                    &config.defaults.presence_penalty));
  RETURN_IF_ERROR(reader.ReadNumber("frequency_penalty", -kMaxAbsPenalty, kMaxAbsPenalty,
                                    &config.defaults.frequency_penalty));
  RETURN_IF_ERROR(reader.ReadIds("eos_token_id", &config.eos_ids));
  if (!do_sample) config.defaults.temperature = 0;
  return config;
}

}  // namespace wintserve
