// Decode passes as graphs: one for each of some numbers of rows, so that a pass is one call of the
// backend's and the device does not wait for the host between operators.
//
// A captured pass is that of a batch of num_rows rows of one token, all of which want logits. What
// may differ between such batches is
//   fixed by the graph     the number of rows, tokens and ids, which padding rows fill up; that no
//                          row is longer than one token; where the ids go
//   read on the device     tokens, positions, block tables and slots; how attention is cut; how an
//                          id is drawn, with penalties, biases and masked stop ids
//   outside, before it     Backend::SetBatch, whose copy is as long as the batch
//   outside, after it      log-probabilities, which few rows ask for, and the copy to the host
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace wintserve {

// Ownership: borrows the backend. Whatever was captured must outlive the graphs: clear them before
// it ends.
// Threading: that of the backend.
class StepGraphs {
 public:
  struct Entry {
    int64_t num_rows = 0;
    std::unique_ptr<kernels::Graph> graph;
    kernels::ConstRows logits;  // of the pass, once it was launched
  };
  // Runs a pass of num_rows rows as it will be captured, so that whatever grows or loads has, and
  // returns its operators. They write to `logits`, which is that of the entry, whenever they are
  // called.
  using PrepareFn = std::function<absl::StatusOr<std::function<absl::Status()>>(
      int64_t num_rows, kernels::ConstRows* logits)>;

  explicit StepGraphs(kernels::Backend* backend) : backend_(backend) {}

  // 1, 2, 4, 8, 16, then two steps to each doubling (24, 32, 48, 64, 96, …), and max_rows.
  static std::vector<int64_t> SizesUpTo(int64_t max_rows);

  // Captures a graph for each of SizesUpTo(max_rows), the largest first. Find gives none before all
  // are there. REQUIRES: there are none yet.
  absl::Status CaptureUpTo(int64_t max_rows, const PrepareFn& prepare);

  // The smallest graph for num_rows rows and more; null: there is none.
  const Entry* Find(int64_t num_rows) const;

  // Waits for the launches that are not done yet, and destroys the graphs.
  void Clear() { entries_.clear(); }

  int64_t size() const { return std::ssize(entries_); }
  // What they took: device memory, and the time of their capture with the passes before it.
  int64_t size_bytes() const;
  double capture_seconds() const { return capture_seconds_; }

 private:
  absl::StatusOr<std::unique_ptr<Entry>> Capture(int64_t num_rows, const PrepareFn& prepare);

  kernels::Backend* const backend_;
  std::vector<std::unique_ptr<Entry>> entries_;  // by rising num_rows
  double capture_seconds_ = 0;
};

}  // namespace wintserve
