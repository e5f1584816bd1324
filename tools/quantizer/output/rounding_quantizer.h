// Quantises every matrix for itself, by its weights alone.
#pragma once

#include <memory>
#include <vector>

#include "engine_worker/weights/matrix_reader.h"
#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/encode/encode.h"
#include "tools/quantizer/matrix_quantizer.h"

namespace wintserve::quantizer {

// Memory: the matrix that is worked on as read, as float32 and as made, and NumReadAhead matrices
//         as read. All cores work on one matrix, so that their number costs no memory.
class RoundingQuantizer final : public MatrixQuantizer {
 public:
  // How many matrices are read while one is worked on, so that the disk is never waited for: 1
  // to 4.
  static int NumReadAhead(int num_threads);

  // `config` says whether the head is tied. Checkpoint and pool outlive the quantiser.
  RoundingQuantizer(const ModelConfig& config, const Checkpoint& checkpoint,
                    const Wint2Options& wint2, kernels::cpu::ThreadPool* pool);

  absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref, StoredFormat format) override;
  absl::Status Replay(const MatrixRef& ref, formats::HostMatrix done) override;
  const formats::HostMatrix* source() const override { return source_.k == 0 ? nullptr : &source_; }

 private:
  // source_ as float32, in weights_.
  FloatMatrix Widen();

  const Checkpoint& checkpoint_;
  const Wint2Options wint2_;
  kernels::cpu::ThreadPool* const pool_;
  const std::vector<MatrixRef> refs_;
  size_t num_replayed_ = 0;
  std::unique_ptr<MatrixReader> reader_;  // from the first Next on
  formats::HostMatrix source_;
  std::vector<float> weights_;
};

}  // namespace wintserve::quantizer
