// The tensors of one directory: model.safetensors, or model.safetensors.index.json and its shards.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/weights/safetensors.h"

namespace wintserve {

// Ownership: the mapped files. Threading: thread-safe after Open.
class TensorSet {
 public:
  struct Entry {
    const TensorView* view = nullptr;
    const SafetensorsFile* file = nullptr;
  };

  // NOT_FOUND: no model or no shard. DATA_LOSS: a corrupt file, or an index that does not agree
  // with its shards or names a file outside the directory.
  static absl::StatusOr<TensorSet> Open(const std::filesystem::path& dir);

  const std::filesystem::path& dir() const { return dir_; }
  // By name.
  const std::map<std::string, Entry, std::less<>>& tensors() const { return tensors_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  // Null if there is none of that name.
  const Entry* Find(std::string_view name) const;

 private:
  absl::Status OpenSharded(const std::filesystem::path& index_path);

  std::filesystem::path dir_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Entry, std::less<>> tensors_;
};

}  // namespace wintserve
