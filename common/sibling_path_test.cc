#include "common/sibling_path.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

TEST(SiblingPath, LiesBesideThisTest) {
  const auto path = SiblingPath("common_test");
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_TRUE(std::filesystem::exists(*path)) << *path;
  EXPECT_TRUE(path->is_absolute());
}

}  // namespace
}  // namespace wintserve
