#include "server/metrics.h"

#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <string_view>
#include <utility>
#include <vector>

#include "server/responses.h"

namespace twilight::server {
namespace {

using prometheus::ClientMetric;
using prometheus::Histogram;
using prometheus::MetricFamily;
using prometheus::MetricType;

const Histogram::BucketBoundaries kSeconds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                              0.5,   1,      2.5,   5,    10,    30,   60,  120};
const Histogram::BucketBoundaries kTokenSeconds = {0.0005, 0.001, 0.002, 0.004, 0.008, 0.016,
                                                   0.032,  0.064, 0.125, 0.25,  0.5,   1};
const Histogram::BucketBoundaries kShares = {0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3,
                                             0.4,  0.5,  0.6,  0.7, 0.8,  0.9, 1};

MetricFamily family(const char* name, const char* help, MetricType type) {
  MetricFamily result;
  result.name = name;
  result.help = help;
  result.type = type;
  return result;
}

void add(MetricFamily& to, double value, std::vector<ClientMetric::Label> labels = {}) {
  ClientMetric metric;
  metric.label = std::move(labels);
  if (to.type == MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  to.metric.push_back(std::move(metric));
}

std::vector<MetricFamily> scheduler_families(const SchedulerStats& stats) {
  std::vector<MetricFamily> all;
  const auto one = [&](const char* name, const char* help, MetricType type, auto value) {
    all.push_back(family(name, help, type));
    add(all.back(), static_cast<double>(value));
  };
  constexpr auto kGauge = MetricType::Gauge;
  constexpr auto kCounter = MetricType::Counter;
  one("twilight_requests_running", "Choices being decoded", kGauge, stats.running);
  one("twilight_requests_prefilling", "Choices whose prompt is being read", kGauge,
      stats.prefilling);
  one("twilight_requests_queued", "Choices waiting", kGauge, stats.queued);
  one("twilight_pages_total", "Pages of the cache", kGauge, stats.pages_total);
  one("twilight_pages_free", "Pages nobody holds", kGauge, stats.pages_free);
  one("twilight_pages_cached", "Pages held by the prefix cache alone", kGauge, stats.pages_cached);
  one("twilight_requests_accepted_total", "Choices accepted", kCounter, stats.requests_accepted);
  one("twilight_requests_refused_total", "Choices refused for a full queue", kCounter,
      stats.requests_refused);
  all.push_back(family("twilight_requests_ended_total", "Choices ended, by reason", kCounter));
  for (int i = 0; i <= static_cast<int>(EndReason::kError); ++i) {
    add(all.back(), static_cast<double>(stats.requests_ended[i]),
        {{"reason", std::string(end_reason_name(static_cast<EndReason>(i)))}});
  }
  one("twilight_prompt_tokens_total", "Prompt tokens", kCounter, stats.prompt_tokens);
  one("twilight_cached_prompt_tokens_total", "Prompt tokens found in the prefix cache", kCounter,
      stats.cached_prompt_tokens);
  one("twilight_completion_tokens_total", "Tokens generated", kCounter, stats.completion_tokens);
  one("twilight_decode_steps_total", "Decode steps over all running choices", kCounter,
      stats.decode_steps);
  one("twilight_preemptions_total", "Choices sent back to the queue for want of pages", kCounter,
      stats.preemptions);
  one("twilight_kv_bytes_read_total", "Bytes of keys, values and index read by decode steps",
      kCounter, stats.kv_bytes_read);
  one("twilight_kv_bytes_dense_total", "Bytes that dense attention would have read", kCounter,
      stats.kv_bytes_dense);
  // A counter of its own would fall where a step reads more than dense attention would.
  one("twilight_kv_bytes_saved", "Dense bytes less bytes read", kGauge,
      stats.kv_bytes_dense - stats.kv_bytes_read);
  one("twilight_sparse_layer_steps_total", "Layer steps that ran sparsely", kCounter,
      stats.sparse_layer_steps);
  all.push_back(family("twilight_dense_layer_steps_total",
                       "Layer steps that ran densely, by reason", kCounter));
  for (const auto& [reason, count] : stats.dense_reasons) {
    add(all.back(), static_cast<double>(count), {{"reason", reason}});
  }
  return all;
}

}  // namespace

struct Metrics::Impl {
  explicit Impl(const Scheduler& of) : scheduler(of) {}

  Histogram& histogram(const char* name, const char* help, const Histogram::BucketBoundaries& at) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, at);
  }

  const Scheduler& scheduler;
  prometheus::Registry registry;
  Histogram& first_token = histogram("twilight_time_to_first_token_seconds",
                                     "From acceptance to the first token", kSeconds);
  Histogram& per_token = histogram("twilight_time_per_output_token_seconds",
                                   "Mean time between the tokens of a choice", kTokenSeconds);
  Histogram& queue = histogram("twilight_queue_seconds", "Time waiting to be admitted", kSeconds);
  Histogram& total = histogram("twilight_request_seconds", "From acceptance to the end", kSeconds);
  Histogram& kept = histogram("twilight_kv_bytes_share",
                              "Share of dense attention's bytes that a choice read", kShares);
  prometheus::Family<prometheus::Counter>& responses = prometheus::BuildCounter()
                                                           .Name("twilight_http_responses_total")
                                                           .Help("HTTP responses")
                                                           .Register(registry);
  prometheus::Counter& slow = prometheus::BuildCounter()
                                  .Name("twilight_slow_readers_total")
                                  .Help("Streams given up because the client read too slowly")
                                  .Register(registry)
                                  .Add({});
};

Metrics::Metrics(const Scheduler& scheduler) : impl_(std::make_unique<Impl>(scheduler)) {}
Metrics::~Metrics() = default;

void Metrics::choice_ended(EndReason reason, const RequestUsage& usage) {
  impl_->queue.Observe(usage.queue_seconds);
  impl_->total.Observe(usage.total_seconds);
  if (usage.completion_tokens > 0) impl_->first_token.Observe(usage.first_token_seconds);
  if (usage.completion_tokens > 1) {
    impl_->per_token.Observe((usage.total_seconds - usage.first_token_seconds) /
                             (usage.completion_tokens - 1));
  }
  if (usage.kv_bytes_dense > 0 && reason != EndReason::kError) {
    impl_->kept.Observe(static_cast<double>(usage.kv_bytes_read) /
                        static_cast<double>(usage.kv_bytes_dense));
  }
}

void Metrics::responded(const std::string& route, int status) {
  impl_->responses.Add({{"route", route}, {"status", std::to_string(status)}}).Increment();
}

void Metrics::slow_reader() { impl_->slow.Increment(); }

std::string Metrics::text() const {
  std::vector<MetricFamily> families = impl_->registry.Collect();
  for (MetricFamily& each : scheduler_families(impl_->scheduler.stats())) {
    families.push_back(std::move(each));
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace twilight::server
