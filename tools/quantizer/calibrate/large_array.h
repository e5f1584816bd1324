// Memory for matrices of hundreds of megabytes.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace wintserve::quantizer::calibrate {

// A matrix in an order of its own passes through the caches in pieces of a few lines, each of
// another page: in huge pages, where the system has them, their addresses are at hand.
//
// Floats that begin at a cache line, undefined at first. Move-only.
class LargeArray {
 public:
  LargeArray() = default;
  explicit LargeArray(int64_t size) {
    constexpr size_t kHugePage = size_t{2} << 20;
    constexpr size_t kLine = 64;
    const size_t bytes = static_cast<size_t>(size) * sizeof(float);
    const size_t alignment = bytes < kHugePage ? kLine : kHugePage;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<float*>(std::aligned_alloc(alignment, rounded)));
    if (data_ == nullptr) throw std::bad_alloc();
    // A hint: without huge pages it fails, and nothing but time is lost.
    if (alignment == kHugePage) ::madvise(data_.get(), rounded, MADV_HUGEPAGE);
  }

  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace wintserve::quantizer::calibrate
