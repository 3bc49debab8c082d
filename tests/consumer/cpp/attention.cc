// An engine that leaves the cache to twilight: one sequence prefilled, forked, and decoded under
// two policies that must agree.
#include <twilight/attention.h>
#include <twilight/device.h>
#include <twilight/error.h>
#include <twilight/kv_cache.h>
#include <twilight/policy.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr std::int32_t kPrompt = 3000, kLayers = 3, kQueryHeads = 4, kKvHeads = 2, kHeadDim = 64;

int fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  return 1;
}

struct Tokens {
  std::vector<float> q, k, v;
};

// Every 311th key lies along the direction of all queries.
Tokens make_tokens(std::int32_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto sign = [](std::size_t i) { return i % kHeadDim % 3 == 0 ? 1.0F : -1.0F; };
  Tokens out;
  const auto fill = [&](std::vector<float>& to, int heads, float noise, auto along) {
    const std::size_t row = static_cast<std::size_t>(heads) * kHeadDim;
    to.resize(row * static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i] = noise * normal(random) + along(i / row) * sign(i);
    }
  };
  fill(out.q, kQueryHeads, 0.2F, [](std::size_t) { return 1.0F; });
  fill(out.k, kKvHeads, 0.3F, [](std::size_t t) { return t % 311 == 7 ? 1.5F : 0.0F; });
  fill(out.v, kKvHeads, 1.0F, [](std::size_t) { return 0.0F; });
  return out;
}

}  // namespace

int main() {
  const twilight::Device device({.threads = 2});
  const auto paper = twilight::make_policy("paper");
  twilight::KvCache cache(device,
                          {.num_layers = kLayers,
                           .num_kv_heads = kKvHeads,
                           .head_dim = kHeadDim,
                           .num_pages = kPrompt / 16 + 4},
                          paper);
  const twilight::AttentionLimits limits{.num_q_heads = kQueryHeads, .max_tokens = kPrompt + 16};
  twilight::Attention sparse(cache, paper, limits);
  twilight::Attention dense(cache, twilight::make_policy("dense"), limits);

  auto sequence = cache.new_sequence();
  twilight::Sequence* batch[] = {&sequence};
  const Tokens prompt = make_tokens(kPrompt, 1);
  std::vector<float> prompt_out(prompt.q.size());
  if (!sparse.begin(batch, kPrompt)) return fail("no pages for the prompt");
  for (std::int32_t layer = 0; layer < kLayers; ++layer) {
    sparse.append(layer, prompt.k.data(), prompt.v.data());
    sparse.prefill(layer, prompt.q.data(), prompt_out.data());
  }

  auto copy = sequence.fork();
  const Tokens next = make_tokens(1, 2);
  std::vector<float> outs[2];
  sparse.collect_stats(true);
  for (int i = 0; i < 2; ++i) {
    twilight::Attention& attention = i == 0 ? dense : sparse;
    twilight::Sequence* one[] = {i == 0 ? &copy : &sequence};
    outs[i].resize(next.q.size());
    if (!attention.begin(one, 1)) return fail("no pages to decode");
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      attention.append(layer, next.k.data(), next.v.data());
      attention.decode(layer, next.q.data(), outs[i].data());
    }
  }
  const auto& stats = sparse.stats(kLayers - 1)[0];
  if (stats.path != twilight::StepPath::kSparse) return fail("the last layer was not sparse");
  if (stats.bytes_read >= stats.bytes_dense) return fail("sparse read no less than dense");
  double error = 0, size = 0;
  for (std::size_t i = 0; i < outs[0].size(); ++i) {
    error += std::pow(static_cast<double>(outs[1][i] - outs[0][i]), 2);
    size += std::pow(static_cast<double>(outs[0][i]), 2);
  }
  std::printf(
      "relative difference %.3f, sparse reads %.1f %% of the bytes\n", std::sqrt(error / size),
      100.0 * static_cast<double>(stats.bytes_read) / static_cast<double>(stats.bytes_dense));
  if (!(std::sqrt(error / size) < 0.2)) return fail("dense and sparse disagree");
  if (error == 0) return fail("sparse gave exactly the dense answer");

  try {
    (void)twilight::make_policy("nonsense");
    return fail("a wrong preset was accepted");
  } catch (const twilight::Error& caught) {
    if (std::string(caught.what()).find("nonsense") == std::string::npos)
      return fail(caught.what());
  }
  return 0;
}
