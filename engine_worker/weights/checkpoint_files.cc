#include "engine_worker/weights/checkpoint_files.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <utility>

#include "common/status_macros.h"
#include "engine_worker/config/model_files.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/matrix_loader.h"

namespace wintserve {
namespace {

std::string ShowTypes(const std::vector<TensorType>& types) {
  std::vector<std::string_view> names;
  names.reserve(types.size());
  for (TensorType type : types) names.push_back(TensorTypeName(type));
  return fmt::format("{}", fmt::join(names, " or "));
}

std::string ShowShapes(const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<std::string> texts;
  texts.reserve(shapes.size());
  for (const auto& shape : shapes) texts.push_back(fmt::format("[{}]", fmt::join(shape, ", ")));
  return fmt::format("{}", fmt::join(texts, " or "));
}

// The packed layouts come in whole tiles; a shard of a pre-sharded checkpoint might not.
std::pair<int64_t, int64_t> TileOf(StoredFormat format) {
  switch (format) {
    case StoredFormat::kPlain:
      return {1, 1};
    case StoredFormat::kWint8:
      return {64, 2};
    case StoredFormat::kWint4:
      return {64, 4};
    case StoredFormat::kWint2:
      return {2 * formats::kWint2GroupSize, 1};
  }
  return {1, 1};
}

std::vector<ExpectedTensor> ExpectedVectors(const Layout& layout, const ModelConfig& config) {
  std::vector<ExpectedTensor> expected;
  const auto add = [&](VectorRole role, int layer, std::vector<std::vector<int64_t>> shapes) {
    expected.push_back(
        {VectorTensorName(layout, role, layer), FloatTensorTypes(), std::move(shapes)});
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    add(VectorRole::kInputNorm, layer, {{config.hidden_size}});
    add(VectorRole::kPostAttentionNorm, layer, {{config.hidden_size}});
    if (layout.has_router_bias && config.IsMoeLayer(layer)) {
      add(VectorRole::kRouterBias, layer, {{1, config.num_experts}, {config.num_experts}});
    }
  }
  add(VectorRole::kFinalNorm, 0, {{config.hidden_size}});
  return expected;
}

// Every tensor that the model needs is there as it must be, and no other but known skipped ones.
class Checker {
 public:
  Checker(const TensorSet& set, const Layout& layout, const ModelConfig& config)
      : set_(set), layout_(layout), config_(config) {}

  TensorCheck Run() {
    for (const MatrixRef& ref : AllMatrices(config_)) CheckMatrix(ref);
    for (const ExpectedTensor& expected : ExpectedVectors(layout_, config_)) Check(expected);
    CheckOthers();
    return std::move(result_);
  }

 private:
  void CheckMatrix(const MatrixRef& ref) {
    if (ref.role == MatrixRole::kHead && layout_.head_is_tied) return;  // no tensors of its own
    for (const MatrixPart& part : DescribeMatrix(layout_, config_, ref).parts) {
      const StoredMatrix& stored = part.stored;
      const auto [k_multiple, n_multiple] = TileOf(stored.format);
      if (stored.k % k_multiple != 0 || stored.n % n_multiple != 0) {
        Add("{}: tensor {}: found a matrix of {} x {}, expected multiples of {} and {}",
            set_.dir().string(), stored.name, stored.k, stored.n, k_multiple, n_multiple);
      }
      for (const ExpectedTensor& expected : ExpectedTensors(stored)) Check(expected);
    }
  }

  void Check(const ExpectedTensor& expected) {
    if (!needed_.insert(expected.name).second) return;
    const TensorSet::Entry* entry = set_.Find(expected.name);
    if (entry == nullptr) {
      return Add("{}: tensor {}: found none, expected {} {}", set_.dir().string(), expected.name,
                 ShowTypes(expected.types), ShowShapes(expected.shapes));
    }
    const TensorView& view = *entry->view;
    const auto contains = [](const auto& allowed, const auto& value) {
      return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
    };
    if (!contains(expected.types, view.type) || !contains(expected.shapes, view.shape)) {
      Add("{}: tensor {}: found {} {}, expected {} {}", entry->file->path().string(), expected.name,
          TensorTypeName(view.type), ShowShapes({view.shape}), ShowTypes(expected.types),
          ShowShapes(expected.shapes));
    }
  }

