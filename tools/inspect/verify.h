// Reads every tensor of a checkpoint and says which hold something that no model does.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint_files.h"

namespace wintserve::inspect {

struct Verified {
  int64_t num_tensors = 0;
  int64_t num_bytes = 0;
  // A line for each broken tensor, which names file and tensor, in the order of files and names.
  std::vector<std::string> problems;
};

// Broken is
//   - a number that is not finite, or beyond 65,536: weights are of the order of 1
//   - a matrix or a norm of nothing but zeros
//   - WINT2: codes outside 0 … 32,767 of bytes that a column has
//   - WINT8, WINT4: a page of zero bytes, which stand for a code that no encoder writes
//   - norms, routers and their biases that differ between the ranks of a pre-sharded checkpoint
//
// Tensors that are skipped are checked as far as their type tells. Those that CheckTensors
// complains of are left out.
//
// on_bytes: called with what was read since, which adds up to all, on any thread.
//
// Memory: pages that were read are dropped. Threading: runs num_threads of its own.
Verified VerifyTensors(const CheckpointFiles& files, int num_threads,
                       const std::function<void(int64_t)>& on_bytes);

}  // namespace wintserve::inspect
