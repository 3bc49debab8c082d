#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "engine/device_impl.h"
#include "support/engine_runs.h"
#include "support/expect_error.h"
#include "support/expect_stats.h"
#include "support/far_backend.h"

/// The engine on a device whose memory the host cannot touch (FarBackend): the same bits as on the
/// host, with recorded steps, shared pages, statistics and changes of policy.
namespace twilight::test {
namespace {

struct FarDevice {
  explicit FarDevice(IndexLayout layout = IndexLayout::kTokenLanes, bool reference = false)
      : pool(2), device(make(layout, reference)) {}

  Device make(IndexLayout layout, bool reference) {
    auto far = std::make_unique<FarBackend>(
        reference ? make_ref_backend() : make_cpu_backend(pool, "auto"), layout);
    backend = far.get();
    return Device(std::make_shared<Device::Impl>(std::move(far), 1));
  }

  ThreadPool pool;
  FarBackend* backend = nullptr;
  Device device;
};

SparsePolicy policy_of(const std::string& name) {
  if (name == "dense") return make_policy(name);
  SparsePolicy policy = sparse_policy(name == "oracle" ? "paper" : name);
  if (name == "oracle") policy.selector = "oracle";
  policy.dense_layers = 1;
  policy.dense_below_tokens = 100;  // some steps change their path on the way
  return policy;
}

/// What a run produced.
struct Outcome {
  std::vector<Logits> logits;
  std::vector<std::vector<float>> cache;
  std::vector<LayerStats> stats;
  DecodeTotals totals;
};

Outcome run(const Device& device, const Model& model, const SparsePolicy& policy, bool audit,
            std::int32_t steps) {
  Outcome out;
  EngineOptions options = options_of(policy, 320);
  options.max_seqs = 3;
  options.prefill_chunk = 64;
  Engine engine(device, model, options);
  engine.collect_stats(true, audit);
  Sequence first = engine.cache().new_sequence();
  Sequence second = engine.cache().new_sequence();
  out.logits.push_back(prefill(engine, first, some_tokens(150, 1, model)));
  out.logits.push_back(prefill(engine, second, some_tokens(90, 2, model)));
  Sequence third = first.fork();  // shares an open page
  Sequence* const batch[] = {&first, &second, &third};
  const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
  for (std::int32_t step = 0; step < steps; ++step) {
    const auto tokens = some_tokens(3, 100 + static_cast<std::uint64_t>(step), model);
    Logits logits(3 * vocab);
    EXPECT_EQ(engine.decode(batch, tokens, logits), Engine::Status::kOk);
    out.logits.push_back(logits);
    for (std::int32_t layer = 0; layer < model.info().num_layers; ++layer) {
      for (const LayerStats& stats : engine.last_stats(layer)) out.stats.push_back(stats);
    }
  }
  out.totals = engine.totals();
  for (Sequence* sequence : batch) {
    for (std::int32_t layer = 0; layer < model.info().num_layers; ++layer) {
      std::vector<float> k(static_cast<std::size_t>(sequence->num_tokens()) *
                           static_cast<std::size_t>(model.info().num_kv_heads) *
                           static_cast<std::size_t>(model.info().head_dim));
      std::vector<float> v(k.size());
      engine.cache().read(*sequence, layer, k.data(), v.data());
      out.cache.push_back(k);
      out.cache.push_back(v);
    }
  }
  return out;
}

void expect_same(const Outcome& far, const Outcome& host) {
  ASSERT_EQ(far.logits.size(), host.logits.size());
  for (std::size_t i = 0; i < far.logits.size(); ++i) {
    EXPECT_TRUE(same_bits(far.logits[i], host.logits[i])) << "logits " << i;
  }
  ASSERT_EQ(far.cache.size(), host.cache.size());
  for (std::size_t i = 0; i < far.cache.size(); ++i) EXPECT_EQ(far.cache[i], host.cache[i]);
  ASSERT_EQ(far.stats.size(), host.stats.size());
  for (std::size_t i = 0; i < far.stats.size(); ++i) {
    const LayerStats& a = far.stats[i];
    const LayerStats& b = host.stats[i];
    expect_same_stats(a, b);
    EXPECT_EQ(a.true_mass, b.true_mass);
  }
  EXPECT_EQ(far.totals.sparse_layers, host.totals.sparse_layers);
  EXPECT_EQ(far.totals.bytes_read, host.totals.bytes_read);
}

const Model& tiny() {
  static const Model model = Model::load(kRoot + "/tests/golden/tiny/llama-3.1-8b-instruct");
  return model;
}

class FarEngine : public ::testing::TestWithParam<const char*> {};

TEST_P(FarEngine, GivesTheBitsOfTheHost) {
  const SparsePolicy policy = policy_of(GetParam());
  FarDevice far;
  const Outcome got = run(far.device, tiny(), policy, false, 24);
  expect_same(got, run(cpu(), tiny(), policy, false, 24));
  EXPECT_EQ(far.backend->replays() > 0, policy.selector != "oracle");
  EXPECT_EQ(got.totals.sparse_layers > 0, !policy.is_dense());
  EXPECT_EQ(far.backend->far_memory().used_bytes(), 0U) << "memory was not given back";
}

TEST_P(FarEngine, AuditsLikeTheHost) {
  const SparsePolicy policy = policy_of(GetParam());
  FarDevice far;
  expect_same(run(far.device, tiny(), policy, true, 3), run(cpu(), tiny(), policy, true, 3));
  EXPECT_EQ(far.backend->replays(), 0);
}

INSTANTIATE_TEST_SUITE_P(Policies, FarEngine,
                         ::testing::Values("dense", "adaptive", "paper", "paper-full", "quest:64",
                                           "streaming", "oracle"));

// The order of codes is the backend's; the values they stand for are the same.
TEST(FarMemory, TakesTheOrderOfTheIndexFromTheBackend) {
  DeviceOptions options;
  options.device = "ref";
  for (const char* preset : {"adaptive", "paper"}) {
    SCOPED_TRACE(preset);
    FarDevice far(IndexLayout::kMma, true);
    expect_same(run(far.device, tiny(), policy_of(preset), false, 6),
                run(Device(options), tiny(), policy_of(preset), false, 6));
  }
}

TEST(FarMemory, TheBundledModelGivesTheBitsOfTheHost) {
  FarDevice far;
  const SparsePolicy policy = policy_of("adaptive");
  expect_same(run(far.device, vesper(), policy, false, 3), run(cpu(), vesper(), policy, false, 3));
}

TEST(FarMemory, AStepMovesItsInputsAndItsLogitsAlone) {
  FarDevice far;
  EngineOptions options = options_of(policy_of("paper"), 320);
  Engine engine(far.device, tiny(), options);
  engine.collect_stats(false);
  Sequence sequence = engine.cache().new_sequence();
  prefill(engine, sequence, some_tokens(161, 1, tiny()));
  for (int step = 0; step < 3; ++step) (void)decode(engine, sequence, 5);
  const FarMemory& memory = far.backend->far_memory();
  const std::int64_t uploads = memory.uploads();
  const std::int64_t downloads = memory.downloads();
  (void)decode(engine, sequence, 6);
  EXPECT_EQ(memory.downloads() - downloads, 1);
  // Token, position, length and slot; no page was new.
  EXPECT_EQ(memory.uploads() - uploads, 4);
  engine.collect_stats(true);
  (void)decode(engine, sequence, 7);
  const std::int64_t before = memory.downloads();
  (void)decode(engine, sequence, 8);
  EXPECT_EQ(memory.downloads() - before, 2) << "statistics take one download a step";
}

// Tokens that come back are the likeliest of the logits that would have, on the host and on a
// device, recorded steps included; so are those of copies, which share no page.
TEST(FarMemory, GreedyStepsOfCopiesChooseAsLogitsDo) {
  FarDevice far;
  const Device host = cpu();
  for (const Device& device : {host, far.device}) {
    EngineOptions options = options_of(policy_of("adaptive"), 320);
    options.max_seqs = 3;
    options.cache_tokens = 3 * 192;
    Engine engine(device, tiny(), options);
    Sequence sequence = engine.cache().new_sequence();
    prefill(engine, sequence, some_tokens(165, 1, tiny()));
    std::optional<Sequence> first = engine.cache().copy(sequence);
    std::optional<Sequence> second = engine.cache().copy(sequence);
    ASSERT_TRUE(first && second);
    EXPECT_FALSE(engine.cache().copy(sequence)) << "no pages are left";
    std::int32_t token = 5;
    std::vector<std::int32_t> tokens = {5, 5};
    Sequence* const batch[] = {&*first, &*second};
    for (int step = 0; step < 6; ++step) {
      const std::vector<float> logits = decode(engine, sequence, token);
      token = static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                        logits.begin());
      std::vector<std::int32_t> next(2);
      ASSERT_EQ(engine.decode_greedy(batch, tokens, next), Engine::Status::kOk);
      EXPECT_EQ(next, std::vector<std::int32_t>(2, token)) << step;
      tokens = next;
    }
  }
}

TEST(FarMemory, PolicyChangesAndQueriesReachTheHost) {
  FarDevice far;
  const Device host = cpu();
  std::vector<std::vector<float>> seen[2];
  std::vector<Logits> logits[2];
  int side = 0;
  for (const Device& device : {far.device, host}) {
    Engine engine(device, tiny(), options_of(policy_of("paper"), 320));
    Sequence sequence = engine.cache().new_sequence();
    prefill(engine, sequence, some_tokens(200, 1, tiny()));
    for (const char* preset : {"adaptive", "dense", "quest:64", "paper"}) {
      engine.set_policy(policy_of(preset));
      logits[side].push_back(decode_all(engine, sequence, some_tokens(3, 9, tiny())));
    }
    engine.observe_queries([&](std::int32_t, const float* q) {
      const auto count = static_cast<std::size_t>(tiny().info().num_q_heads) *
                         static_cast<std::size_t>(tiny().info().head_dim);
      seen[side].emplace_back(q, q + count);
    });
    (void)decode(engine, sequence, 4);
    ++side;
  }
  ASSERT_EQ(logits[0].size(), logits[1].size());
  for (std::size_t i = 0; i < logits[0].size(); ++i) {
    EXPECT_TRUE(same_bits(logits[0][i], logits[1][i])) << i;
  }
  EXPECT_EQ(seen[0].size(), static_cast<std::size_t>(tiny().info().num_layers));
  EXPECT_EQ(seen[0], seen[1]);
}

TEST(FarMemory, MeasuresWhereSparseStarts) {
  FarDevice far;
  SparsePolicy policy = policy_of("paper");
  policy.dense_below_tokens = SparsePolicy::kDenseBelowAuto;
  const Engine engine(far.device, tiny(), options_of(policy, 512));
  EXPECT_GE(engine.policy().dense_below_tokens, 0);
}

TEST(FarMemory, TheCacheTakesTheMemoryThatIsFree) {
  FarDevice far;
  EngineOptions options = options_of(policy_of("adaptive"), 4096);
  options.max_seqs = 4;
  {
    Engine roomy(far.device, tiny(), options);
    EXPECT_EQ(roomy.options().cache_tokens, 4 * 4096);  // the memory does not say what is free
  }
  const auto tokens_with = [&](std::size_t bytes) {
    far.backend->far_memory().set_free_bytes(bytes);
    Engine engine(far.device, tiny(), options);
    EXPECT_EQ(engine.cache().free_pages(), engine.options().cache_tokens / 16 + 4);
    return engine.options().cache_tokens;
  };
  const std::int64_t page = [&] {
    const Engine engine(far.device, tiny(), options);
    return const_cast<Engine&>(engine).cache().bytes_per_page();
  }();
  EXPECT_EQ(tokens_with(std::size_t{64} << 30), 4 * 4096);
  const auto base = std::size_t{541} << 20;
  const std::int64_t few = tokens_with(base);
  ASSERT_LT(few, 4 * 4096);
  // A page more of memory is a page more of cache.
  EXPECT_EQ(tokens_with(base + static_cast<std::size_t>(page)), few + 16);
  EXPECT_EQ(tokens_with(base - static_cast<std::size_t>(page)), few - 16);
  far.backend->far_memory().set_free_bytes(std::size_t{100} << 20);
  expect_error(ErrorCode::kOutOfMemory, {"[engine]", "free memory for the cache"},
               [&] { const Engine engine(far.device, tiny(), options); });
}

// What the tests above rest on.
TEST(FarMemory, NoticesHostPointersAndStrayAccesses) {
  FarDevice far;
  FarBackend& backend = *far.backend;
  std::vector<float> host(64, 1.0F);
  const DeviceBuffer device(backend.memory(), 256);
  EXPECT_THROW(backend.silu_mul({host.data(), device.as<float>(), device.as<float>(), 4}), Error);
  EXPECT_THROW(backend.memory().upload(host.data(), host.data(), 16), Error);
  EXPECT_NO_THROW(
      backend.silu_mul({device.as<float>(), device.as<float>(), device.as<float>(), 4}));
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(static_cast<void>(*static_cast<volatile std::byte*>(device.data())), "");
}

}  // namespace
}  // namespace twilight::test
