#include "common/descriptor_shares.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

namespace wintserve {
namespace {

TEST(DescriptorShares, TogetherLeaveTheProcessWhatItNeeds) {
  for (const int64_t limit : {256, 1024, 4096, 65'536, 1 << 20}) {
    const DescriptorShares shares = ShareDescriptors(limit);
    EXPECT_LE(shares.http + 2 * shares.queue, limit - 128) << limit;
    EXPECT_GE(shares.http, limit / 4) << limit;
    EXPECT_GE(shares.queue, 16) << limit;
    EXPECT_LE(shares.queue, 1024) << limit;
  }
  // The usual limit has room for the default --max-concurrency.
  EXPECT_GE(ShareDescriptors(1024).http, 512);
  EXPECT_GT(ShareDescriptors(0).http, 0);
  EXPECT_GT(ShareDescriptors(0).queue, 0);
}

TEST(DescriptorShares, OfThisProcessFollowItsLimit) {
  rlimit limit = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit lower = {512, limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &lower), 0);
  EXPECT_EQ(OwnDescriptorShares().http, ShareDescriptors(512).http);
  EXPECT_EQ(OwnDescriptorShares().queue, ShareDescriptors(512).queue);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
}

}  // namespace
}  // namespace wintserve
