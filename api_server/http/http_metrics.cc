#include "api_server/http/http_metrics.h"

#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace wintserve {
namespace {

const prometheus::Histogram::BucketBoundaries& DurationBuckets() {
  static const prometheus::Histogram::BucketBoundaries buckets = {
      .01, .025, .05, .075, .1, .25, .5, .75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60};
  return buckets;
}

std::string MethodLabel(std::string_view method) {
  for (const std::string_view known :
       {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"}) {
    if (method == known) return std::string(method);
  }
  return "OTHER";
}

const char* FailureReason(int status) {
  switch (status) {
    case 401:
      return "unauthorized";
    case 404:
      return "model_not_found";
    case 429:
      return "too_many_requests";
    case 503:
      return "unavailable";
    case 504:
      return "timeout";
    default:
      return status < 500 ? "invalid_request" : "internal";
  }
}

}  // namespace

struct HttpMetrics::Families {
  explicit Families(prometheus::Registry& registry)
      : requests(prometheus::BuildCounter()
                     .Name("http_requests_total")
                     .Help("Answered HTTP requests")
                     .Register(registry)),
        durations(prometheus::BuildHistogram()
                      .Name("http_request_duration_seconds")
                      .Help("From the end of a request's header to the end of its answer")
                      .Register(registry)),
        failures(prometheus::BuildCounter()
                     .Name("fastdeploy:request_failure_total")
                     .Help("Generation requests that ended in an error")
                     .Register(registry)),
        aborted(prometheus::BuildCounter()
                    .Name("fastdeploy:request_aborted_total")
                    .Help("Generation requests whose client went away")
                    .Register(registry)
                    .Add({})) {}

  prometheus::Family<prometheus::Counter>& requests;
  prometheus::Family<prometheus::Histogram>& durations;
  prometheus::Family<prometheus::Counter>& failures;
  prometheus::Counter& aborted;
};

HttpMetrics::HttpMetrics(std::shared_ptr<prometheus::Registry> registry)
    : registry_(std::move(registry)), families_(std::make_unique<Families>(*registry_)) {}

HttpMetrics::~HttpMetrics() = default;

void HttpMetrics::CountRequest(std::string_view method, std::string_view path_label, int status,
                               double duration_seconds) {
  const std::string method_label = MethodLabel(method);
  const std::string path(path_label);
  families_->requests
      .Add({{"method", method_label}, {"path", path}, {"status_code", std::to_string(status)}})
      .Increment();
  families_->durations.Add({{"method", method_label}, {"path", path}}, DurationBuckets())
      .Observe(duration_seconds);
}

void HttpMetrics::CountFailure(int status) {
  families_->failures.Add({{"reason", FailureReason(status)}}).Increment();
}

void HttpMetrics::CountAborted() { families_->aborted.Increment(); }

std::string HttpMetrics::Text() const {
  return prometheus::TextSerializer().Serialize(registry_->Collect());
}

}  // namespace wintserve
