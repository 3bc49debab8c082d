#include "support/sampling_cases.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>
#include <tuple>
#include <utility>

#include "support/random.h"

namespace twilight::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kAlmostOne = 1.0 - 0x1p-53;

std::vector<std::pair<const char*, std::vector<float>>> kinds_of(std::int64_t cols) {
  const auto size = static_cast<std::size_t>(cols);
  const auto seed = static_cast<std::uint64_t>(cols);
  std::vector<std::pair<const char*, std::vector<float>>> kinds;
  kinds.emplace_back("normal", normals(seed, cols, 3.0F));
  std::vector<float> tied = normals(seed + 1, cols, 2.0F);
  for (float& x : tied) x = std::round(x);
  kinds.emplace_back("tied", tied);
  kinds.emplace_back("all_equal", std::vector<float>(size, -7.25F));
  std::vector<float> dominant = normals(seed + 2, cols);
  dominant[size / 2] = 40.0F;
  kinds.emplace_back("one_dominant", dominant);
  std::vector<float> masked(size, -kInfinity);
  for (std::size_t i = 5; i < size; i += 9) masked[i] = tied[i] * 0.25F;
  kinds.emplace_back("masked", masked);
  kinds.emplace_back("wide", normals(seed + 3, cols, 1e4F));
  std::vector<float> narrow = normals(seed + 4, cols, 0.01F);
  narrow[size - 1] = -0.0F;
  narrow[0] = 0.0F;
  kinds.emplace_back("narrow", narrow);
  std::vector<float> huge = normals(seed + 5, cols, 0.9e38F);  // differences overflow
  kinds.emplace_back("huge", huge);
  return kinds;
}

std::vector<RowDraw> draws_of(std::int64_t cols) {
  const auto all = static_cast<std::int32_t>(cols);
  // temperature, top_p, uniform, top_k
  std::vector<RowDraw> draws = {{0, 1, 0, 0},
                                {0, 0.5, 0.5, 3},
                                {1, 1, 0, 0},
                                {1, 1, kAlmostOne, 0},
                                {1, 0.9, kAlmostOne, 0},
                                {1, 1, 0.999999, 0},
                                {1, 0.9, 0.999999, 0},
                                {1, 1, 0.5, 1},
                                {1, 1e-9, 0.5, 0},
                                {1, 0.5, kAlmostOne, 2},
                                {1e-4, 0.4, 0.25, 3},
                                {1e-320, 1, 0.75, 0},
                                {1e300, 1, 0.625, 0},
                                {1e300, 0.75, 0.3, all / 2},
                                {1, 1, 0.9, all},
                                {1, 1, 0.9, std::numeric_limits<std::int32_t>::max()}};
  Random random(7);
  const auto uniform = [&] { return static_cast<double>(random.next() >> 11) * 0x1p-53; };
  for (const auto& [temperature, top_p, top_k] :
       std::initializer_list<std::tuple<double, double, std::int32_t>>{
           {1, 1, 0}, {0.7, 0.9, 0}, {0.8, 0.95, 40}, {2.5, 0.99, 0}, {1, 1, 50}, {40, 0.5, 0}}) {
    for (int i = 0; i < 3; ++i) draws.push_back({temperature, top_p, uniform(), top_k});
  }
  return draws;
}

}  // namespace

std::vector<float> SamplingCase::rows() const {
  std::vector<float> out;
  out.reserve(logits.size() * draws.size());
  for (std::size_t i = 0; i < draws.size(); ++i) {
    out.insert(out.end(), logits.begin(), logits.end());
  }
  return out;
}

std::vector<std::int64_t> sampling_vocabularies() { return {17, 512, 32000, 151936}; }

std::vector<SamplingCase> sampling_cases(std::int64_t cols) {
  std::vector<SamplingCase> cases;
  for (auto& [kind, logits] : kinds_of(cols)) {
    cases.push_back(
        {std::string(kind) + "_" + std::to_string(cols), cols, std::move(logits), draws_of(cols)});
  }
  return cases;
}

std::vector<SamplingCase> sampling_cases() {
  std::vector<SamplingCase> all;
  for (const std::int64_t cols : sampling_vocabularies()) {
    for (SamplingCase& c : sampling_cases(cols)) all.push_back(std::move(c));
  }
  return all;
}

SamplingOracle::SamplingOracle(std::span<const float> logits)
    : logits_(logits), order_(logits.size()) {
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](std::int32_t a, std::int32_t b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
}

bool SamplingOracle::allows(const RowDraw& draw, std::int32_t token, double slack) const {
  if (token < 0 || static_cast<std::size_t>(token) >= logits_.size()) return false;
  if (draw.temperature == 0) return token == order_[0];
  std::span<const std::int32_t> order = order_;
  if (draw.top_k > 0) {
    order = order.first(std::min(order.size(), static_cast<std::size_t>(draw.top_k)));
  }
  const float top = logits_[static_cast<std::size_t>(order[0])];
  std::vector<long double> to;  // sum up to each and with it
  long double sum = 0;
  for (const std::int32_t id : order) {
    const float below = logits_[static_cast<std::size_t>(id)] - top;
    sum += std::exp(static_cast<long double>(below) / static_cast<long double>(draw.temperature));
    to.push_back(sum);
  }
  const auto place = std::find(order.begin(), order.end(), token);
  if (place == order.end()) return false;
  const auto at = static_cast<std::size_t>(place - order.begin());
  const long double before = at == 0 ? 0 : to[at - 1];
  // The shortest and the longest nucleus that the slack allows.
  for (const double p : {draw.top_p - slack, draw.top_p, draw.top_p + slack}) {
    const long double wanted = std::min<long double>(p, 1) * sum;
    auto last = std::lower_bound(to.begin(), to.end(), wanted);
    if (last == to.end()) --last;
    if (before >= *last) continue;
    const long double from = before / *last;
    const long double until = to[at] / *last;
    if (from <= draw.uniform + slack && draw.uniform < until + slack) return true;
  }
  return false;
}

std::string describe(const RowDraw& draw) {
  std::ostringstream out;
  out << "temperature " << draw.temperature << " top_k " << draw.top_k << " top_p " << draw.top_p
      << " uniform " << draw.uniform;
  return out.str();
}

}  // namespace twilight::test
