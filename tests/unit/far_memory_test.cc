#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "support/engine_runs.h"
#include "support/expect_error.h"
#include "support/expect_stats.h"
#include "support/far_device.h"

/// The engine on a device whose memory the host cannot touch (FarBackend): the same bits as on the
/// host, with recorded steps, shared pages, statistics and changes of policy.
namespace twilight::test {
namespace {

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

// What each row of a step asks for: a token drawn one way or another, logits, both, nothing.
std::vector<DecodeRow> mixed_rows(std::size_t count, std::vector<Sampler>& samplers,
                                  std::vector<Logits>& logits, int step) {
  std::vector<DecodeRow> rows(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t kind = (i + static_cast<std::size_t>(step) / 3) % 7;
    if (kind != 2 && kind != 6) rows[i].draw = samplers[i].draw();
    if (kind == 2 || kind == 3 || kind == 4) rows[i].logits = logits[i];
  }
  return rows;
}

// Drawn tokens are the sampler's for the logits there would have been, on the host and on a device,
// for batches that are launched whole and larger ones.
TEST(FarMemory, StepsDrawTheTokensOfTheSampler) {
  const auto vocab = static_cast<std::size_t>(tiny().info().vocab_size);
  for (const std::size_t count : {std::size_t{7}, std::size_t{70}}) {
    FarDevice far;
    const Device host = cpu();
    std::vector<std::vector<std::int32_t>> texts[2];
    int side = 0;
    for (const Device& device : {host, far.device}) {
      EngineOptions options = options_of(policy_of("adaptive"), 320);
      options.max_seqs = static_cast<std::int32_t>(count) + 1;
      options.cache_tokens = 64 * options.max_seqs;
      Engine engine(device, tiny(), options);
      std::vector<Sequence> sequences;
      std::vector<Sequence*> batch;
      batch.reserve(count);
      std::vector<Sampler> samplers;
      std::vector<Sampler> shadows;
      std::vector<Logits> logits(count, Logits(vocab));
      Sequence start = engine.cache().new_sequence();
      prefill(engine, start, some_tokens(33, 1, tiny()));
      for (std::size_t i = 0; i < count; ++i) {
        sequences.push_back(start.fork());
        const SamplingOptions sampling{.temperature = 0.4 * static_cast<double>(i % 4),
                                       .top_k = i % 3 == 0 ? 30 : 0,
                                       .top_p = i % 2 == 0 ? 0.9 : 1,
                                       .seed = i};
        samplers.emplace_back(sampling);
        shadows.emplace_back(sampling);
      }
      for (Sequence& sequence : sequences) batch.push_back(&sequence);
      std::vector<std::int32_t> tokens = some_tokens(count, 3, tiny());
      for (int step = 0; step < 9; ++step) {
        // The logits of the same step, on sequences that are taken back.
        std::vector<Sequence> copies;
        std::vector<Sequence*> others;
        copies.reserve(count);
        others.reserve(count);
        for (Sequence& sequence : sequences) copies.push_back(sequence.fork());
        for (Sequence& sequence : copies) others.push_back(&sequence);
        Logits all(count * vocab);
        ASSERT_EQ(engine.decode(others, tokens, all), Engine::Status::kOk);
        copies.clear();
        std::vector<DecodeRow> rows = mixed_rows(count, samplers, logits, step);
        ASSERT_EQ(engine.decode_rows(batch, tokens, rows), Engine::Status::kOk);
        for (std::size_t i = 0; i < count; ++i) {
          const std::span<const float> row(all.data() + i * vocab, vocab);
          EXPECT_EQ(rows[i].token, rows[i].draw ? shadows[i].sample(row) : -1) << i;
          if (!rows[i].logits.empty()) {
            EXPECT_TRUE(same_bits(logits[i], Logits(row.begin(), row.end()))) << i;
          }
          tokens[i] = rows[i].draw ? rows[i].token : 5;
        }
        texts[side].push_back(tokens);
      }
      ++side;
    }
    EXPECT_EQ(texts[0], texts[1]);
    EXPECT_EQ(far.backend->replays() > 0, count <= 64);
  }
}

TEST(FarMemory, DrawnTokensAloneComeBack) {
  FarDevice far;
  EngineOptions options = options_of(policy_of("paper"), 320);
  options.max_seqs = 3;
  Engine engine(far.device, tiny(), options);
  engine.collect_stats(false);
  Sequence first = engine.cache().new_sequence();
  prefill(engine, first, some_tokens(40, 1, tiny()));
  Sequence second = first.fork();
  Sequence third = first.fork();
  Sequence* const batch[] = {&first, &second, &third};
  const std::vector<std::int32_t> tokens = {1, 2, 3};
  Sampler sampler({.temperature = 1, .seed = 4});
  Logits logits(2 * static_cast<std::size_t>(tiny().info().vocab_size));
  const std::size_t vocab = logits.size() / 2;
  const FarMemory& memory = far.backend->far_memory();
  const auto moved = [&](std::vector<DecodeRow> rows) {
    const std::int64_t before = memory.downloaded_bytes();
    EXPECT_EQ(engine.decode_rows(batch, tokens, rows), Engine::Status::kOk);
    return memory.downloaded_bytes() - before;
  };
  const auto row_bytes = static_cast<std::int64_t>(vocab * sizeof(float));
  const DecodeRow drawn{.draw = sampler.draw()};
  const DecodeRow shown{.logits = std::span(logits).first(vocab)};
  const DecodeRow next{.logits = std::span(logits).subspan(vocab)};
  for (int i = 0; i < 3; ++i) {  // run, recorded, replayed
    EXPECT_EQ(moved({drawn, drawn, drawn}), 12);
    EXPECT_EQ(moved({drawn, {}, {.draw = TokenDraw{}}}), 12);
    EXPECT_EQ(moved({{}, {.draw = TokenDraw{}}, {}}), 12);
    EXPECT_EQ(moved({drawn, shown, drawn}), 12 + row_bytes);
    EXPECT_EQ(moved({{}, shown, next}), 2 * row_bytes);
    EXPECT_EQ(moved({{}, {}, {}}), 0);
  }
}

TEST(FarMemory, RowsAreChecked) {
  FarDevice far;
  const Device host = cpu();
  for (const Device& device : {host, far.device}) {
    Engine engine(device, tiny(), options_of(policy_of("paper"), 320));
    Sequence sequence = engine.cache().new_sequence();
    prefill(engine, sequence, some_tokens(20, 1, tiny()));
    Sequence* const batch[] = {&sequence};
    const std::int32_t token = 1;
    const auto refused = [&](const char* what, std::vector<DecodeRow> rows) {
      expect_error(ErrorCode::kInvalidArgument, {what, "got ", "accepted "}, [&] {
        (void)engine.decode_rows(batch, {&token, 1}, rows);
      });
    };
    Logits logits(3);
    refused("number of rows", {});
    refused("number of logits", {{.logits = logits}});
    refused("temperature", {{.draw = TokenDraw{.temperature = -1}}});
    refused("top_k", {{.draw = TokenDraw{.top_k = -1}}});
    refused("top_p", {{.draw = TokenDraw{.top_p = 0}}});
    refused("uniform", {{.draw = TokenDraw{.uniform = 1}}});
    EXPECT_EQ(sequence.num_tokens(), 20);
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
