#include "engine_worker/weights/matrix_reader.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {

MatrixReader::MatrixReader(const Checkpoint& checkpoint, std::vector<MatrixRef> refs, int rank,
                           int world_size, int num_threads)
    : checkpoint_(checkpoint),
      refs_(std::move(refs)),
      rank_(rank),
      world_size_(world_size),
      max_ahead_(std::min(num_threads, kMaxThreads)) {
  CHECK(num_threads >= 1, "num_threads={}", num_threads);
  for (size_t i = 0; i < max_ahead_; ++i) threads_.emplace_back([this] { ReadAhead(); });
}

MatrixReader::~MatrixReader() {
  {
    const MutexLock lock(&mutex_);
    stopping_ = true;
  }
  changed_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

absl::StatusOr<formats::HostMatrix> MatrixReader::Next(const MatrixRef& ref) {
  const MutexLock lock(&mutex_);
  CHECK(num_taken_ < refs_.size(), "all {} matrices are taken", refs_.size());
  const MatrixRef& next = refs_[num_taken_];
  CHECK(ref.role == next.role && ref.layer == next.layer && ref.expert == next.expert,
        "role={} layer={} expert={}", static_cast<int>(ref.role), ref.layer, ref.expert);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return done_.contains(num_taken_); });
  absl::StatusOr<formats::HostMatrix> matrix = std::move(done_.extract(num_taken_).mapped());
  ++num_taken_;
  changed_.NotifyAll();
  return matrix;
}

void MatrixReader::ReadAhead() {
  while (true) {
    size_t index = 0;
    {
      const MutexLock lock(&mutex_);
      changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS {
        return stopping_ || num_begun_ == refs_.size() || num_begun_ < num_taken_ + max_ahead_;
      });
      if (stopping_ || num_begun_ == refs_.size()) return;
      index = num_begun_++;
    }
    absl::StatusOr<formats::HostMatrix> matrix =
        checkpoint_.LoadMatrix(refs_[index], rank_, world_size_);
    {
      const MutexLock lock(&mutex_);
      done_.emplace(index, std::move(matrix));
    }
    changed_.NotifyAll();
  }
}

}  // namespace wintserve
