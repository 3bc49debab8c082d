#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <vector>

#include "distribution.h"
#include "table.h"
#include "twilight/attention.h"
#include "twilight/engine.h"
#include "twilight/error.h"
#include "workload.h"

namespace twilight::app {
namespace {

PlantedOptions small_options() {
  PlantedOptions options;
  options.shape = {8, 2, 64};
  options.num_tokens = 3000;
  options.seed = 5;
  return options;
}

struct Data {
  std::vector<float> k, v, q;
};

Data all_of(Workload& workload, std::int32_t seq) {
  const LayerShape shape = workload.shape();
  workload.prepare(seq);
  const std::int32_t n = workload.num_tokens(seq);
  Data data;
  const std::size_t row = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
  data.k.resize(static_cast<std::size_t>(n) * row);
  data.v.resize(data.k.size());
  // In uneven pieces: a token's data must not depend on how it is asked for.
  for (std::int32_t first = 0; first < n; first += 700) {
    const std::size_t at = static_cast<std::size_t>(first) * row;
    workload.tokens(first, std::min(700, n - first), data.k.data() + at, data.v.data() + at);
  }
  const std::span<const float> q = workload.query();
  data.q.assign(q.begin(), q.end());
  return data;
}

/// Tokens of the smallest set of a query head whose exact softmax mass reaches p.
std::vector<std::int32_t> exact_set(const Data& data, const LayerShape& shape, std::int32_t n,
                                    std::int32_t head, double p) {
  const std::int32_t kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  std::vector<double> weights;
  for (std::int32_t t = 0; t < n; ++t) {
    double dot = 0;
    for (std::int32_t d = 0; d < shape.head_dim; ++d) {
      dot += static_cast<double>(data.q[static_cast<std::size_t>(head * shape.head_dim + d)]) *
             static_cast<double>(data.k[static_cast<std::size_t>(
                 (t * shape.num_kv_heads + kv_head) * shape.head_dim + d)]);
    }
    weights.push_back(std::exp(dot / std::sqrt(shape.head_dim)));
  }
  std::vector<std::int32_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
  });
  const double target = p * std::accumulate(weights.begin(), weights.end(), 0.0);
  double sum = 0;
  std::size_t count = 0;
  while (count < order.size() && sum < target) {
    sum += weights[static_cast<std::size_t>(order[count++])];
  }
  order.resize(count);
  return order;
}

TEST(PlantedWorkload, ExactSetsOfTheKeysHaveTheSizesItReports) {
  const PlantedOptions options = small_options();
  const auto workload = make_planted(options);
  const Data data = all_of(*workload, 0);
  std::vector<double> sizes;
  for (std::int32_t head = 0; head < options.shape.num_q_heads; ++head) {
    sizes.push_back(static_cast<double>(
        exact_set(data, options.shape, options.num_tokens, head, options.p).size()));
  }
  const Distribution measured(sizes);
  const nlohmann::ordered_json reported = workload->json()["exact_set_sizes"];
  // One token each way: logits come from keys that were summed in another order.
  EXPECT_EQ(reported["count"], measured.count);
  EXPECT_NEAR(reported["mean"].get<double>(), measured.mean, 1);
  EXPECT_NEAR(reported["min"].get<double>(), measured.min, 1);
  EXPECT_NEAR(reported["median"].get<double>(), measured.median, 1);
  EXPECT_NEAR(reported["max"].get<double>(), measured.max, 1);
  EXPECT_NEAR(measured.mean, options.budget * options.num_tokens, 2);
  EXPECT_GT(measured.max, 2 * measured.min);
}

TEST(PlantedWorkload, HeadsOfAGroupShareSomeTokensAndNotAll) {
  const PlantedOptions options = small_options();
  const auto workload = make_planted(options);
  const Data data = all_of(*workload, 0);
  for (std::int32_t kv_head = 0; kv_head < options.shape.num_kv_heads; ++kv_head) {
    std::set<std::int32_t> together;
    std::size_t sum = 0, largest = 0;
    for (std::int32_t g = 0; g < 4; ++g) {
      const auto set =
          exact_set(data, options.shape, options.num_tokens, kv_head * 4 + g, options.p);
      together.insert(set.begin(), set.end());
      sum += set.size();
      largest = std::max(largest, set.size());
      // A token that holds a tenth of the mass belongs to every set that leaves out a twentieth.
      EXPECT_EQ(std::count(set.begin(), set.end(), 0), 1);
    }
    EXPECT_LT(together.size(), sum * 3 / 4);
    EXPECT_GT(together.size(), largest);
  }
}

TEST(PlantedWorkload, SameSeedSameDataOtherSequenceOtherData) {
  const auto first = make_planted(small_options());
  const auto second = make_planted(small_options());
  const Data a = all_of(*first, 1);
  (void)all_of(*second, 0);
  const Data b = all_of(*second, 1);
  EXPECT_EQ(a.k, b.k);
  EXPECT_EQ(a.v, b.v);
  EXPECT_EQ(a.q, b.q);
  const Data c = all_of(*second, 2);
  EXPECT_NE(a.k, c.k);
  EXPECT_NE(a.v, c.v);
  EXPECT_NE(a.q, c.q);
  PlantedOptions other = small_options();
  other.seed = 6;
  EXPECT_NE(all_of(*make_planted(other), 1).k, a.k);
}

