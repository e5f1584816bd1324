// The order of launches of a linear layer, an MLP and a mixture of experts, and where their
// intermediate results lie in the workspace. Templates over what launches: the GPU, or a test's
// emulation of it.
//
// A Launcher has
//   Prepare(params, num_rows)   Product(plan, params, format)   AddSlices(params)
//   SortAndPrepare(sort params, params, num_rows)   Combine(params, num_rows)
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "common/check.h"
#include "kernels/backend.h"
#include "kernels/cuda/matmul/device_weights.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

// Hands out parts of a workspace one after another; with a null base it only counts.
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(void* base) : base_(static_cast<uint8_t*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    uint8_t* part = base_ == nullptr ? nullptr : base_ + used_bytes_;
    used_bytes_ += plan::DivideUp(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used_bytes() const { return used_bytes_; }

 private:
  uint8_t* const base_;
  int64_t used_bytes_ = 0;
};

inline PreparedRows TakePreparedRows(int64_t num_rows, int64_t chunks, WorkspaceCursor* workspace) {
  PreparedRows rows;
  rows.values = workspace->Take<uint16_t>(num_rows * chunks * plan::kChunkRows);
  rows.inverse_scale = workspace->Take<float>(num_rows);
  rows.corrections = workspace->Take<ChunkCorrections>(num_rows * chunks);
  return rows;
}

// What activations must look like for a product: equal for two products, equal rows serve both.
struct Preparation {
  int64_t k = 0;
  formats::KOrder k_order = formats::KOrder::kMma64;
  plan::Offsets offsets;
  plan::OperandOrder order = plan::OperandOrder::kMma;

  bool operator==(const Preparation&) const = default;
};

// How a product is computed: by `wgmma` if that is set, else by `plan`.
struct ProductChoice {
  plan::ProductShape shape;
  plan::ProductPlan plan;
  std::optional<plan::WgmmaPlan> wgmma;
};

inline Preparation PreparationFor(const plan::WeightLayout& layout, const ProductChoice& choice) {
  return {layout.k, layout.k_order, plan::OffsetsOf(layout.format),
          choice.wgmma.has_value() ? plan::OperandOrder::kWgmma : plan::OperandOrder::kMma};
}

using Planner = plan::ProductPlan (*)(const plan::ProductShape&, int);

template <class Launcher>
class MatmulSequence {
 public:
  MatmulSequence(Planner planner, int num_multiprocessors, Launcher* launcher,
                 plan::WgmmaPlanner wgmma_planner = nullptr)
      : planner_(planner),
        wgmma_planner_(wgmma_planner),
        num_multiprocessors_(num_multiprocessors),
        launcher_(launcher) {}

  // Each returns the bytes of workspace that it used; with a null workspace it launches nothing.
  // num_rows: at most kMaxPassRows.
  int64_t Linear(ConstRows x, int64_t num_rows, const DeviceWeights& w, Rows y, void* base) {
    WorkspaceCursor workspace(base);
    const ProductChoice choice = ChooseForRows(w.layout, num_rows);
    const PrepareParams prepared = PrepareUnlessOwn(x, num_rows, w.layout, choice, &workspace);
    MultiplyOne(prepared, choice, w, Epilogue::kStore, y, &workspace);
    return workspace.used_bytes();
  }

  int64_t SwiGluMlp(ConstRows x, int64_t num_rows, const DeviceMlp& mlp, Rows y, void* base) {
    WorkspaceCursor workspace(base);
    const PrepareParams prepared = PrepareUnlessOwn(
        x, num_rows, mlp.gate_up.layout, ChooseForRows(mlp.gate_up.layout, num_rows), &workspace);
    MultiplyMlp(prepared, num_rows, mlp, y, &workspace);
    return workspace.used_bytes();
  }

  // shared_out: of the shared experts where they have been computed already, then shared is null.
  int64_t MoeMlp(ConstRows x, int64_t num_rows, std::span<const DeviceMlp* const> experts,
                 int top_k, const int32_t* expert_ids, const float* expert_weights,
                 const DeviceMlp* shared, const float* shared_out, Rows y, void* base) {
    WorkspaceCursor workspace(base);
    const int64_t num_pairs = num_rows * top_k;
    const auto num_experts = static_cast<int>(experts.size());
    SortParams sort;
    sort.expert_ids = expert_ids;
    sort.num_pairs = static_cast<int>(num_pairs);
    sort.num_experts = num_experts;
    sort.top_k = top_k;
    sort.first_token = workspace.Take<int32_t>(num_experts + 1);
    sort.source_row = workspace.Take<int32_t>(num_pairs);
    sort.place_of_pair = workspace.Take<int32_t>(num_pairs);

    const DeviceMlp& first = *experts.front();
    const ProductChoice choice = Choose(first.gate_up.layout, num_experts, num_pairs, num_rows);
    const Preparation preparation = PreparationFor(first.gate_up.layout, choice);
    const PrepareParams prepare = PrepareFor(x, num_rows, preparation, &workspace);
    if (base != nullptr) launcher_->SortAndPrepare(sort, prepare, num_rows);
    ProductParams gate_up = ExpertParams(experts, &DeviceMlp::gate_up);
    gate_up.first_token = sort.first_token;
    gate_up.source_row = sort.source_row;
    gate_up.is_schedule_new = true;
    gate_up.num_tokens = static_cast<int>(num_pairs);
    gate_up.epilogue = Epilogue::kSwiGlu;
    gate_up.x = prepare.out;
    gate_up.y_stride = first.gate_up.layout.width();
    gate_up.y = workspace.Take<float>(num_pairs * gate_up.y_stride);
    Multiply(choice, gate_up, &workspace);

    ProductParams down = ExpertParams(experts, &DeviceMlp::down);
    down.first_token = sort.first_token;
    down.num_tokens = static_cast<int>(num_pairs);
    const ProductChoice choice_down = Choose(first.down.layout, num_experts, num_pairs, num_rows);
    down.x = Prepare({gate_up.y, gate_up.y_stride}, num_pairs,
                     PreparationFor(first.down.layout, choice_down), &workspace);
    down.y_stride = first.down.layout.n;
    down.y = workspace.Take<float>(num_pairs * down.y_stride);
    Multiply(choice_down, down, &workspace);

    CombineParams combine;
    combine.expert_out = down.y;
    combine.place_of_pair = sort.place_of_pair;
    combine.pair_weights = expert_weights;
    combine.top_k = top_k;
    combine.columns = static_cast<int>(first.down.layout.n);
    combine.y = y.data;
    combine.y_stride = y.stride;
    combine.shared_out = shared_out;
    if (shared != nullptr) {
      const Preparation for_shared = PreparationForRows(shared->gate_up.layout, num_rows);
      const PrepareParams prepared =
          for_shared == preparation
              ? prepare
              : PrepareUnlessOwn(x, num_rows, shared->gate_up.layout,
                                 ChooseForRows(shared->gate_up.layout, num_rows), &workspace);
      auto* own_out = workspace.Take<float>(num_rows * combine.columns);
      MultiplyMlp(prepared, num_rows, *shared, {own_out, combine.columns}, &workspace);
      combine.shared_out = own_out;
    }
    if (base != nullptr) launcher_->Combine(combine, num_rows);
    return workspace.used_bytes();
  }

 private:
  static PrepareParams PrepareFor(ConstRows x, int64_t num_rows, const Preparation& preparation,
                                  WorkspaceCursor* workspace) {
    PrepareParams params;
    params.x = x.data;
    params.x_stride = x.stride;
    params.k = static_cast<int>(preparation.k);
    params.chunks = static_cast<int>(plan::DivideUp<int64_t>(preparation.k, plan::kChunkRows));
    params.k_order = preparation.k_order;
    params.offsets = preparation.offsets;
    params.order = preparation.order;
    params.out = TakePreparedRows(num_rows, params.chunks, workspace);
    return params;
  }
  PreparedRows Prepare(ConstRows x, int64_t num_rows, const Preparation& preparation,
                       WorkspaceCursor* workspace) {
    const PrepareParams params = PrepareFor(x, num_rows, preparation, workspace);
    if (params.out.values != nullptr) launcher_->Prepare(params, num_rows);
    return params.out;
  }

  // The rows are prepared, unless the product of the choice does that itself.
  PrepareParams PrepareUnlessOwn(ConstRows x, int64_t num_rows, const plan::WeightLayout& layout,
                                 const ProductChoice& choice, WorkspaceCursor* workspace) {
    const PrepareParams params = PrepareFor(x, num_rows, PreparationFor(layout, choice), workspace);
    if (params.out.values != nullptr && choice.plan.row_chunks == 0) {
      launcher_->Prepare(params, num_rows);
    }
    return params;
  }

  static ProductParams ParamsFor(const plan::WeightLayout& layout) {
    ProductParams params;
    params.records_offset = layout.records_offset();
    params.tiles = static_cast<int>(layout.tiles());
    params.chunks = static_cast<int>(layout.chunks());
    params.columns = static_cast<int>(layout.width());
    return params;
  }

  static ProductParams ExpertParams(std::span<const DeviceMlp* const> experts,
                                    DeviceWeights DeviceMlp::*matrix) {
    CHECK(!experts.empty() && experts.size() <= plan::kMaxExperts, "{} experts", experts.size());
    const plan::WeightLayout& layout = (experts.front()->*matrix).layout;
    ProductParams params = ParamsFor(layout);
    params.num_experts = static_cast<int>(experts.size());
    for (size_t e = 0; e < experts.size(); ++e) {
      const plan::WeightLayout& own = (experts[e]->*matrix).layout;
      CHECK(own.format == layout.format && own.k_order == layout.k_order && own.k == layout.k &&
                own.n == layout.n,
            "expert {} has another layout than expert 0", e);
      params.experts.weights[e] = (experts[e]->*matrix).data;
    }
    return params;
  }

  // num_tokens: over all experts; max_per_expert: what one can get.
  ProductChoice Choose(const plan::WeightLayout& layout, int num_experts, int64_t num_tokens,
                       int64_t max_per_expert) const {
    ProductChoice choice;
    choice.shape = {layout.format, layout.chunks(), layout.tiles(),
                    num_experts,   num_tokens,      max_per_expert};
    choice.plan = planner_(choice.shape, num_multiprocessors_);
    if (wgmma_planner_ != nullptr) {
      choice.wgmma = wgmma_planner_(choice.shape, num_multiprocessors_);
    }
    if (num_experts == 1 && num_tokens == 1 && !choice.wgmma.has_value() &&
        choice.plan.kernel == plan::ProductKernel::kStream && choice.plan.tiles_per_warp == 1 &&
        layout.chunks() <= plan::kMaxStreamRowChunks) {
      choice.plan.row_chunks = static_cast<int>(layout.chunks());
    }
    return choice;
  }
  ProductChoice ChooseForRows(const plan::WeightLayout& layout, int64_t num_rows) const {
    return Choose(layout, 1, num_rows, num_rows);
  }
  Preparation PreparationForRows(const plan::WeightLayout& layout, int64_t num_rows) const {
    return PreparationFor(layout, ChooseForRows(layout, num_rows));
  }

  void Multiply(const ProductChoice& choice, ProductParams params, WorkspaceCursor* workspace) {
    const auto run = [&](const auto& plan, const auto& launch) {
      params.slices = plan.slices;
      params.token_slots = choice.plan.token_slots;
      params.groups = choice.plan.groups;
      if (plan.split_slices) {
        params.split_sums = workspace->Take<float>(plan::SplitSumFloats(choice.shape, plan));
      }
      if (params.x.values == nullptr) return;
      launch();
      if (plan.split_slices) launcher_->AddSlices(params);
    };
    if (choice.wgmma.has_value()) {
      run(*choice.wgmma,
          [&] { launcher_->WgmmaProduct(*choice.wgmma, params, choice.shape.format); });
    } else {
      run(choice.plan, [&] { launcher_->Product(choice.plan, params, choice.shape.format); });
    }
  }

  // One matrix times the rows of the choice.
  void MultiplyOne(const PrepareParams& x, const ProductChoice& choice, const DeviceWeights& w,
                   Epilogue epilogue, Rows y, WorkspaceCursor* workspace) {
    ProductParams params = ParamsFor(w.layout);
    params.experts.weights[0] = w.data;
    params.num_tokens = static_cast<int>(choice.shape.num_tokens);
    params.x = x.out;
    params.prepares_row = choice.plan.row_chunks != 0;
    params.row = x;
    params.epilogue = epilogue;
    params.y = y.data;
    params.y_stride = y.stride;
    Multiply(choice, params, workspace);
  }

  // x: prepared for gate_up as PreparationForRows says.
  void MultiplyMlp(const PrepareParams& x, int64_t num_rows, const DeviceMlp& mlp, Rows y,
                   WorkspaceCursor* workspace) {
    const int64_t width = mlp.gate_up.layout.width();
    auto* activations = workspace->Take<float>(num_rows * width);
    MultiplyOne(x, ChooseForRows(mlp.gate_up.layout, num_rows), mlp.gate_up, Epilogue::kSwiGlu,
                {activations, width}, workspace);
    const ProductChoice down = ChooseForRows(mlp.down.layout, num_rows);
    const PrepareParams prepared =
        PrepareUnlessOwn({activations, width}, num_rows, mlp.down.layout, down, workspace);
    MultiplyOne(prepared, down, mlp.down, Epilogue::kStore, y, workspace);
  }

  const Planner planner_;
  const plan::WgmmaPlanner wgmma_planner_;
  const int num_multiprocessors_;
  Launcher* const launcher_;
};

// fn(first row, rows) for the passes of a call.
template <typename Fn>
void ForEachPass(int64_t num_rows, const Fn& fn) {
  for (int64_t first = 0; first < num_rows; first += plan::kMaxPassRows) {
    fn(first, std::min(plan::kMaxPassRows, num_rows - first));
  }
}

// The largest of fn(rows) over all numbers of rows that a pass of up to max_rows can have.
template <typename Fn>
int64_t LargestOfPasses(int64_t max_rows, const Fn& fn) {
  int64_t largest = 0;
  for (int64_t rows = 1; rows <= std::min(max_rows, plan::kMaxPassRows); ++rows) {
    largest = std::max(largest, fn(rows));
  }
  return largest;
}

}  // namespace wintserve::kernels::cuda
