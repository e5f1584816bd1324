#include "tools/quantizer/output/source.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <string_view>

#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve::quantizer {
namespace {

namespace fs = std::filesystem;

absl::Status CheckUnquantized(const fs::path& dir, const ModelConfig& config) {
  const char* format = nullptr;
  switch (config.expert_quantization) {
    case ExpertQuantization::kNone:
      format = config.dense_is_wint8 ? "wint8" : nullptr;
      break;
    case ExpertQuantization::kWint8:
      format = "wint8";
      break;
    case ExpertQuantization::kWint4:
      format = "wint4";
      break;
    case ExpertQuantization::kW4W2:
      format = "wint2";
      break;
  }
  if (format == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{}: is quantised already, to {}; allowed: a checkpoint in bfloat16, float16 or "
                  "float32",
                  dir.string(), format));
}

bool IsCompanion(const fs::path& path) {
  const std::string name = path.filename().string();
  constexpr std::string_view kBeginnings[] = {
      "tokeniz", "added_tokens", "special_tokens", "generation_config", "chat_template", "vocab",
      "merges",  "LICENSE",      "NOTICE"};
  return path.extension() == ".model" ||
         std::any_of(std::begin(kBeginnings), std::end(kBeginnings),
                     [&](std::string_view beginning) { return name.starts_with(beginning); });
}

std::vector<fs::path> FindCompanions(const fs::path& dir) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(dir, error)) {
    if (entry.is_regular_file(error) && IsCompanion(entry.path())) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

std::string Source::Digest() const {
  return fmt::format("{:016x}", XXH3_64bits_withSeed(config_json.data(), config_json.size(),
                                                     checkpoint->digest() ^ companions_digest));
}

absl::StatusOr<Source> OpenSource(const fs::path& dir) {
  Source source;
  source.dir = dir;
  ASSIGN_OR_RETURN(source.config, LoadModelConfig(dir));
  ASSIGN_OR_RETURN(source.config_json, ReadFile(dir / "config.json"));
  RETURN_IF_ERROR(CheckUnquantized(dir, source.config));
  ASSIGN_OR_RETURN(source.checkpoint, Checkpoint::Open(dir, source.config, KOrderChoice::kMma64));
  // Of a checkpoint that is split this is the first error that says so.
  RETURN_IF_ERROR(source.checkpoint->LoadMatrix({MatrixRole::kOutput, 0}, 0, 1).status());
  ASSIGN_OR_RETURN(const CheckpointFiles files, OpenCheckpointFiles(dir, source.config));
  source.skipped = CheckTensors(files.sets.front(), files.layout, files.stored_config).skipped;
  source.config.tie_word_embeddings = source.checkpoint->head_is_tied();
  source.config.tie_word_embeddings_is_set = true;
  source.config.has_router_bias = source.checkpoint->has_router_bias();
  source.config.has_router_bias_is_set = true;
  source.companions = FindCompanions(dir);
  for (const fs::path& companion : source.companions) {
    ASSIGN_OR_RETURN(std::string content, ReadFile(companion));
    // What a file is called decides what it is taken for. A name holds no zero.
    content.insert(0, companion.filename().string() + '\0');
    source.companions_digest =
        XXH3_64bits_withSeed(content.data(), content.size(), source.companions_digest);
  }
  return source;
}

}  // namespace wintserve::quantizer
