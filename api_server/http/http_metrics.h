// The metrics that the HTTP room measures.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace prometheus {
class Registry;
}

namespace wintserve {

// Thread-safe.
class HttpMetrics {
 public:
  explicit HttpMetrics(std::shared_ptr<prometheus::Registry> registry);
  ~HttpMetrics();

  // One answered request. path_label is a route's template; methods that HTTP does not define count
  // as "OTHER", so that no label comes from a client.
  void CountRequest(std::string_view method, std::string_view path_label, int status,
                    double duration_seconds);
  // A generation request answered with an error status (or broken by one mid-stream).
  void CountFailure(int status);
  // A generation request whose client went away.
  void CountAborted();

  // Everything in the registry as Prometheus text.
  std::string Text() const;

 private:
  struct Families;
  const std::shared_ptr<prometheus::Registry> registry_;
  const std::unique_ptr<Families> families_;
};

}  // namespace wintserve
