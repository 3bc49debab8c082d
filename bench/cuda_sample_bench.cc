// Drawing tokens on cuda:0 against taking the logits to the host and drawing there, JSON on
// standard output. Logits are N(0, 3), so that a temperature of 1 leaves thousands of tokens in a
// nucleus of 0.95; device times are of recorded calls, 20 in a row.
//
// Usage: cuda_sample_bench [SAMPLES]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_check.h"
#include "core/splitmix64.h"
#include "cuda_timing.h"
#include "ops/sample_row.h"

namespace twilight::cuda {
namespace {

constexpr std::int64_t kVocab = 128256;
constexpr int kCalls = 20;

double median(std::vector<double> values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<float> normal_logits(std::int64_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  std::uint64_t state = 1;
  const auto uniform = [&] {
    return (static_cast<double>(splitmix64(state += kSplitMixStep) >> 11) + 0.5) * 0x1p-53;
  };
  for (float& x : out) {
    x = static_cast<float>(3 * std::sqrt(-2 * std::log(uniform())) *
                           std::cos(6.283185 * uniform()));
  }
  return out;
}

class Bench {
 public:
  Bench(int rows, int samples)
      : rows_(rows), samples_(samples), host_(normal_logits(rows * kVocab)) {
    DeviceMemory& memory = backend_.memory();
    x_ = DeviceBuffer(memory, host_.size() * sizeof(float));
    draws_ = DeviceBuffer(memory, static_cast<std::size_t>(rows) * sizeof(RowDraw));
    out_ = DeviceBuffer(memory, static_cast<std::size_t>(rows) * sizeof(std::int32_t));
    memory.upload(x_.data(), host_.data(), x_.size());
  }

  /// Median microseconds of a call.
  double device_us(const std::function<void()>& call) {
    call();
    const auto recorded = backend_.record([&] {
      for (int i = 0; i < kCalls; ++i) call();
    });
    recorded->replay();
    backend_.memory().synchronize();
    std::vector<double> times;
    for (int i = 0; i < samples_; ++i) {
      times.push_back(seconds_of([&] {
        recorded->replay();
        backend_.memory().synchronize();
      }));
    }
    return median(times) / kCalls * 1e6;
  }

  double sample_us(const RowDraw& draw) {
    std::vector<RowDraw> draws(static_cast<std::size_t>(rows_), draw);
    for (std::size_t i = 0; i < draws.size(); ++i) {
      draws[i].uniform = (static_cast<double>(i) + 0.5) / static_cast<double>(rows_);
    }
    backend_.memory().upload(draws_.data(), draws.data(), draws_.size());
    return device_us([&] {
      backend_.sample_rows(
          {x_.as<float>(), rows_, kVocab, draws_.as<RowDraw>(), out_.as<std::int32_t>()});
    });
  }

  double argmax_us() {
    return device_us([&] {
      backend_.argmax({x_.as<float>(), rows_, kVocab, out_.as<std::int32_t>()});
    });
  }

  double download_us() {
    std::vector<double> times;
    for (int i = 0; i < samples_; ++i) {
      times.push_back(
          seconds_of([&] { backend_.memory().download(host_.data(), x_.data(), x_.size()); }));
    }
    return median(times) * 1e6;
  }

  double host_us(const RowDraw& draw) {
    SampleOrder order;
    std::vector<double> times;
    std::int64_t sum = 0;
    for (int i = 0; i < 3; ++i) {
      times.push_back(seconds_of([&] {
        for (std::int64_t row = 0; row < rows_; ++row) {
          sum += sample_row({host_.data() + row * kVocab, kVocab}, draw, order);
        }
      }));
    }
    return sum < 0 ? -1 : median(times) * 1e6;
  }

 private:
  CudaBackend backend_{0};
  int rows_;
  int samples_;
  std::vector<float> host_;
  DeviceBuffer x_, draws_, out_;
};

struct NamedDraw {
  const char* name;
  RowDraw draw;
};

int run(int samples) {
  const NamedDraw kinds[] = {
      {"greedy", {0, 1, 0, 0}},
      {"temperature 1", {1, 1, 0.5, 0}},
      {"temperature 0.7, top_p 0.95", {0.7, 0.95, 0.5, 0}},
      {"temperature 1, top_k 50, top_p 0.95", {1, 0.95, 0.5, 50}},
      {"temperature 100", {100, 1, 0.5, 0}},  // bins too full: by digits
  };
  std::printf("{\"vocab\": %lld, \"samples\": %d, \"runs\": [", static_cast<long long>(kVocab),
              samples);
  const char* separator = "\n";
  for (const int rows : {1, 16, 64}) {
    Bench bench(rows, samples);
    const double argmax = bench.argmax_us();
    const double download = bench.download_us();
    for (const NamedDraw& kind : kinds) {
      std::printf(
          "%s {\"rows\": %d, \"draw\": \"%s\", \"us\": %.1f, \"argmax_us\": %.1f, "
          "\"download_us\": %.0f, \"host_us\": %.0f}",
          separator, rows, kind.name, bench.sample_us(kind.draw), argmax, download,
          bench.host_us(kind.draw));
      separator = ",\n";
    }
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace twilight::cuda

int main(int argc, char** argv) {
  return twilight::cuda::run_benchmark(argc, argv, 15, twilight::cuda::run);
}
