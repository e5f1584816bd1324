#include "engine_worker/weights/matrix_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <optional>

namespace wintserve {
namespace {

// Matrices [layer + 1, 1]; counts what is unpacked and not yet taken.
class CountingCheckpoint final : public Checkpoint {
 public:
  absl::StatusOr<formats::HostMatrix> LoadMatrix(const MatrixRef& ref, int rank,
                                                 int world_size) const override {
    EXPECT_EQ(rank, 1);
    EXPECT_EQ(world_size, 2);
    const int ahead = ++num_begun_ - num_taken_;
    int largest = most_ahead_;
    while (ahead > largest && !most_ahead_.compare_exchange_weak(largest, ahead)) {
    }
    // Later matrices are done first.
    std::this_thread::sleep_for(std::chrono::microseconds(ref.layer % 4 == 0 ? 300 : 10));
    if (ref.layer == bad_layer) return absl::DataLossError("a bad tensor");
    return formats::MakeHostMatrix(formats::WeightFormat::kBfloat16, ref.layer + 1, 1);
  }
  MatrixBytes BytesOf(const MatrixRef& ref, int, int) const override {
    return ref.layer == big_layer ? MatrixBytes{big_bytes, big_bytes} : MatrixBytes{};
  }
  absl::StatusOr<std::vector<float>> LoadVector(VectorRole, int) const override {
    return std::vector<float>();
  }
  bool head_is_tied() const override { return false; }
  bool has_router_bias() const override { return false; }
  formats::KOrder k_order() const override { return formats::KOrder::kMma64; }
  uint64_t digest() const override { return 0; }
  int64_t total_bytes() const override { return 0; }

  void Taken() { ++num_taken_; }
  int num_begun() const { return num_begun_; }
  int most_ahead() const { return most_ahead_; }

  int bad_layer = -1;
  int big_layer = -1;
  int64_t big_bytes = 0;

 private:
  mutable std::atomic<int> num_begun_{0};
  mutable std::atomic<int> most_ahead_{0};
  std::atomic<int> num_taken_{0};
};

std::vector<MatrixRef> Refs(int count) {
  std::vector<MatrixRef> refs;
  for (int i = 0; i < count; ++i) refs.push_back({MatrixRole::kOutput, i});
  return refs;
}

TEST(MatrixReader, HandsOutMatricesInOrderWhateverIsDoneFirst) {
  for (const int threads : {1, 2, 3, 8, 20}) {
    SCOPED_TRACE(threads);
    const CountingCheckpoint checkpoint;
    MatrixReader reader(checkpoint, Refs(50), 1, 2, threads);
    for (const MatrixRef& ref : Refs(50)) {
      const auto matrix = reader.Next(ref);
      ASSERT_TRUE(matrix.ok());
      EXPECT_EQ(matrix->k, ref.layer + 1);
    }
  }
}

TEST(MatrixReader, HoldsAtMostOneMatrixAThread) {
  CountingCheckpoint checkpoint;
  MatrixReader reader(checkpoint, Refs(60), 1, 2, 3);
  for (const MatrixRef& ref : Refs(60)) {
    checkpoint.Taken();  // before it is, since a thread may begin another at once
    ASSERT_TRUE(reader.Next(ref).ok());
    if (ref.layer % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_LE(checkpoint.most_ahead(), 3);
  EXPECT_GE(checkpoint.most_ahead(), 2);
}

TEST(MatrixReader, ReadsNothingAheadOfAMatrixThatIsAsLargeAsALayerMayBe) {
  CountingCheckpoint checkpoint;
  checkpoint.big_layer = 5;
  checkpoint.big_bytes = 1000;  // 2000 while it is read: more than the 1000 that a layer is on disk
  MatrixReader reader(checkpoint, Refs(10), 1, 2, 4);
  for (const MatrixRef& ref : Refs(5)) ASSERT_TRUE(reader.Next(ref).ok());
  ASSERT_TRUE(reader.Next({MatrixRole::kOutput, 5}).ok());
  // Whoever reads ahead in spite of it has time to.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(checkpoint.num_begun(), 6);
  ASSERT_TRUE(reader.Next({MatrixRole::kOutput, 6}).ok());
}

TEST(MatrixReader, AnErrorComesInTheTurnOfItsMatrix) {
  CountingCheckpoint checkpoint;
  checkpoint.bad_layer = 2;
  MatrixReader reader(checkpoint, Refs(10), 1, 2, 4);
  EXPECT_TRUE(reader.Next({MatrixRole::kOutput, 0}).ok());
  EXPECT_TRUE(reader.Next({MatrixRole::kOutput, 1}).ok());
  EXPECT_EQ(reader.Next({MatrixRole::kOutput, 2}).status(), absl::DataLossError("a bad tensor"));
}

TEST(MatrixReader, EndsWithMatricesThatNobodyTook) {
  const CountingCheckpoint checkpoint;
  for (int run = 0; run < 20; ++run) {
    MatrixReader reader(checkpoint, Refs(10), 1, 2, 4);
    EXPECT_TRUE(reader.Next({MatrixRole::kOutput, 0}).ok());
  }
}

}  // namespace
}  // namespace wintserve
