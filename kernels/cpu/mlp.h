// SwiGLU MLPs over sorted rows: one dense MLP or the experts of a MoE layer.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/thread_pool.h"

namespace wintserve::kernels::cpu {

// One MLP and the rows that visit it.
struct MlpRun {
  const PackedMatrix* gate_up = nullptr;
  const PackedMatrix* down = nullptr;
  std::span<const int32_t> tokens;  // rows of x and y, ascending
  const float* weights = nullptr;   // one a token; null: 1
};

// Sorts a batch's (token, expert) pairs by expert. Reused from call to call to spare allocations.
class ExpertSorter {
 public:
  // expert_ids, expert_weights [num_rows, top_k]. Entry e of the result lists e's tokens in
  // ascending order; the spans live until the next call.
  struct Expert {
    std::span<const int32_t> tokens;
    std::span<const float> weights;
  };
  std::span<const Expert> Sort(int64_t num_rows, int top_k, int num_experts,
                               const int32_t* expert_ids, const float* expert_weights);

 private:
  std::vector<int32_t> begin_;
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<Expert> experts_;
};

// y[t, :] = sum over the runs that hold t, in the order of `runs`, of weight * mlp(x[t, :]).
// Two parallel loops: gate-up tiles of all runs with SiLU, then down tiles of y with the sum.
// Each run's weights are decoded once per loop (per 256 rows of large batches).
void RunMlps(ConstRows x, int64_t num_tokens, std::span<const MlpRun> runs, Rows y,
             ThreadPool* pool, Scratch* scratch);

}  // namespace wintserve::kernels::cpu
