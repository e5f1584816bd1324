#include "bench/stream_client.h"

#include <fmt/format.h>
#include <httplib.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace wintserve::bench {
namespace {

using nlohmann::json;

void TakeUsage(const json& usage, StreamResult* result) {
  result->num_prompt_tokens = usage.at("prompt_tokens");
  result->num_completion_tokens = usage.at("completion_tokens");
  if (usage.contains("prompt_tokens_details")) {
    result->num_cached_tokens = usage.at("prompt_tokens_details").value("cached_tokens", 0);
  }
}

// Takes one event ("data: …" or ": comment") out of the stream.
void TakeEvent(std::string_view event, Clock::time_point now, StreamResult* result,
               const std::function<void()>& on_event) {
  if (event.starts_with(":")) {
    ++result->num_comments;
    return;
  }
  if (!event.starts_with("data: ")) return;
  event.remove_prefix(6);
  if (event == "[DONE]") {
    result->ended = true;
    return;
  }
  const json body = json::parse(event);
  if (body.contains("error")) {
    result->error = body.at("error").dump();
    return;
  }
  if (body.at("choices").empty()) return TakeUsage(body.at("usage"), result);
  result->arrivals.push_back(now);
  if (on_event) on_event();
}

httplib::Request Prepare(const json& body, httplib::Client* client) {
  client->set_connection_timeout(30);
  client->set_read_timeout(600);
  client->set_tcp_nodelay(true);
  httplib::Request request;
  request.method = "POST";
  request.path = "/v1/completions";
  request.set_header("Content-Type", "application/json");
  request.body = body.dump();
  return request;
}

}  // namespace

double StreamResult::seconds_to_first() const { return Seconds(arrivals.front() - sent); }

std::vector<double> StreamResult::gaps() const {
  std::vector<double> out;
  for (size_t i = 1; i < arrivals.size(); ++i) {
    out.push_back(Seconds(arrivals[i] - arrivals[i - 1]));
  }
  return out;
}

StreamResult RunStream(const Target& target, json body, const std::atomic<bool>* stop,
                       const std::function<void()>& on_event) {
  body["stream"] = true;
  body["stream_options"] = {{"include_usage", true}};
  StreamResult result;
  std::string buffer;
  httplib::Client client(target.host, target.port);
  httplib::Request request = Prepare(body, &client);
  request.response_handler = [&](const httplib::Response& response) {
    result.status = response.status;
    result.retry_after = response.get_header_value("Retry-After");
    return true;
  };
  request.content_receiver = [&](const char* data, size_t length, uint64_t, uint64_t) {
    const auto now = Clock::now();
    buffer.append(data, length);
    if (result.status != 200) return true;
    size_t begin = 0;
    for (size_t end; (end = buffer.find("\n\n", begin)) != std::string::npos; begin = end + 2) {
      TakeEvent(std::string_view(buffer).substr(begin, end - begin), now, &result, on_event);
    }
    buffer.erase(0, begin);
    return stop == nullptr || !*stop;
  };
  result.sent = Clock::now();
  const httplib::Result response = client.send(request);
  if (result.status != 0 && result.status != 200) result.error = buffer;
  return result;
}

StreamResult RunWhole(const Target& target, json body) {
  StreamResult result;
  httplib::Client client(target.host, target.port);
  httplib::Request request = Prepare(body, &client);
  result.sent = Clock::now();
  const httplib::Result response = client.send(request);
  if (!response) return result;
  result.status = response->status;
  result.retry_after = response->get_header_value("Retry-After");
  if (result.status != 200) {
    result.error = response->body;
    return result;
  }
  const json answer = json::parse(response->body);
  TakeUsage(answer.at("usage"), &result);
  result.ended = !answer.at("choices").at(0).at("finish_reason").is_null();
  return result;
}

std::vector<int> RandomPrompt(int num_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int> prompt(num_tokens);
  for (int& id : prompt) id = 300 + static_cast<int>(random() % 7000);
  return prompt;
}

std::map<std::string, double> ReadMetrics(const Target& target) {
  httplib::Client client(target.host, target.metrics_port);
  client.set_read_timeout(30);
  const httplib::Result response = client.Get("/metrics");
  if (!response || response->status != 200) {
    throw std::runtime_error(fmt::format("no /metrics on port {}", target.metrics_port));
  }
  std::map<std::string, double> values;
  std::istringstream lines(response->body);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    values[line.substr(0, line.find_first_of("{ "))] += std::stod(line.substr(line.rfind(' ')));
  }
  return values;
}

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) throw std::runtime_error("a quantile of nothing: no sample was taken");
  const auto rank = static_cast<size_t>(std::ceil(q * static_cast<double>(values.size())));
  const size_t index = std::min(values.size() - 1, rank == 0 ? 0 : rank - 1);
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(index),
                   values.end());
  return values[index];
}

}  // namespace wintserve::bench
