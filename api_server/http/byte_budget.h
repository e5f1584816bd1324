// How much memory the bodies of all requests together may take.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

namespace wintserve {

// Thread-safe. Outlives its shares.
class ByteBudget {
 public:
  // Move-only; its destruction gives the bytes back.
  class Share {
   public:
    Share() = default;
    Share(Share&& other) noexcept
        : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Share& operator=(Share&&) = delete;
    ~Share() { ShrinkTo(0); }
    explicit operator bool() const { return budget_ != nullptr; }

    // Gives back what is beyond `bytes`.
    void ShrinkTo(int64_t bytes) {
      if (budget_ == nullptr || bytes >= bytes_) return;
      budget_->left_ += bytes_ - bytes;
      bytes_ = bytes;
    }

   private:
    friend class ByteBudget;
    Share(ByteBudget* budget, int64_t bytes) : budget_(budget), bytes_(bytes) {}
    ByteBudget* budget_ = nullptr;
    int64_t bytes_ = 0;
  };

  explicit ByteBudget(int64_t bytes) : left_(bytes) {}

  // An empty share: so much is not left.
  Share TryTake(int64_t bytes) {
    int64_t left = left_;
    while (left >= bytes) {
      if (left_.compare_exchange_weak(left, left - bytes)) return Share(this, bytes);
    }
    return Share();
  }

 private:
  std::atomic<int64_t> left_;
};

}  // namespace wintserve
