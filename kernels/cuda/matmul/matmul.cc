#include "kernels/cuda/matmul/matmul.h"

#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/matmul_sequence.h"
#include "kernels/cuda/matmul/wgmma_launches.h"
#include "kernels/cuda/side_stream.h"

namespace wintserve::kernels::cuda {
namespace {

class StreamLauncher {
 public:
  explicit StreamLauncher(cudaStream_t stream, bool first_overlaps = true,
                          SideStream* side = nullptr)
      : stream_(stream), next_overlaps_(first_overlaps), side_(side) {}

  void Prepare(const PrepareParams& params, int64_t num_rows) {
    LaunchPrepareRows(params, num_rows, stream_, std::exchange(next_overlaps_, true));
  }
  void Product(const plan::ProductPlan& plan, const ProductParams& params,
               formats::WeightFormat format) {
    const ProductLaunches& launches = LaunchesOf(format);
    plan::ProductPlan launched = plan;
    launched.overlaps_previous = std::exchange(next_overlaps_, true);
    (plan.kernel == plan::ProductKernel::kTile ? launches.tile : launches.stream)(launched, params,
                                                                                  stream_);
  }
  void WgmmaProduct(const plan::WgmmaPlan& plan, const ProductParams& params,
                    formats::WeightFormat format) {
    WgmmaLaunchesOf(format).product(plan, params, stream_);
  }
  void AddSlices(const ProductParams& params) { LaunchAddSlices(params, stream_); }
  void SortAndPrepare(const SortParams& sort, const PrepareParams& prepare, int64_t num_rows) {
    LaunchSortAndPrepare(sort, prepare, num_rows, stream_);
  }
  void Combine(const CombineParams& params, int64_t num_rows) {
    if (side_ != nullptr) side_->Join(stream_);
    LaunchCombineExperts(params, num_rows, stream_, /*overlaps=*/side_ == nullptr);
  }

 private:
  const cudaStream_t stream_;
  bool next_overlaps_;
  SideStream* const side_;
};

MatmulSequence<StreamLauncher> SequenceFor(const MatmulOptions& options, StreamLauncher* launcher) {
  CHECK(options.num_multiprocessors > 0);
  return {options.planner, options.num_multiprocessors, launcher, options.wgmma_planner};
}

constexpr int kWgmmaCapability = 90;  // its instructions exist on 9.0 alone

int CurrentComputeCapability() {
  int device = 0;
  int major = 0;
  int minor = 0;
  CUDA_CALL(cudaGetDevice, &device);
  CUDA_CALL(cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device);
  CUDA_CALL(cudaDeviceGetAttribute, &minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

}  // namespace

const ProductLaunches& LaunchesOf(formats::WeightFormat format) {
  switch (format) {
    case formats::WeightFormat::kWint2:
      return Wint2Launches();
    case formats::WeightFormat::kWint4:
      return Wint4Launches();
    case formats::WeightFormat::kWint8:
      return Wint8Launches();
    case formats::WeightFormat::kBfloat16:
      return Bfloat16Launches();
    case formats::WeightFormat::kFloat32:
      break;
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

const WgmmaLaunches& WgmmaLaunchesOf(formats::WeightFormat format) {
  switch (format) {
    case formats::WeightFormat::kWint2:
      return Wint2WgmmaLaunches();
    case formats::WeightFormat::kWint4:
      return Wint4WgmmaLaunches();
    case formats::WeightFormat::kWint8:
      return Wint8WgmmaLaunches();
    case formats::WeightFormat::kBfloat16:
      return Bfloat16WgmmaLaunches();
    case formats::WeightFormat::kFloat32:
      break;
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

MatmulOptions MatmulOptionsFor(int num_multiprocessors, int compute_capability) {
  MatmulOptions options;
  options.num_multiprocessors = num_multiprocessors;
  if (compute_capability == kWgmmaCapability) {
    options.planner = plan::PlanHopperProduct;
    options.wgmma_planner = plan::PlanWgmmaProduct;
  }
  return options;
}

int64_t LinearWorkspaceBytes(const MatmulOptions& options, const plan::WeightLayout& w,
                             int64_t max_rows) {
  auto sequence = SequenceFor(options, nullptr);
  return LargestOfPasses(max_rows, [&](int64_t rows) {
    return sequence.Linear({}, rows, {w, nullptr}, {}, nullptr);
  });
}

int64_t SwiGluMlpWorkspaceBytes(const MatmulOptions& options, const DeviceMlp& mlp,
                                int64_t max_rows) {
  auto sequence = SequenceFor(options, nullptr);
  return LargestOfPasses(
      max_rows, [&](int64_t rows) { return sequence.SwiGluMlp({}, rows, mlp, {}, nullptr); });
}

int64_t MoeMlpWorkspaceBytes(const MatmulOptions& options, const DeviceMlp& expert, int num_experts,
                             int top_k, const DeviceMlp* shared, int64_t max_rows) {
  auto sequence = SequenceFor(options, nullptr);
  const std::vector<const DeviceMlp*> experts(num_experts, &expert);
  return LargestOfPasses(max_rows, [&](int64_t rows) {
    return sequence.MoeMlp({}, rows, experts, top_k, nullptr, nullptr, shared, nullptr, {},
                           nullptr);
  });
}

void InitMatmul() {
  for (const ProductLaunches* launches :
       {&Wint2Launches(), &Wint4Launches(), &Wint8Launches(), &Bfloat16Launches()}) {
    launches->allow_shared_memory();
  }
  if (CurrentComputeCapability() != kWgmmaCapability) return;
  for (const WgmmaLaunches* launches : {&Wint2WgmmaLaunches(), &Wint4WgmmaLaunches(),
                                        &Wint8WgmmaLaunches(), &Bfloat16WgmmaLaunches()}) {
    launches->allow_shared_memory();
  }
}

void LaunchLinear(const MatmulOptions& options, const LinearArgs& args, void* workspace,
                  cudaStream_t stream) {
  StreamLauncher launcher(stream);
  auto sequence = SequenceFor(options, &launcher);
  ForEachPass(args.num_rows, [&](int64_t first, int64_t rows) {
    sequence.Linear({args.x.row(first), args.x.stride}, rows, *args.w,
                    {args.y.row(first), args.y.stride}, workspace);
  });
}

void LaunchSwiGluMlp(const MatmulOptions& options, const SwiGluMlpArgs& args, void* workspace,
                     cudaStream_t stream) {
  StreamLauncher launcher(stream, args.overlaps_previous);
  auto sequence = SequenceFor(options, &launcher);
  ForEachPass(args.num_rows, [&](int64_t first, int64_t rows) {
    sequence.SwiGluMlp({args.x.row(first), args.x.stride}, rows, *args.mlp,
                       {args.y.row(first), args.y.stride}, workspace);
  });
}

void LaunchMoeMlp(const MatmulOptions& options, const MoeMlpArgs& args, void* workspace,
                  cudaStream_t stream) {
  CHECK(args.side == nullptr || args.num_rows <= plan::kMaxPassRows, "num_rows={}", args.num_rows);
  StreamLauncher launcher(stream, /*first_overlaps=*/true, args.side);
  auto sequence = SequenceFor(options, &launcher);
  ForEachPass(args.num_rows, [&](int64_t first, int64_t rows) {
    sequence.MoeMlp({args.x.row(first), args.x.stride}, rows, args.experts, args.top_k,
                    args.expert_ids + first * args.top_k, args.expert_weights + first * args.top_k,
                    args.shared, args.shared_out, {args.y.row(first), args.y.stride}, workspace);
  });
}

}  // namespace wintserve::kernels::cuda
