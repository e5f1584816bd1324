#include "engine_worker/weights/matrix_reader.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

// Tables stand for a layer of their own.
int LayerOf(const MatrixRef& ref) {
  if (ref.role == MatrixRole::kEmbedding) return -1;
  return ref.role == MatrixRole::kHead ? -2 : ref.layer;
}

}  // namespace

MatrixReader::MatrixReader(const Checkpoint& checkpoint, std::vector<MatrixRef> refs, int rank,
                           int world_size, int num_threads)
    : checkpoint_(checkpoint),
      refs_(std::move(refs)),
      rank_(rank),
      world_size_(world_size),
      max_ahead_(std::min(num_threads, kMaxThreads)) {
  CHECK(num_threads >= 1, "num_threads={}", num_threads);
  std::map<int, int64_t> layers;
  for (const MatrixRef& ref : refs_) {
    const MatrixBytes bytes = checkpoint.BytesOf(ref, rank, world_size);
    bytes_.push_back(bytes.on_disk + bytes.on_host);
    int64_t& layer = layers[LayerOf(ref)];
    layer += bytes.on_disk;
    max_bytes_ = std::max(max_bytes_, layer);
  }
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
  bytes_lent_ = 0;
  changed_.NotifyAll();
  CHECK(num_taken_ < refs_.size(), "all {} matrices are taken", refs_.size());
  const MatrixRef& next = refs_[num_taken_];
  CHECK(ref.role == next.role && ref.layer == next.layer && ref.expert == next.expert,
        "role={} layer={} expert={}", static_cast<int>(ref.role), ref.layer, ref.expert);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return done_.contains(num_taken_); });
  absl::StatusOr<formats::HostMatrix> matrix = std::move(done_.extract(num_taken_).mapped());
  bytes_begun_ -= bytes_[num_taken_];
  bytes_lent_ = bytes_[num_taken_];
  ++num_taken_;
  changed_.NotifyAll();
  return matrix;
}

// The one that the caller waits for is begun in any case.
bool MatrixReader::MayBegin() const {
  if (num_begun_ == num_taken_ && bytes_lent_ == 0) return true;
  return num_begun_ < num_taken_ + max_ahead_ &&
         bytes_lent_ + bytes_begun_ + bytes_[num_begun_] <= max_bytes_;
}

void MatrixReader::ReadAhead() {
  while (true) {
    size_t index = 0;
    {
      const MutexLock lock(&mutex_);
      changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS {
        return stopping_ || num_begun_ == refs_.size() || MayBegin();
      });
      if (stopping_ || num_begun_ == refs_.size()) return;
      index = num_begun_++;
      bytes_begun_ += bytes_[index];
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
