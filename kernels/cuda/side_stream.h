// A stream beside the one on which operators are launched, for work that does not depend on what
// lies there meanwhile. In a capture both become parts of the graph.
//
// The first kernel behind Fork here and the first behind Join there may not overlap the one before
// it (LaunchShape::overlaps_previous): it waits for two, and the rule of those that may is about
// one.
//
// Threading: used by the thread that launches.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/statusor.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

class SideStream {
 public:
  static absl::StatusOr<SideStream> Create();

  // What is launched here from now on waits for what lies on `main` now.
  void Fork(cudaStream_t main);
  // What is launched on `main` from now on waits for what lies here.
  void Join(cudaStream_t main);

  cudaStream_t get() const { return stream_.get(); }

 private:
  Stream stream_;
  Event forked_;
  Event done_;
};

}  // namespace wintserve::kernels::cuda
