#include "engine_worker/weights/tensor_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "common/status_macros.h"
#include "engine_worker/config/json_object.h"
#include "engine_worker/config/model_files.h"

namespace wintserve {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

// Why a directory with neither of the two files is no model, as far as what it holds tells.
std::string WhatIsThereInstead(const std::set<std::string>& names) {
  const auto first = [&](const auto& is_one) {
    const auto it = std::find_if(names.begin(), names.end(), is_one);
    return it == names.end() ? std::string() : *it;
  };
  // FastDeploy's own writes the last one beside weights of either kind.
  const std::string pdparams = first([](const std::string& name) {
    return name.ends_with(".pdparams") && name != "scheduler.pdparams";
  });
  if (!pdparams.empty()) {
    return "; *.pdparams files are not supported: take the safetensors release of the model, or "
           "save it again with save_pretrained(..., safe_serialization=True)";
  }
  const std::string shard =
      first([](const std::string& name) { return name.ends_with(".safetensors"); });
  if (!shard.empty()) return fmt::format(", but {}: is the index missing?", shard);
  const std::string rank = first([](const std::string& name) { return name.starts_with("rank"); });
  if (rank.empty()) return "";
  return fmt::format(", but {}: a model that is split for several ranks has rank0, rank1 and so on",
                     rank);
}

// A shard lies beside its index: nothing in a checkpoint may name a file elsewhere.
bool IsFileName(std::string_view name) {
  const auto is_wrong = [](unsigned char c) {
    return c < ' ' || c == 0x7F || c == '/' || c == '\\';
  };
  return !name.empty() && name != "." && name != ".." &&
         std::none_of(name.begin(), name.end(), is_wrong);
}

// Tensor name -> file name, both as the index has them.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadModelText(path));
  const auto corrupt = [&](std::string_view message) {
    return absl::DataLossError(fmt::format("{}: {}", path.string(), message));
  };
  const absl::StatusOr<nlohmann::json> root = ParseJsonObject(text);
  if (!root.ok()) return corrupt(std::string(root.status().message()));
  const auto weight_map = root->find("weight_map");
  if (weight_map == root->end() || !weight_map->is_object()) {
    return corrupt("weight_map is missing or not an object");
  }
  std::map<std::string, std::string> file_of_tensor;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!IsPlainName(tensor)) return corrupt(NotAPlainName(tensor));
    if (!file.is_string() || !IsFileName(file.get_ref<const std::string&>())) {
      return corrupt(fmt::format("tensor {}: found file {}, expected a file name in this directory",
                                 tensor, ShowJson(file)));
    }
    file_of_tensor[tensor] = file.get<std::string>();
  }
  return file_of_tensor;
}

}  // namespace

const TensorSet::Entry* TensorSet::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::StatusOr<TensorSet> TensorSet::Open(const std::filesystem::path& dir) {
  TensorSet set;
  set.dir_ = dir;
  ASSIGN_OR_RETURN(const auto entries, ListModelDir(dir));
  std::set<std::string> names;
  for (const auto& entry : entries) names.insert(entry.path().filename().string());
  if (names.contains(kSingleFile)) {
    ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(dir / kSingleFile));
    set.files_.push_back(std::move(file));
    for (const auto& [name, view] : set.files_.front().tensors()) {
      set.tensors_[name] = {&view, &set.files_.front()};
    }
    return set;
  }
  if (names.contains(kIndexFile)) {
    RETURN_IF_ERROR(set.OpenSharded(dir / kIndexFile));
    return set;
  }
  return absl::NotFoundError(fmt::format("{}: neither {} nor {} is there{}", dir.string(),
                                         kSingleFile, kIndexFile, WhatIsThereInstead(names)));
}

absl::Status TensorSet::OpenSharded(const std::filesystem::path& index_path) {
  using FileOfTensor = std::map<std::string, std::string>;
  ASSIGN_OR_RETURN(const FileOfTensor file_of_tensor, ReadIndex(index_path));
  std::map<std::string, size_t> index_of_file;
  for (const auto& [tensor, file] : file_of_tensor) index_of_file[file] = 0;
  files_.reserve(index_of_file.size());  // entries point into it
  for (auto& [file, index] : index_of_file) {
    ASSIGN_OR_RETURN(SafetensorsFile shard, SafetensorsFile::Open(dir_ / file));
    index = files_.size();
    files_.push_back(std::move(shard));
  }
  for (const auto& [tensor, file] : file_of_tensor) {
    const SafetensorsFile& shard = files_[index_of_file[file]];
    const auto it = shard.tensors().find(tensor);
    if (it == shard.tensors().end()) {
      return absl::DataLossError(fmt::format("{}: tensor {}: found none, expected it here by {}",
                                             shard.path().string(), tensor, index_path.string()));
    }
    tensors_[tensor] = {&it->second, &shard};
  }
  for (const SafetensorsFile& shard : files_) {
    for (const auto& [tensor, view] : shard.tensors()) {
      const auto it = file_of_tensor.find(tensor);
      if (it == file_of_tensor.end() || it->second != shard.path().filename()) {
        return absl::DataLossError(fmt::format(
            "{}: tensor {}: found here, expected {} by {}", shard.path().string(), tensor,
            it == file_of_tensor.end() ? "none" : "it in " + it->second, index_path.string()));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace wintserve
