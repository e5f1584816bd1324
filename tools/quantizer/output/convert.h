// Writes a quantised checkpoint: matrix by matrix from a quantiser to the disk.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/status/statusor.h"
#include "common/progress.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/matrix_quantizer.h"
#include "tools/quantizer/output/output_dir.h"
#include "tools/quantizer/output/source.h"
#include "tools/quantizer/output/tensor_plan.h"
#include "tools/quantizer/output/totals.h"

namespace wintserve::quantizer {

// Everything that a conversion works with; all of it outlives the call.
struct Conversion {
  const Source* source = nullptr;
  const ModelConfig* target = nullptr;  // as of PlanOutput
  const OutputPlan* plan = nullptr;
  formats::KOrder k_order = formats::KOrder::kMma64;  // of what `quantizer` makes
  MatrixQuantizer* quantizer = nullptr;
  kernels::cpu::ThreadPool* pool = nullptr;  // to measure errors
  OutputDir* output = nullptr;
  Progress* progress = nullptr;             // may be null
  const std::atomic<bool>* stop = nullptr;  // may be null
};

// Hands what an earlier run has made to the quantiser, makes the rest, and gives the output its
// name. Steps are committed at the end of each layer, and every minute within one.
// Returns what was made, by this run and those before.
// Errors: CANCELLED when `stop` became true; else those of the quantiser, with the matrix' name,
// the source and the output. All of them leave a directory that another run goes on from. Memory:
// besides the quantiser's, one packed tensor.
absl::StatusOr<Totals> Convert(const Conversion& conversion);

}  // namespace wintserve::quantizer
