// The directory of a quantised checkpoint while it is written: OUTPUT.partial, which becomes OUTPUT
// when everything is in it and on the disk.
#pragma once

#include <xxhash.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/unique_fd.h"
#include "tools/quantizer/output/journal.h"
#include "tools/quantizer/output/tensor_plan.h"

namespace wintserve::quantizer {

// Owns the files and a lock on the directory. Threading: one thread.
//
// A full disk is an error with the file, what is free and what the output lacks; nothing that was
// committed is lost by it.
//
// A journal in the directory names the run's identity and the steps that are on the disk. Whatever
// ends the process, or the machine, leaves a directory that another run of the same identity goes
// on from. The directory is renamed in one step, so OUTPUT is whole or not there.
class OutputDir {
 public:
  // Begins OUTPUT.partial, with the space of all files reserved where the file system can do that,
  // or goes on with the one that is there.
  // ALREADY_EXISTS: OUTPUT is there. FAILED_PRECONDITION: OUTPUT.partial is of another run (says
  // what differs) or of another program, or another process writes it. RESOURCE_EXHAUSTED: not
  // enough space. UNKNOWN and others: whatever the file system says, with the file's name.
  // overwrite_partial: removes an OUTPUT.partial that has a journal, whatever run it is of.
  static absl::StatusOr<OutputDir> Open(const std::filesystem::path& output, const OutputPlan& plan,
                                        RunIdentity identity, bool overwrite_partial);
  static std::filesystem::path PartialPath(const std::filesystem::path& output);

  OutputDir(OutputDir&&) = default;

  const std::filesystem::path& partial() const { return partial_; }
  // Steps of the plan that an earlier run has made.
  int64_t num_steps_before() const { return num_steps_before_; }
  // What the last Commit of that run was told besides; null if there was none.
  const nlohmann::json& notes_before() const { return notes_before_; }

  // A small file beside the tensors. Replaces one of that name.
  absl::Status WriteText(const std::string& name, const std::string& text);
  absl::Status CopyFile(const std::filesystem::path& source);

  // Whether a step of an earlier run is on the disk as that run wrote it. FAILED_PRECONDITION: it
  // is not. REQUIRES: index < num_steps_before(); before the first WriteTensor.
  absl::Status CheckStep(int64_t index, const PlannedStep& step);

  // Steps are written one after the other, from num_steps_before() on, each a call for every tensor
  // in their order and then EndStep. REQUIRES: as many bytes as the tensor has.
  absl::Status WriteTensor(const PlannedTensor& tensor, std::span<const uint8_t> bytes);
  void EndStep();
  // All ended steps are on the disk, and the journal says so. After an error of a disk every later
  // call fails with it: what is on the disk is not known.
  absl::Status Commit(const nlohmann::json& notes);
  // For a run that cannot begin: leaves no directory behind unless an earlier run has made steps.
  // REQUIRES: nothing was committed. Nothing may be called afterwards.
  void RemoveIfNothingIsDone();
  // REQUIRES: all steps are committed. Nothing may be called afterwards.
  absl::Status Finish();

 private:
  OutputDir() = default;
  absl::Status CheckOutputIsFree() const;
  absl::Status Resume(bool overwrite_partial);
  absl::Status Begin(const OutputPlan& plan);
  absl::Status OpenFiles(const OutputPlan& plan);
  absl::Status Lock();
  absl::Status WriteJournal(const nlohmann::json& notes);
  // An error of missing space says how much the output lacks.
  absl::Status WithNeeds(const absl::Status& status) const;

  std::filesystem::path output_;
  std::filesystem::path partial_;
  RunIdentity identity_;
  UniqueFd lock_;                    // the directory
  std::vector<int64_t> file_bytes_;  // of every file, as planned
  std::vector<UniqueFd> files_;
  std::vector<std::string> file_names_;
  std::vector<bool> is_dirty_;     // by file: written since the last Commit
  std::vector<uint64_t> digests_;  // of the steps that are done, as of Journal
  struct FreeDigest {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, FreeDigest> digest_;  // of the step that is written or read
  absl::Status sync_error_;                           // the first one of Commit
  int64_t num_steps_ = 0;                             // of the plan
  int64_t num_steps_before_ = 0;
  nlohmann::json notes_before_;
};

}  // namespace wintserve::quantizer
