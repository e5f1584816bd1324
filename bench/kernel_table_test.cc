#include "bench/kernel_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace wintserve::bench {
namespace {

TEST(ShortKernelName, DropsNamespacesAndParametersButNotTemplateArguments) {
  EXPECT_EQ(ShortKernelName("void wintserve::kernels::cuda::(anonymous namespace)::StreamKernel<"
                            "wintserve::kernels::cuda::Wint8Codec, 1>(wintserve::kernels::cuda::"
                            "ProductParams)"),
            "StreamKernel<Wint8Codec, 1>");
  EXPECT_EQ(ShortKernelName("ns::Kernel(void (*)(int), float)"), "Kernel");
  EXPECT_EQ(ShortKernelName("void ns::Kernel<(ns::Kind)1, true>(ns::Params const&)"),
            "Kernel<(Kind)1, true>");
  EXPECT_EQ(ShortKernelName("copy to the device"), "copy to the device");
}

TEST(KernelTable, GapsAndOverlapsAddUpToTheTimeFromFirstBeginToLastEnd) {
  // a: 100 … 200, b begins within a and ends at 260, a again behind a gap of 40, c within it.
  const KernelTable table =
      MakeKernelTable({{"b", 150, 260}, {"a", 100, 200}, {"c", 320, 340}, {"a", 300, 400}});
  ASSERT_EQ(table.rows.size(), 3u);
  EXPECT_EQ(table.count, 4);
  EXPECT_EQ(table.alone_ns + table.gap_ns, 400 - 100);
  EXPECT_EQ(table.gap_ns, 40);
  EXPECT_EQ(table.run_ns, 100 + 110 + 100 + 20);

  const KernelRow& a = table.rows[0];
  EXPECT_EQ(a.name, "a");
  EXPECT_EQ(a.count, 2);
  EXPECT_EQ(a.run_ns, 200);
  EXPECT_EQ(a.alone_ns, 200);
  EXPECT_EQ(a.gap_ns, 40);
  const KernelRow& b = table.rows[1];
  EXPECT_EQ(b.name, "b");
  EXPECT_EQ(b.run_ns, 110);
  EXPECT_EQ(b.alone_ns, 60);
  EXPECT_EQ(b.gap_ns, 0);
  const KernelRow& c = table.rows[2];
  EXPECT_EQ(c.run_ns, 20);
  EXPECT_EQ(c.alone_ns, 0);
}

TEST(KernelTable, TextIsOfOneStep) {
  const std::string text =
      KernelTableText(MakeKernelTable({{"a", 0, 4000}, {"a", 6000, 10000}}), /*num_steps=*/2);
  EXPECT_THAT(text,
              testing::HasSubstr("    1.0      4.00        4.0        4.0       1.0  100.0%  a\n"));
  EXPECT_THAT(KernelTableText(MakeKernelTable({}), 1), testing::HasSubstr("  all\n"));
}

}  // namespace
}  // namespace wintserve::bench
