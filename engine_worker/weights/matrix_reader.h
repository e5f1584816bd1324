// Unpacks the matrices of a checkpoint ahead of their use: while one is packed for a device, the
// next ones are read from the disk and unpacked.
#pragma once

#include <cstdint>
#include <map>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "common/mutex.h"
#include "engine_worker/weights/checkpoint.h"

namespace wintserve {

// Threading: one thread calls Next.
// Memory:    at most one matrix for each of the reader's threads besides the one that the caller
//            has and will have until its next call; and all of them together, their pages on disk
//            included, no more than the model's largest layer on disk, or a single matrix.
class MatrixReader {
 public:
  // More would not be faster than a disk or the packing, and each costs a matrix of memory.
  static constexpr int kMaxThreads = 8;

  // Begins to read. The checkpoint outlives the reader. num_threads >= 1; kMaxThreads at most run.
  MatrixReader(const Checkpoint& checkpoint, std::vector<MatrixRef> refs, int rank, int world_size,
               int num_threads);
  // Waits for the matrices that are being read.
  ~MatrixReader();
  MatrixReader(const MatrixReader&) = delete;
  MatrixReader& operator=(const MatrixReader&) = delete;

  // The matrices in the order of `refs`, or Checkpoint::LoadMatrix' error for the one whose turn it
  // is. REQUIRES: `ref` is the next one.
  absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref) EXCLUDES(mutex_);

 private:
  void ReadAhead() EXCLUDES(mutex_);
  bool MayBegin() const REQUIRES(mutex_);

  const Checkpoint& checkpoint_;
  const std::vector<MatrixRef> refs_;
  const int rank_;
  const int world_size_;
  const size_t max_ahead_;
  std::vector<int64_t> bytes_;  // of each matrix, while it is read
  int64_t max_bytes_ = 0;
  Mutex mutex_;
  CondVar changed_;
  size_t num_begun_ GUARDED_BY(mutex_) = 0;
  size_t num_taken_ GUARDED_BY(mutex_) = 0;
  int64_t bytes_begun_ GUARDED_BY(mutex_) = 0;  // of those that are begun and not taken
  int64_t bytes_lent_ GUARDED_BY(mutex_) = 0;   // of the one that the caller has
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::map<size_t, absl::StatusOr<formats::HostMatrix>> done_ GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace wintserve
