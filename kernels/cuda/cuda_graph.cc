#include "kernels/cuda/cuda_graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device.h"

namespace wintserve::kernels::cuda {
namespace {

// After a fault every call fails, the releasing ones too, and the fault itself has been reported.
void WarnIfFailed(cudaError_t error, const char* call, const std::string& graph) {
  if (error != cudaSuccess) LOG_WARNING("{} of graph {}: {}", call, graph, ErrorText(error));
}

struct CapturedDestroyer {
  void operator()(cudaGraph_t graph) const noexcept { cudaGraphDestroy(graph); }
};
using Captured = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, CapturedDestroyer>;

// What `operators` puts on the stream. Other threads may use the device meanwhile.
absl::StatusOr<Captured> CaptureStream(const std::string& name,
                                       const std::function<absl::Status()>& operators,
                                       cudaStream_t stream) {
  RETURN_IF_ERROR(ToStatus(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                           fmt::format("beginning the capture of graph {}", name)));
  const absl::Status called = operators();
  cudaGraph_t captured = nullptr;
  // Also after an error: it takes the stream out of the capture.
  const absl::Status ended =
      ToStatus(cudaStreamEndCapture(stream, &captured), fmt::format("capturing graph {}", name));
  Captured owned(captured);
  RETURN_IF_ERROR(called);
  RETURN_IF_ERROR(ended);
  return owned;
}

}  // namespace

void GraphExecDestroyer::operator()(cudaGraphExec_t graph) const noexcept {
  const cudaError_t error = cudaGraphExecDestroy(graph);
  if (error != cudaSuccess) LOG_WARNING("cudaGraphExecDestroy: {}", ErrorText(error));
}

absl::StatusOr<std::unique_ptr<CudaGraph>> CudaGraph::Capture(
    std::string name, const std::function<absl::Status()>& operators, cudaStream_t stream,
    std::vector<std::shared_ptr<const DeviceBuffer>> scratch) {
  std::unique_ptr<CudaGraph> graph(new CudaGraph(std::move(name), stream, std::move(scratch)));
  ASSIGN_OR_RETURN(const Captured captured, CaptureStream(graph->name_, operators, stream));
  ASSIGN_OR_RETURN(const DeviceMemoryBytes before, QueryDeviceMemory());
  cudaGraphExec_t executable = nullptr;
  RETURN_IF_ERROR(ToStatus(cudaGraphInstantiate(&executable, captured.get(), 0),
                           fmt::format("making graph {} executable", graph->name_)));
  graph->executable_.reset(executable);
  RETURN_IF_ERROR(ToStatus(cudaGraphUpload(executable, stream),
                           fmt::format("uploading graph {}", graph->name_)));
  ASSIGN_OR_RETURN(const DeviceMemoryBytes after, QueryDeviceMemory());
  graph->size_bytes_ = std::max<int64_t>(0, before.free - after.free);
  return graph;
}

CudaGraph::~CudaGraph() {
  WarnIfFailed(cudaStreamSynchronize(stream_), "cudaStreamSynchronize for the end", name_);
}

absl::Status CudaGraph::Launch() const {
  const cudaError_t error = cudaGraphLaunch(executable_.get(), stream_);
  if (error == cudaSuccess) return absl::OkStatus();
  return ToStatus(error, fmt::format("launching graph {}", name_));
}

}  // namespace wintserve::kernels::cuda
