// Memory for matrices of hundreds of megabytes.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace wintserve::quantizer {
namespace calibrate {

// Memory for `size_bytes` that begins at a cache line, in huge pages where it fills them and the
// system has them; for std::free. Throws std::bad_alloc.
inline void* AllocateLarge(size_t size_bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  constexpr size_t kLine = 64;
  const size_t alignment = size_bytes < kHugePage ? kLine : kHugePage;
  const size_t rounded = (size_bytes + alignment - 1) / alignment * alignment;
  void* const data = std::aligned_alloc(alignment, rounded);
  if (data == nullptr) throw std::bad_alloc();
  // A hint: without huge pages it fails, and nothing but time is lost.
  if (alignment == kHugePage) ::madvise(data, rounded, MADV_HUGEPAGE);
  return data;
}

// A matrix in an order of its own passes through the caches in pieces of a few lines, each of
// another page: in huge pages, where the system has them, their addresses are at hand.
//
// Floats that begin at a cache line, undefined at first. Move-only.
class LargeArray {
 public:
  LargeArray() = default;
  explicit LargeArray(int64_t size)
      : data_(static_cast<float*>(AllocateLarge(static_cast<size_t>(size) * sizeof(float)))) {}

  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

// Leaves elements that are made without a value undefined.
template <typename Value>
struct LargeAllocator {
  using value_type = Value;
  LargeAllocator() = default;
  template <typename Other>
  LargeAllocator(const LargeAllocator<Other>&) {}  // NOLINT: containers convert

  Value* allocate(size_t count) {
    if (count > std::numeric_limits<size_t>::max() / 2 / sizeof(Value)) throw std::bad_alloc();
    return static_cast<Value*>(AllocateLarge(count * sizeof(Value)));
  }
  void deallocate(Value* data, size_t /*count*/) { std::free(data); }
  template <typename Other>
  void construct(Other* at) {
    ::new (static_cast<void*>(at)) Other;
  }
  template <typename Other, typename... Args>
  void construct(Other* at, Args&&... args) {
    ::new (static_cast<void*>(at)) Other(std::forward<Args>(args)...);
  }
  friend bool operator==(const LargeAllocator&, const LargeAllocator&) { return true; }
};

}  // namespace calibrate

// A vector whose resize(n) leaves new values undefined: whoever computes them touches them first,
// many threads at once. assign(n, 0) makes zeros, on one thread.
using LargeVector = std::vector<float, calibrate::LargeAllocator<float>>;

}  // namespace wintserve::quantizer
