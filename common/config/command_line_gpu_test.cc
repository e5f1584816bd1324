#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/config/command_line_test_util.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using testing::ExpectOneLineError;
using ::testing::IsEmpty;
using testing::Serve;

TEST(CommandLine, AGpuHasItsOwnDefaults) {
  const CommandLine command = Serve({"--device=cuda"});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.options.max_num_seqs, 128);
  EXPECT_EQ(command.options.max_num_batched_tokens, 8192);
  EXPECT_EQ(Serve({"--device=cuda", "--max-num-seqs=7"}).options.max_num_seqs, 7);
  EXPECT_EQ(Serve({"--device=cuda", "--kv-cache-dtype=int8"}).options.kv_cache_dtype, "int8");
  EXPECT_EQ(Serve({"--device=cuda", "--max-num-batched-tokens=99", "--max-num-seqs=7"})
                .options.max_num_batched_tokens,
            99);
}

TEST(CommandLine, CudaGraphsAreOnOnAGpuUnlessTheyAreSwitchedOff) {
  EXPECT_TRUE(Serve({"--device=cuda"}).options.use_cudagraph);
  EXPECT_THAT(Serve({"--device=cuda"}).notes, IsEmpty());
  EXPECT_THAT(Serve({"--device=cuda", "--use-cudagraph"}).notes, IsEmpty());
  EXPECT_TRUE(Serve({"--device", "cuda", "--use-cudagraph"}).options.use_cudagraph);
  EXPECT_TRUE(Serve({"--device=cuda", R"(--graph-optimization-config={"use_cudagraph":true})"})
                  .options.use_cudagraph);
  EXPECT_FALSE(Serve({"--device=cuda", "--no-use-cudagraph"}).options.use_cudagraph);
  EXPECT_FALSE(Serve({"--device=cuda", R"(--graph-optimization-config={"use_cudagraph":false})"})
                   .options.use_cudagraph);
  EXPECT_TRUE(Serve({"--device=cuda", R"(--graph-optimization-config={"graph_opt_level":0})"})
                  .options.use_cudagraph);
  EXPECT_FALSE(Serve({}).options.use_cudagraph);
  EXPECT_THAT(Serve({}).notes, IsEmpty());
}

TEST(CommandLine, TheShareOfAGpusMemory) {
  EXPECT_EQ(Serve({"--device=cuda"}).options.gpu_memory_utilization, 0.92);
  const CommandLine gpu = Serve({"--device=cuda", "--gpu-memory-utilization=0.85"});
  EXPECT_EQ(gpu.options.gpu_memory_utilization, 0.85);
  EXPECT_THAT(gpu.notes, IsEmpty());
  EXPECT_THAT(Serve({"--gpu-memory-utilization=0.85"}).notes,
              ElementsAre("--gpu-memory-utilization: there is no GPU on --device cpu; ignored"));
  EXPECT_EQ(Serve({"--num-gpu-blocks-override", "99"}).options.num_gpu_blocks_override, 99);
}

TEST(CommandLine, OneLineSaysWhatIsWrongAboutADevice) {
  ExpectOneLineError({"--device", "tpu"}, "error: --device: must be one of cpu, cuda (got tpu)");
  ExpectOneLineError({"--kv-cache-dtype", "fp8"},
                     "error: --kv-cache-dtype: must be one of auto, bfloat16, int8 (got fp8)");
  ExpectOneLineError(
      {"--kv-cache-dtype", "int8"},
      "error: --kv-cache-dtype: must be auto, which is float32, on --device cpu (got int8)");
  ExpectOneLineError({"--gpu-memory-utilization", "1.5"}, "must be 0..1 (got 1.5)");
  ExpectOneLineError({"--gpu-memory-utilization", "nan"}, "must be 0..1 (got nan)");
}

}  // namespace
}  // namespace wintserve
