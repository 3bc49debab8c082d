// Products of few rows with weights in quantised blocks, beside bf16, against the read bandwidth of
// the machine measured in the same run.
//
//   blocks_bench [threads [isa [repeats [type]]]]
//
// One matrix of 4,096 columns that fills 192 MiB, and one of 1 MiB that stays in the caches, which
// shows what the arithmetic alone allows. Every row gives the bytes of weights, the median time of
// a product, the spread (p10-p90), the rate, its share of the plain read, the weights a second and,
// where all weights come from memory, the time beside that of a bf16 matrix of as many weights.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "timing.h"

namespace {

using namespace twilight;
using bench::measure;
using bench::read_bandwidth;
using bench::Times;

constexpr std::int64_t kCols = 4096;
constexpr std::int64_t kLarge = std::int64_t{192} << 20;
constexpr std::int64_t kSmall = std::int64_t{1} << 20;
constexpr std::int32_t kMostInputs = 32;

class Bench {
 public:
  Bench(int threads, const std::string& isa, int repeats)
      : pool_(threads), backend_(make_cpu_backend(pool_, isa)), repeats_(repeats) {
    weights_ = Buffer(static_cast<std::size_t>(kLarge));
    std::mt19937_64 random(7);
    // Bytes below 64: whatever field they are, no f16 is infinite, no product overflows.
    for (std::int64_t i = 0; i < kLarge / 8; ++i) {
      weights_.as<std::uint64_t>()[i] = random() & 0x3f3f3f3f3f3f3f3fULL;
    }
    std::normal_distribution<float> normal;
    x_.resize(static_cast<std::size_t>(kMostInputs * kCols));
    for (float& value : x_) value = normal(random);
    read_ = read_bandwidth(pool_, weights_, repeats_);
    std::printf("%s; read bandwidth %.1f GB/s before\n", backend_->description().c_str(), read_);
    std::printf("%-5s %4s %8s %9s  %-15s %6s %8s %10s %8s\n", "type", "rows", "MB", "median us",
                "p10-p90", "GB/s", "of read", "Gweights/s", "of bf16");
  }
  ~Bench() {
    std::printf("read bandwidth %.1f GB/s after\n", read_bandwidth(pool_, weights_, repeats_));
  }

  void product(WeightType type, std::int32_t inputs, std::int64_t bytes) {
    WeightView weight;
    weight.data = weights_.data();
    weight.cols = kCols;
    if (is_quantised(type)) {
      weight.blocks = type;
    } else {
      weight.dtype = DType::kBf16;
    }
    weight.rows = bytes / weight.row_bytes();
    y_.resize(static_cast<std::size_t>(weight.rows * inputs));
    LinearParams params;
    params.x = x_.data();
    params.x_stride = kCols;
    params.num_rows = inputs;
    params.weight = weight;
    params.y = y_.data();
    params.y_stride = weight.rows;
    params.row_invariant = inputs <= 16;
    const bool large = bytes == kLarge;
    const int calls = large ? 1 : 32;
    Times times = measure(repeats_, [&] {
      for (int i = 0; i < calls; ++i) backend_->linear(params);
    });
    for (double* t : {&times.median, &times.low, &times.high}) *t /= calls;
    const auto moved = static_cast<double>(weight.rows * weight.row_bytes());
    const double per_weight = times.median / static_cast<double>(weight.rows * kCols);
    double& bf16 = bf16_[static_cast<std::size_t>(inputs)];
    if (large && !is_quantised(type)) bf16 = per_weight;
    char spread[32];
    std::snprintf(spread, sizeof(spread), "%.0f-%.0f", times.low * 1e6, times.high * 1e6);
    std::printf("%-5s %4d %8.1f %9.1f  %-15s %6.1f ", std::string(weight_type_name(type)).c_str(),
                inputs, moved / 1e6, times.median * 1e6, spread, moved / times.median / 1e9);
    if (!large) {
      std::printf("%8s %10.1f\n", "cached", 1e-9 / per_weight);
      return;
    }
    std::printf("%6.0f %% %10.1f", moved / times.median / 1e7 / read_, 1e-9 / per_weight);
    if (bf16 > 0) std::printf(" %6.0f %%", 100 * per_weight / bf16);
    std::printf("\n");
  }

 private:
  ThreadPool pool_;
  std::unique_ptr<Backend> backend_;
  int repeats_;
  Buffer weights_;
  std::vector<float> x_, y_;
  double read_ = 0;
  double bf16_[kMostInputs + 1] = {};  // seconds a weight, by rows of activations
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string isa = argc > 2 ? argv[2] : "auto";
  const int repeats = argc > 3 ? std::max(1, std::atoi(argv[3])) : 9;
  const std::string only = argc > 4 ? argv[4] : "";
  Bench bench(threads, isa, repeats);
  for (const WeightType type :
       {WeightType::kBf16, WeightType::kQ8_0, WeightType::kQ6_K, WeightType::kQ5_1,
        WeightType::kQ5_0, WeightType::kQ5_K, WeightType::kQ4_1, WeightType::kQ4_0,
        WeightType::kQ4_K, WeightType::kQ3_K, WeightType::kQ2_K}) {
    if (!only.empty() && type != WeightType::kBf16 && weight_type_name(type) != only) continue;
    for (const std::int32_t inputs : {1, 4, 16, 32}) bench.product(type, inputs, kLarge);
    bench.product(type, 1, kSmall);
  }
  return 0;
}
