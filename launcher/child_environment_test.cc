#include "launcher/child_environment.h"

#include <gtest/gtest.h>

namespace wintserve {
namespace {

TEST(ChildEnvironment, HasWhatLoaderDriverAndLibrariesRead) {
  for (const char* name : {"PATH", "HOME", "TMPDIR", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD",
                           "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_DEBUG",
                           "OMP_NUM_THREADS", "GRPC_VERBOSITY", "TSAN_OPTIONS"}) {
    EXPECT_TRUE(IsForChildren(name)) << name;
  }
}

TEST(ChildEnvironment, HasNoKeyAndNothingUnknown) {
  for (const char* name :
       {"FD_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "http_proxy",
        "HTTPS_PROXY", "KUBERNETES_SERVICE_HOST", "PATHS", "MY_PATH", "cuda_visible_devices", ""}) {
    EXPECT_FALSE(IsForChildren(name)) << name;
  }
}

}  // namespace
}  // namespace wintserve
