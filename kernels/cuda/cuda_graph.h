// The CUDA twin of kernels::Graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {

struct GraphExecDestroyer {
  void operator()(cudaGraphExec_t graph) const noexcept;
};
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphExecDestroyer>;

// Its parameters are on the device from creation on, so that the first launch costs no more than
// the others.
class CudaGraph final : public kernels::Graph {
 public:
  // kernels::Backend::Capture, of what `operators` puts on `stream`. `scratch` is kept as long as
  // the graph, which works with it.
  static absl::StatusOr<std::unique_ptr<CudaGraph>> Capture(
      std::string name, const std::function<absl::Status()>& operators, cudaStream_t stream,
      std::vector<std::shared_ptr<const DeviceBuffer>> scratch);
  ~CudaGraph() override;

  // On the stream that was captured.
  absl::Status Launch() const;

  const std::string& name() const override { return name_; }
  int64_t size_bytes() const override { return size_bytes_; }

 private:
  CudaGraph(std::string name, cudaStream_t stream,
            std::vector<std::shared_ptr<const DeviceBuffer>> scratch)
      : name_(std::move(name)), stream_(stream), scratch_(std::move(scratch)) {}

  const std::string name_;
  const cudaStream_t stream_;
  const std::vector<std::shared_ptr<const DeviceBuffer>> scratch_;
  GraphExec executable_;
  int64_t size_bytes_ = 0;
};

}  // namespace wintserve::kernels::cuda
