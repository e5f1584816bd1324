#include "tools/inspect/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "common/status_macros.h"
#include "engine_worker/config/model_files.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/layout.h"

namespace wintserve::inspect {
namespace {

// Whether anything of it is what weights come in.
bool HasWeights(const std::vector<std::filesystem::directory_entry>& entries) {
  return std::any_of(entries.begin(), entries.end(), [](const auto& entry) {
    const std::filesystem::path& path = entry.path();
    std::error_code error;
    return path.extension() == ".safetensors" || path.extension() == ".pdparams" ||
           path.filename() == "model.safetensors.index.json" ||
           (path.filename().string().starts_with("rank") && entry.is_directory(error));
  });
}

void CheckFiles(Report& report) {
  for (const TensorSet& set : report.opened->sets) {
    for (const SafetensorsFile& file : set.files()) {
      report.files.push_back(
          {file.path().string(), file.size_bytes(), static_cast<int64_t>(file.tensors().size())});
    }
    TensorCheck check = CheckTensors(set, report.opened->layout, report.opened->stored_config);
    report.problems.insert(report.problems.end(), check.problems.begin(), check.problems.end());
    for (const SkippedTensors::Count& count : check.skipped.counts) {
      auto& sums = report.skipped.counts;
      auto it = std::find_if(sums.begin(), sums.end(),
                             [&](const auto& sum) { return sum.reason == count.reason; });
      if (it == sums.end()) it = sums.insert(sums.end(), {count.reason});
      it->num_tensors += count.num_tensors;
      it->num_bytes += count.num_bytes;
    }
  }
  for (std::string& problem : CheckRanksAgree(*report.opened)) {
    report.problems.push_back(std::move(problem));
  }
  report.head_is_tied = report.opened->layout.head_is_tied;
}

absl::Status CollectKOrder(Report& report) {
  if (!report.problems.empty()) return absl::OkStatus();
  if (report.config.expert_quantization != ExpertQuantization::kW4W2) return absl::OkStatus();
  const auto checkpoint = Checkpoint::Open(report.dir, report.config, KOrderChoice::kAuto);
  if (!checkpoint.ok()) {  // a scale that is no number
    report.problems.emplace_back(checkpoint.status().message());
    return absl::OkStatus();
  }
  const KOrderEvidence evidence = (*checkpoint)->k_order_evidence();
  if (evidence.num_experts > 0) report.k_order = evidence;
  return absl::OkStatus();
}

absl::Status ChooseRanks(int wanted, Report& report) {
  const int split_for = report.opened && report.opened->is_presharded()
                            ? static_cast<int>(report.opened->sets.size())
                            : 0;
  report.tensor_parallel_size = wanted > 0 ? wanted : std::max(1, split_for);
  if (split_for > 0 && report.tensor_parallel_size != split_for) {
    return absl::InvalidArgumentError(
        fmt::format("{}: the checkpoint is split for tensor parallel size {}; it cannot be loaded "
                    "with {}",
                    report.dir, split_for, report.tensor_parallel_size));
  }
  if (absl::Status fits = CheckTensorParallel(report.config, report.tensor_parallel_size);
      !fits.ok()) {
    return absl::InvalidArgumentError(
        fmt::format("{}/config.json: {}", report.dir, std::string(fits.message())));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t Report::total_file_bytes() const {
  int64_t sum = 0;
  for (const FileFacts& file : files) sum += file.num_bytes;
  return sum;
}

bool Report::all_matrices_are_quantized() const {
  const bool experts_are =
      config.expert_quantization != ExpertQuantization::kNone && !config.first_experts_are_plain;
  return config.dense_is_wint8 && (config.num_experts == 0 || experts_are);
}

void AddVerified(Verified verified, Report& report) {
  // "file: tensor name", which is how both begin.
  const auto place = [](std::string_view problem) {
    return problem.substr(0, problem.find(": found "));
  };
  std::erase_if(report.problems, [&](const std::string& problem) {
    return std::any_of(verified.problems.begin(), verified.problems.end(),
                       [&](const auto& other) { return place(other) == place(problem); });
  });
  report.verified = std::move(verified);
}

absl::StatusOr<Report> Inspect(const InspectOptions& options) {
  Report report;
  report.dir = options.dir;
  ASSIGN_OR_RETURN(const auto entries, ListModelDir(options.dir));
  ASSIGN_OR_RETURN(report.config, LoadModelConfig(options.dir));
  report.head_is_tied = report.config.tie_word_embeddings;
  if (HasWeights(entries)) {
    ASSIGN_OR_RETURN(report.opened, OpenCheckpointFiles(options.dir, report.config));
    CheckFiles(report);
    RETURN_IF_ERROR(CollectKOrder(report));
  }
  RETURN_IF_ERROR(ChooseRanks(options.tensor_parallel_size, report));
  const CheckpointFiles* files = report.opened ? &*report.opened : nullptr;
  report.layers = LayerRanges(report.config, files);
  report.sizes = SizesOf(report.config, files, 0, 1);
  report.active_parameters = ActiveParameters(report.config, report.sizes);
  report.rank_sizes = SizesOf(report.config, files, 0, report.tensor_parallel_size);
  if (options.fit) {
    report.fit_options = options.fit;
    report.fit_options->world_size = report.tensor_parallel_size;
    report.fit = FitModel(report.config, files, *report.fit_options);
  }
  return report;
}

}  // namespace wintserve::inspect
