#include "kernels/cpu/mlp.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/row_ops.h"
#include "kernels/cpu/work_split.h"

namespace wintserve::kernels::cpu {
namespace {

// A run's place in the first loop's items and in the activations.
struct RunPlan {
  int64_t first_item = 0;
  int64_t num_chunks = 0;  // of kMaxItemRows rows
  float* activations = nullptr;
  int64_t stride = 0;
};

struct Plan {
  std::vector<RunPlan> runs;
  int64_t num_items = 0;
  int64_t multiply_adds = 0;
};

Plan MakePlan(std::span<const MlpRun> runs, int64_t num_tokens, Scratch* scratch) {
  Plan plan;
  plan.runs.resize(runs.size());
  int64_t num_floats = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto num_rows = static_cast<int64_t>(runs[i].tokens.size());
    RunPlan& run = plan.runs[i];
    run.first_item = plan.num_items;
    run.num_chunks = CeilDiv(num_rows, kMaxItemRows);
    run.stride = PaddedStride(runs[i].gate_up->width_tiles() * kTileColumns);
    num_floats += num_rows * run.stride;
    plan.num_items += run.num_chunks * runs[i].gate_up->width_tiles();
    plan.multiply_adds += num_rows * runs[i].gate_up->k() * runs[i].gate_up->n();
  }
  float* next = scratch->ReserveForRows(num_tokens, num_floats, &scratch->activations);
  for (size_t i = 0; i < runs.size(); ++i) {
    plan.runs[i].activations = next;
    next += static_cast<int64_t>(runs[i].tokens.size()) * plan.runs[i].stride;
  }
  return plan;
}

void GateUpItem(ConstRows x, const MlpRun& run, const RunPlan& plan, int64_t item,
                ThreadScratch* scratch) {
  const int64_t pair = item / plan.num_chunks;
  const int64_t first = item % plan.num_chunks * kMaxItemRows;
  const int64_t rows = std::min(kMaxItemRows, static_cast<int64_t>(run.tokens.size()) - first);
  for (int64_t r = 0; r < rows; ++r) scratch->x_rows[r] = x.row(run.tokens[first + r]);
  float* gate = scratch->tile_data(0);
  float* up = scratch->tile_data(1);
  float* panel = scratch->panel_data();
  MatmulTile(*run.gate_up, 2 * pair, scratch->x_rows, rows, panel, gate, kTileColumns);
  MatmulTile(*run.gate_up, 2 * pair + 1, scratch->x_rows, rows, panel, up, kTileColumns);
  SwiGluTile(gate, up, rows, plan.activations + first * plan.stride + pair * kTileColumns,
             plan.stride);
}

// Adds one run's share to columns [32 * tile, …) of y for tokens token_begin … token_end - 1.
void AddDownTile(const MlpRun& run, const RunPlan& plan, int64_t tile, int32_t token_begin,
                 int32_t token_end, Rows y, ThreadScratch* scratch) {
  const auto position = [&](int32_t token) {
    return std::lower_bound(run.tokens.begin(), run.tokens.end(), token) - run.tokens.begin();
  };
  const int64_t begin = position(token_begin);
  const int64_t end = position(token_end);
  const int64_t column = tile * kTileColumns;
  const int64_t columns = std::min<int64_t>(kTileColumns, run.down->n() - column);
  float* out = scratch->tile_data(0);
  for (int64_t first = begin; first < end; first += kMaxItemRows) {
    const int64_t rows = std::min(kMaxItemRows, end - first);
    for (int64_t r = 0; r < rows; ++r) {
      scratch->x_rows[r] = plan.activations + (first + r) * plan.stride;
    }
    MatmulTile(*run.down, tile, scratch->x_rows, rows, scratch->panel_data(), out, kTileColumns);
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = run.weights == nullptr ? 1.0f : run.weights[first + r];
      AccumulateScaled(weight, out + r * kTileColumns, columns,
                       y.row(run.tokens[first + r]) + column);
    }
  }
}

}  // namespace

std::span<const ExpertSorter::Expert> ExpertSorter::Sort(int64_t num_rows, int top_k,
                                                         int num_experts, const int32_t* expert_ids,
                                                         const float* expert_weights) {
  const int64_t num_pairs = num_rows * top_k;
  begin_.assign(num_experts + 1, 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++begin_[expert_ids[i] + 1];
  for (int e = 0; e < num_experts; ++e) begin_[e + 1] += begin_[e];
  tokens_.resize(num_pairs);
  weights_.resize(num_pairs);
  experts_.resize(num_experts);
  for (int e = 0; e < num_experts; ++e) {
    const size_t begin = begin_[e];
    const size_t count = begin_[e + 1] - begin_[e];
    experts_[e] = {std::span(tokens_).subspan(begin, count),
                   std::span(weights_).subspan(begin, count)};
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int32_t place = begin_[expert_ids[i]]++;
    tokens_[place] = static_cast<int32_t>(i / top_k);
    weights_[place] = expert_weights[i];
  }
  return experts_;
}

void RunMlps(ConstRows x, int64_t num_tokens, std::span<const MlpRun> runs, Rows y,
             ThreadPool* pool, Scratch* scratch) {
  const Plan plan = MakePlan(runs, num_tokens, scratch);
  const auto gate_up_item = [&](int64_t item, int thread) {
    const auto next =
        std::upper_bound(plan.runs.begin(), plan.runs.end(), item,
                         [](int64_t value, const RunPlan& run) { return value < run.first_item; });
    const size_t i = next - plan.runs.begin() - 1;
    GateUpItem(x, runs[i], plan.runs[i], item - plan.runs[i].first_item, &scratch->threads[thread]);
  };
  pool->Run(plan.num_items, plan.multiply_adds, gate_up_item);

  const int64_t num_columns = runs.front().down->n();
  const int64_t num_tiles = runs.front().down->num_tiles();
  const int64_t item_tokens = PickItemRows(num_tiles, num_tokens, pool->num_threads(), num_tokens);
  const auto down_item = [&](int64_t item, int thread) {
    const int64_t tile = item % num_tiles;
    const auto begin = static_cast<int32_t>(item / num_tiles * item_tokens);
    const auto end = static_cast<int32_t>(std::min(begin + item_tokens, num_tokens));
    const int64_t column = tile * kTileColumns;
    const int64_t columns = std::min<int64_t>(kTileColumns, num_columns - column);
    for (int32_t t = begin; t < end; ++t) {
      std::memset(y.row(t) + column, 0, columns * sizeof(float));
    }
    for (size_t i = 0; i < runs.size(); ++i) {
      AddDownTile(runs[i], plan.runs[i], tile, begin, end, y, &scratch->threads[thread]);
    }
  };
  pool->Run(num_tiles * CeilDiv(num_tokens, item_tokens), plan.multiply_adds / 2, down_item);
}

}  // namespace wintserve::kernels::cpu