  void CheckOthers() {
    std::vector<std::string> foreign;  // of another kind of model, which one line says
    for (const auto& [name, entry] : set_.tensors()) {
      if (needed_.contains(name)) continue;
      if (const auto reason = WhySkipped(layout_, name)) {
        Skip(*reason, entry);
      } else if (IsOfAnotherModality(name)) {
        foreign.push_back(name);
      } else {
        Add("{}: tensor {}: found {} {}, expected no tensor of this name",
            entry.file->path().string(), name, TensorTypeName(entry.view->type),
            ShowShapes({entry.view->shape}));
      }
    }
    if (foreign.empty()) return;
    // First: whatever else does not fit follows from it.
    result_.problems.insert(
        result_.problems.begin(),
        fmt::format("{}: tensor {}: found {} tensors for images, video or sound, expected a model "
                    "of text alone: vision-language models cannot be served",
                    set_.dir().string(), foreign.front(), foreign.size()));
  }

  void Skip(SkipReason reason, const TensorSet::Entry& entry) {
    auto& counts = result_.skipped.counts;
    auto it = std::find_if(counts.begin(), counts.end(),
                           [&](const auto& count) { return count.reason == reason; });
    if (it == counts.end()) it = counts.insert(counts.end(), {reason});
    ++it->num_tensors;
    it->num_bytes += static_cast<int64_t>(entry.view->data.size());
  }

  template <typename... Args>
  void Add(fmt::format_string<Args...> format, Args&&... args) {
    result_.problems.push_back(fmt::format(format, std::forward<Args>(args)...));
  }

  const TensorSet& set_;
  const Layout& layout_;
  const ModelConfig& config_;
  std::set<std::string> needed_;
  TensorCheck result_;
};

// The directories to open: the checkpoint's own, or rank0 … of a pre-sharded one.
absl::StatusOr<std::vector<std::filesystem::path>> FindShardDirs(const std::filesystem::path& dir) {
  ASSIGN_OR_RETURN(const auto entries, ListModelDir(dir));
  std::error_code error;
  std::set<std::string> names;
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("rank") && entry.is_directory(error)) names.insert(name);
  }
  if (names.size() <= 1) return std::vector{dir};
  std::vector<std::filesystem::path> dirs;
  for (size_t rank = 0; rank < names.size(); ++rank) {
    const std::string name = fmt::format("rank{}", rank);
    if (!names.contains(name)) {
      return absl::DataLossError(
          fmt::format("{}: found {} directories named rank*, expected {} among them", dir.string(),
                      names.size(), name));
    }
    dirs.push_back(dir / name);
  }
  return dirs;
}

}  // namespace

int64_t SkippedTensors::num_tensors() const {
  int64_t sum = 0;
  for (const Count& count : counts) sum += count.num_tensors;
  return sum;
}

absl::StatusOr<CheckpointFiles> OpenCheckpointFiles(const std::filesystem::path& dir,
                                                    const ModelConfig& config) {
  ASSIGN_OR_RETURN(const std::vector<std::filesystem::path> dirs, FindShardDirs(dir));
  const int num_shards = static_cast<int>(dirs.size());
  if (absl::Status fits = CheckTensorParallel(config, num_shards); !fits.ok()) {
    return absl::DataLossError(fmt::format("{}: found {} directories named rank*, but {}",
                                           dir.string(), num_shards, std::string(fits.message())));
  }
  CheckpointFiles files;
  files.stored_config = ConfigOfShard(config, num_shards);
  for (const std::filesystem::path& shard_dir : dirs) {
    ASSIGN_OR_RETURN(TensorSet set, TensorSet::Open(shard_dir));
    files.sets.push_back(std::move(set));
  }
  ASSIGN_OR_RETURN(files.layout, DetectLayout(files.sets.front(), files.stored_config));
  return files;
}

TensorCheck CheckTensors(const TensorSet& set, const Layout& layout,
                         const ModelConfig& stored_config) {
  return Checker(set, layout, stored_config).Run();
}

std::vector<std::string> CheckRanksAgree(const CheckpointFiles& files) {
  // Every worker puts the whole table together.
  const std::string name = files.layout.prefix + ".embed_tokens.weight";
  const TensorSet::Entry* first = files.sets.front().Find(name);
  std::vector<std::string> problems;
  for (const TensorSet& set : files.sets) {
    const TensorSet::Entry* entry = set.Find(name);
    if (first == nullptr || entry == nullptr || entry->view->type == first->view->type) continue;
    problems.push_back(
        fmt::format("{}: tensor {}: found {}, expected {} as in {}", entry->file->path().string(),
                    name, TensorTypeName(entry->view->type), TensorTypeName(first->view->type),
                    files.sets.front().dir().string()));
  }
  return problems;
}

absl::Status ToStatus(const std::vector<std::string>& problems) {
  if (problems.empty()) return absl::OkStatus();
  return absl::DataLossError(
      problems.size() == 1
          ? problems.front()
          : fmt::format("{} (and {} more)", problems.front(), problems.size() - 1));
}

}  // namespace wintserve
