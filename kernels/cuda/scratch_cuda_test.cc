#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/scratch.h"

namespace wintserve::kernels::cuda {
namespace {

using ::testing::HasSubstr;

// Takes the device's memory but for less than kLeft bytes in one piece.
std::vector<DeviceBuffer> TakeAll() {
  constexpr int64_t kLeft = int64_t{4} << 20;
  std::vector<DeviceBuffer> taken;
  for (int64_t size = int64_t{1} << 40; size >= kLeft; size /= 2) {
    for (auto piece = DeviceBuffer::Allocate(size); piece.ok();
         piece = DeviceBuffer::Allocate(size)) {
      taken.push_back(*std::move(piece));
    }
  }
  return taken;
}

TEST(Scratch, GrowsAndSaysWhenThereIsNoRoom) {
  const Stream stream = *CreateStream();
  Scratch scratch;
  EXPECT_EQ(scratch.data(), nullptr);
  ASSERT_TRUE(scratch.Reserve(1000, stream.get()).ok());
  void* const first = scratch.data();
  EXPECT_NE(first, nullptr);
  ASSERT_TRUE(scratch.Reserve(10, stream.get()).ok());
  EXPECT_EQ(scratch.data(), first);
  const absl::Status too_large = scratch.Reserve(int64_t{1} << 50, stream.get());
  EXPECT_TRUE(absl::IsResourceExhausted(too_large)) << too_large;
  EXPECT_THAT(too_large.message(),
              HasSubstr("an operator needs 1125899906842624 bytes of scratch memory, 1000 before"));
  EXPECT_EQ(scratch.data(), nullptr);
  EXPECT_TRUE(scratch.Reserve(1000, stream.get()).ok());
}

TEST(Scratch, AFullDeviceFailsTheStepAndNotTheProcess) {
  constexpr int64_t kRows = 4096;
  constexpr int64_t kSize = 4096;  // the prepared activations alone are 32 MiB
  formats::DummyMatrix dummy;
  dummy.format = formats::WeightFormat::kWint8;
  dummy.k = kSize;
  dummy.n = kSize;
  dummy.num_ranges = 1;
  dummy.ranges[0] = {0, kSize};
  const auto backend = *CreateCudaBackend({});
  const auto matrix = *backend->MakeDummy(dummy, MatrixUse::kLinear);
  const auto x = *backend->Allocate(kRows * kSize * static_cast<int64_t>(sizeof(float)));
  const auto y = *backend->Allocate(kRows * kSize * static_cast<int64_t>(sizeof(float)));
  const auto multiply = [&](int64_t num_rows) {
    backend->Linear({static_cast<const float*>(x->data()), kSize}, num_rows, *matrix,
                    {static_cast<float*>(y->data()), kSize});
    return backend->Record()->Wait();
  };
  ASSERT_TRUE(multiply(1).ok());

  std::vector<DeviceBuffer> taken = TakeAll();
  const absl::Status failed = multiply(kRows);
  EXPECT_TRUE(absl::IsResourceExhausted(failed)) << failed;
  EXPECT_THAT(failed.message(), HasSubstr("bytes of scratch memory"));
  taken.clear();

  // What came after it is not to be trusted, until there is another backend.
  EXPECT_EQ(multiply(1), failed);
  float value = 0;
  EXPECT_EQ(backend->CopyToHost(&value, y->data(), sizeof(value)), failed);
  const auto captured = backend->Capture("one", [] { return absl::OkStatus(); });
  EXPECT_EQ(captured.status(), failed);
  const auto another = *CreateCudaBackend({});
  EXPECT_TRUE(another->Record()->Wait().ok());
}

}  // namespace
}  // namespace wintserve::kernels::cuda
