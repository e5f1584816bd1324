// Which method makes the matrices of `wintserve quantize`: the one place that knows them all.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/matrix_quantizer.h"
#include "tools/quantizer/output/output_dir.h"
#include "tools/quantizer/output/source.h"

namespace wintserve::quantizer {

struct MethodOptions {
  formats::KOrder k_order = formats::KOrder::kMma64;
};

// What the method's results depend on, besides the source and the scheme. Errors: a file that
// cannot be read, by its name.
absl::StatusOr<RunIdentity> IdentityOf(const MethodOptions& options);

// Source, target and pool outlive the quantiser. Errors: whatever the method says before its first
// matrix.
absl::StatusOr<std::unique_ptr<MatrixQuantizer>> MakeQuantizer(const MethodOptions& options,
                                                               const Source& source,
                                                               const ModelConfig& target,
                                                               kernels::cpu::ThreadPool* pool);

}  // namespace wintserve::quantizer
