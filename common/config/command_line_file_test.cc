#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "common/config/command_line_test_util.h"
#include "common/exit_code.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Parse;
using testing::Serve;

// A file that lives as long as the object.
class TempFile {
 public:
  explicit TempFile(const std::string& text)
      : path_(::testing::TempDir() +
              fmt::format("command_line_file_test.{}.{}.yaml", ::getpid(), ++num_files_)) {
    std::ofstream(path_, std::ios::binary) << text;
  }
  ~TempFile() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  static inline int num_files_ = 0;
  std::string path_;
};

TEST(ConfigFile, SetsWhatTheFlagsLeaveOpen) {
  const TempFile file(
      "# comment\n"
      "max_num_seqs: 5\n"
      "max-model-len: 512   # dashes too\n"
      "port: 9000\n"
      "strict_model_name: yes\n"
      "api_key: [k1, k2]\n"
      "served_model_name:\n"
      "  - a\n"
      "  - b\n"
      "metrics_port: null\n"
      "graph_optimization_config:\n"
      "  use_cudagraph: true\n"
      "device: cuda\n");
  const CommandLine command =
      Serve({"--port", "9001", "--config", file.path()}, {{"FD_API_KEY", "e"}});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.options.port, 9001) << "the flag wins";
  EXPECT_EQ(command.options.max_num_seqs, 5);
  EXPECT_EQ(command.options.max_model_len, 512);
  EXPECT_TRUE(command.options.strict_model_name);
  EXPECT_THAT(command.options.api_keys, ElementsAre("k1", "k2"));
  EXPECT_THAT(command.options.served_model_name, ElementsAre("a", "b"));
  EXPECT_FALSE(command.options.metrics_port.has_value());
  EXPECT_TRUE(command.options.use_cudagraph);
}

TEST(ConfigFile, AnEmptyFileSetsNothing) {
  const TempFile file("# nothing\n");
  EXPECT_EQ(Serve({"--config", file.path()}).error, "");
}

TEST(ConfigFile, OneFileServesBothVerbs) {
  const TempFile file("port: 9000\nmax_model_len: 512\n");
  const CommandLine command = Parse({"generate", "--prompt=x", "--config", file.path()});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.options.max_model_len, 512);
}

TEST(ConfigFile, OneLineSaysWhatIsWrongAndWhere) {
  struct Case {
    const char* text;
    const char* expected;  // after the file's name
  };
  const Case cases[] = {
      {"model: m\nprot: 1\n", ":2: prot: unknown key (did you mean port?)"},
      {"model: m\n\nport: 99999999\n", ":3: port: must be 0..65535 (got 99999999)"},
      {"max_num_seqs: many\n", ":1: max_num_seqs: must be an integer, 1..256 (got many)"},
      {"port: [1, 2]\n", ":1: port: must be one value, not a list"},
      {"port: 1\nport: 2\n", ":2: port: given twice, first on line 1"},
      {"max_num_seqs: 1\nmax-num-seqs: 2\n", ":2: max-num-seqs: given twice, first on line 1"},
      {"config: x\n", ":1: config: unknown key"},
      {"prompt: x\n", ":1: prompt: unknown key"},
      {"- a\n- b\n", ":1: must be a mapping"},
      {"just text\n", ":1: must be a mapping"},
      {"port: [1\n", ":2: "},
      {"port: {a: 1}\n", ":1: port: must be an integer, 0..65535 (got {\"a\":1})"},
      {"api_key: [[1]]\n", ":1: api_key: a list may hold plain values only"},
      {"x: &x [1, 2]\nport: &all {a: *all}\n", ":2: port: more than 100000 values"},
      {"a: &a [0,0,0,0,0,0,0,0,0,0]\nb: &b {p: *a, q: *a, r: *a, s: *a, t: *a, u: *a, v: *a}\n"
       "c: &c {p: *b, q: *b, r: *b, s: *b, t: *b, u: *b, v: *b}\n"
       "d: &d {p: *c, q: *c, r: *c, s: *c, t: *c, u: *c, v: *c}\n"
       "e: &e {p: *d, q: *d, r: *d, s: *d, t: *d, u: *d, v: *d}\n"
       "f: {p: *e, q: *e, r: *e, s: *e, t: *e, u: *e, v: *e}\n",
       ":6: f: more than 100000 values"},
      {"[1, 2]: 3\n", ":1: a key must be the name of a setting"},
      {"model: \xff\xfe\n", "must be UTF-8"},
      {"max_num_seqs: 9\nmax_num_batched_tokens: 8\n",
       ":2: max_num_batched_tokens: must be at least --max-num-seqs, 9 (got 8)"},
      {"enable_chunked_prefill: false\nmax_num_partial_prefills: 4\n",
       ":2: max_num_partial_prefills: has nothing to work on with --no-enable-chunked-prefill"},
      {"cache_queue_port: 8000\n", ":1: cache_queue_port: must differ from --port (both 8000)"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    const TempFile file(c.text);
    const CommandLine command = Serve({"--config", file.path()});
    EXPECT_EQ(command.exit_code, kExitConfigFile);
    EXPECT_THAT(command.error, ::testing::StartsWith("error: " + file.path() + ":"));
    EXPECT_THAT(command.error, HasSubstr(c.expected));
    EXPECT_EQ(command.error.find('\n'), std::string::npos);
  }
}

TEST(ConfigFile, AFileThatCannotBeReadIsNamed) {
  const CommandLine missing = Serve({"--config", "no/such.yaml"});
  EXPECT_EQ(missing.exit_code, kExitConfigFile);
  EXPECT_EQ(missing.error, "error: no/such.yaml: No such file or directory");
  EXPECT_THAT(Serve({"--config", "/"}).error, HasSubstr("is a directory"));
  EXPECT_THAT(Serve({"--config", "/dev/zero"}).error, HasSubstr("is longer than"));
}

}  // namespace
}  // namespace wintserve