TEST(PlantedWorkload, RefusesWhatItCannotMake) {
  PlantedOptions options = small_options();
  options.budget = 0;
  EXPECT_THROW((void)make_planted(options), Error);
  options = small_options();
  options.shape.num_q_heads = 7;
  EXPECT_THROW((void)make_planted(options), Error);
}

TEST(KvCacheRead, GivesBackWhatWasWritten) {
  const Device device({.device = "ref"});
  KvCacheOptions options;
  options.num_layers = 2;
  options.num_kv_heads = 2;
  options.head_dim = 16;
  options.page_size = 8;
  options.num_pages = 8;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    options.dtype = dtype;
    KvCache cache(device, options, make_policy("dense"));
    Attention attention(cache, make_policy("dense"), {4, 1, 64});
    Sequence other = cache.new_sequence();
    Sequence sequence = cache.new_sequence();
    constexpr std::int32_t kTokens = 19;  // an open page at the end
    std::vector<float> k(kTokens * 32), v(k.size());
    for (std::size_t i = 0; i < k.size(); ++i) {
      // Exact in 8 bits of mantissa.
      k[i] = static_cast<float>(i % 251) / 4 - 16;
      v[i] = -static_cast<float>(i % 199);
    }
    Sequence* const first[] = {&other};
    Sequence* const batch[] = {&sequence};
    ASSERT_TRUE(attention.begin(first, 3));
    ASSERT_TRUE(attention.begin(batch, kTokens));
    attention.append(1, k.data(), v.data());
    std::vector<float> k_out(k.size(), -1), v_out(v.size(), -1);
    cache.read(sequence, 1, k_out.data(), v_out.data());
    EXPECT_EQ(k, k_out) << dtype_name(dtype);
    EXPECT_EQ(v, v_out) << dtype_name(dtype);
    EXPECT_THROW(cache.read(sequence, 2, k_out.data(), v_out.data()), Error);
    EXPECT_THROW(cache.read(sequence, -1, k_out.data(), v_out.data()), Error);
  }
}

TEST(ObserveQueries, SeesEveryLayerOfADecodeStepUntilStopped) {
  const Model model = Model::load(TWILIGHT_SOURCE_DIR "/models/vesper-19m");
  const ModelInfo& info = model.info();
  EngineOptions options;
  options.max_context = 64;
  Engine engine(Device(), model, options);
  std::vector<std::int32_t> layers;
  std::set<float> sums;
  engine.observe_queries([&](std::int32_t layer, const float* q) {
    layers.push_back(layer);
    sums.insert(std::accumulate(q, q + info.num_q_heads * info.head_dim, 0.0F,
                                [](float sum, float x) { return sum + x * x; }));
  });
  Sequence sequence = engine.cache().new_sequence();
  const std::vector<std::int32_t> prompt = model.encode("It was a cold");
  ASSERT_EQ(engine.prefill(sequence, prompt), Engine::Status::kOk);
  EXPECT_TRUE(layers.empty());
  std::vector<float> logits(static_cast<std::size_t>(info.vocab_size));
  Sequence* const batch[] = {&sequence};
  const std::int32_t token[] = {prompt.back()};
  ASSERT_EQ(engine.decode(batch, token, logits), Engine::Status::kOk);
  std::vector<std::int32_t> expected(static_cast<std::size_t>(info.num_layers));
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(layers, expected);
  EXPECT_EQ(sums.size(), expected.size());  // every layer its own
  EXPECT_GT(*sums.begin(), 0);
  engine.observe_queries({});
  ASSERT_EQ(engine.decode(batch, token, logits), Engine::Status::kOk);
  EXPECT_EQ(layers, expected);
}

TEST(Distribution, QuantilesLieBetweenNeighbours) {
  const Distribution values({5, 1, 4, 2, 3});
  EXPECT_EQ(values.count, 5U);
  EXPECT_EQ(values.min, 1);
  EXPECT_DOUBLE_EQ(values.p10, 1.4);
  EXPECT_EQ(values.median, 3);
  EXPECT_DOUBLE_EQ(values.p90, 4.6);
  EXPECT_EQ(values.max, 5);
  EXPECT_EQ(values.mean, 3);
  EXPECT_EQ(Distribution(std::vector<double>()).count, 0U);
  EXPECT_EQ(Distribution(std::vector<double>{7}).p90, 7);
}

TEST(Table, AlignsColumns) {
  Table table;
  table.add({"", "ms", "x"});
  table.add({"dense", "1.5", "\u00e9"});
  EXPECT_EQ(table.text(), "        ms  x\ndense  1.5  \u00e9\n");
  EXPECT_EQ(digits3(1234.5), "1234");
  EXPECT_EQ(digits3(0.012345), "0.0123");
  EXPECT_EQ(digits3(0), "0");
}

}  // namespace
}  // namespace twilight::app
