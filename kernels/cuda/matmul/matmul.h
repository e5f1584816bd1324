// The weight products of a model on a GPU: linear layers, SwiGLU MLPs and mixtures of experts over
// matrices that plan/pack_weights.h packed. Launches only: nothing here allocates device memory,
// waits for the device or reads from it, and grids depend on the number of rows alone, so a call
// can be captured in a CUDA graph; what depends on the routing is read on the device.
//
// Activations come and go as float32 rows in device memory. Inside they are rounded once, to
// binary16 under a power of two of their row (11 significant bits; bfloat16 has 8), and weights are
// not rounded at all. A row's result has the same bits in any batch and for any launch plan.
//
// Threading: a call launches on `stream` from the calling thread. Calls that share a workspace must
// be ordered by the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/backend.h"
#include "kernels/cuda/matmul/device_weights.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

class SideStream;

// y [num_rows, n] = x [num_rows, k] * w
struct LinearArgs {
  ConstRows x;
  int64_t num_rows = 0;
  const DeviceWeights* w = nullptr;
  Rows y;
};

// y = down(silu(gate(x)) * up(x))
struct SwiGluMlpArgs {
  ConstRows x;
  int64_t num_rows = 0;
  const DeviceMlp* mlp = nullptr;
  Rows y;
  bool overlaps_previous = true;  // LaunchShape::overlaps_previous, of the first kernel
};

// y[r, :] = sum over a row's experts, in ascending order of index, of weight * mlp_e(x[r, :]), then
// + shared(x[r, :]) unless shared is null. `experts` and what it points to is host memory and need
// not outlive the call; expert_ids and expert_weights [num_rows, top_k] are device memory, a row's
// ids distinct.
// With `side`, what has been launched there makes shared_out [num_rows, columns], dense, which the
// sum takes in place of shared(x); the stream waits for it no earlier.
// REQUIRES: all experts have the same layouts; at most plan::kMaxExperts of them; top_k <= 32.
struct MoeMlpArgs {
  ConstRows x;
  int64_t num_rows = 0;
  std::span<const DeviceMlp* const> experts;
  int top_k = 0;
  const int32_t* expert_ids = nullptr;
  const float* expert_weights = nullptr;
  const DeviceMlp* shared = nullptr;
  const float* shared_out = nullptr;
  SideStream* side = nullptr;
  Rows y;
};

struct MatmulOptions {
  int num_multiprocessors = 0;
  // Which kernel computes a product, and how; another choice never changes a result. REQUIRES for
  // plan::PlanHopperProduct: compute capability 9.0.
  plan::ProductPlan (*planner)(const plan::ProductShape&, int) = plan::PlanProduct;
  // Where this gives a plan, the Hopper kernel computes the product; null: nowhere. It never
  // changes a result either. REQUIRES for a planner: compute capability 9.0.
  plan::WgmmaPlanner wgmma_planner = nullptr;
};

// With every kernel that the device has. num_multiprocessors, compute_capability: of
// DeviceProperties.
MatmulOptions MatmulOptionsFor(int num_multiprocessors, int compute_capability);

// Bytes of workspace for calls with up to max_rows rows. Device memory, aligned to 256; contents do
// not matter before and after a call.
int64_t LinearWorkspaceBytes(const MatmulOptions& options, const plan::WeightLayout& w,
                             int64_t max_rows);
int64_t SwiGluMlpWorkspaceBytes(const MatmulOptions& options, const DeviceMlp& mlp,
                                int64_t max_rows);
int64_t MoeMlpWorkspaceBytes(const MatmulOptions& options, const DeviceMlp& expert, int num_experts,
                             int top_k, const DeviceMlp* shared, int64_t max_rows);

// Lets the kernels use the shared memory that they need. Once for each device, before the first
// call on it; not inside a capture.
void InitMatmul();

void LaunchLinear(const MatmulOptions& options, const LinearArgs& args, void* workspace,
                  cudaStream_t stream);
void LaunchSwiGluMlp(const MatmulOptions& options, const SwiGluMlpArgs& args, void* workspace,
                     cudaStream_t stream);
void LaunchMoeMlp(const MatmulOptions& options, const MoeMlpArgs& args, void* workspace,
                  cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
