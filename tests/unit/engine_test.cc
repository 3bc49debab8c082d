#include "twilight/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "support/engine_runs.h"
#include "support/expect_error.h"

/// The engine through the public interface, on the bundled model with a small context and on tiny
/// models of the other architectures.
namespace twilight::test {
namespace {

// Two ways through the same layers differ in the order of f32 sums alone where the cache and the
// products are f32: one step of relative size sqrt(terms) 2^-24, with up to 1024 terms (16 2^-23 of
// headroom over 32 2^-24) for each of the 9 products of a layer; errors of layers add as a square
// root. In bf16 the operands of the 9 products round to 2^-9 each.
double tolerance(const Model& model, const Logits& logits, bool exact) {
  const double products = std::sqrt(9.0 * model.info().num_layers);
  return products * (exact ? 64 * 0x1p-24 : 0x1p-9) * max_abs(logits);
}

TEST(Engine, PrefillChunksAgree) {
  for (const char* path :
       {"/models/vesper-19m", "/tests/golden/tiny/llama-2-7b-chat",
        "/tests/golden/tiny/llama-3.1-8b-instruct", "/tests/golden/tiny/qwen2.5-instruct"}) {
    const Model model = Model::load(kRoot + path);
    const auto tokens = some_tokens(150, 2, model);
    for (const bool exact : {true, false}) {
      SCOPED_TRACE(path + std::string(exact ? " exact" : ""));
      Logits whole;
      for (const std::int32_t chunk : {512, 64, 17, 150, 1}) {
        if (chunk == 1 && !exact) continue;
        EngineOptions options = options_of(make_policy("dense"), 160);
        options.prefill_chunk = chunk;
        options.full_precision = exact;
        options.cache_dtype = exact ? DType::kF32 : DType::kBf16;
        Engine engine(cpu(), model, options);
        Sequence sequence = engine.cache().new_sequence();
        const Logits logits = prefill(engine, sequence, tokens);
        EXPECT_EQ(sequence.num_tokens(), 150);
        if (whole.empty()) whole = logits;
        EXPECT_LE(max_difference(logits, whole), tolerance(model, whole, exact)) << chunk;
      }
    }
  }
}

TEST(Engine, DecodeContinuesPrefill) {
  const auto tokens = some_tokens(100, 3);
  EngineOptions options = options_of(make_policy("dense"), 128);
  options.full_precision = true;
  options.cache_dtype = DType::kF32;
  options.max_seqs = 2;
  Engine engine(cpu(), vesper(), options);
  Sequence longer = engine.cache().new_sequence();
  const Logits expected = prefill(engine, longer, tokens);
  Sequence sequence = engine.cache().new_sequence();
  prefill(engine, sequence, std::span(tokens).first(90));
  const Logits actual = decode_all(engine, sequence, std::span(tokens).subspan(90));
  EXPECT_EQ(sequence.num_tokens(), 100);
  EXPECT_LE(max_difference(actual, expected), tolerance(vesper(), expected, true));
  // And prefill goes on where decode stopped.
  const auto more = some_tokens(9, 4);
  const Logits after = prefill(engine, sequence, more);
  EXPECT_LE(max_difference(after, prefill(engine, longer, more)), tolerance(vesper(), after, true));
}

TEST(Engine, ForkSharesPagesAndDiverges) {
  const auto tokens = some_tokens(120, 5);
  EngineOptions options = options_of(sparse_policy(), 160);
  options.max_seqs = 3;
  Engine engine(cpu(), vesper(), options);
  Sequence parent = engine.cache().new_sequence();
  prefill(engine, parent, tokens);
  const std::int32_t free = engine.cache().free_pages();
  Sequence child = parent.fork();
  EXPECT_EQ(engine.cache().free_pages(), free);
  EXPECT_EQ(child.num_tokens(), 120);
  const Logits by_child = decode_all(engine, child, some_tokens(12, 6));
  EXPECT_LT(engine.cache().free_pages(), free);  // the open page was copied
  const Logits by_parent = decode_all(engine, parent, some_tokens(12, 7));
  // Each as if the other had never been.
  for (const bool first : {true, false}) {
    Engine other(cpu(), vesper(), options);
    Sequence alone = other.cache().new_sequence();
    prefill(other, alone, tokens);
    const Logits logits = decode_all(other, alone, some_tokens(12, first ? 6 : 7));
    EXPECT_TRUE(same_bits(logits, first ? by_child : by_parent));
  }
  EXPECT_FALSE(same_bits(by_child, by_parent));
}

TEST(Engine, TruncateAndDecodeAgain) {
  const auto tokens = some_tokens(110, 8);
  Engine engine(cpu(), vesper(), options_of(sparse_policy()));
  Sequence sequence = engine.cache().new_sequence();
  prefill(engine, sequence, tokens);
  const auto more = some_tokens(30, 9);
  const std::int32_t free = engine.cache().free_pages();
  const Logits first = decode_all(engine, sequence, more);
  sequence.truncate(110);
  EXPECT_EQ(engine.cache().free_pages(), free);
  // Other keys fill and seal the page in between.
  decode_all(engine, sequence, some_tokens(5, 10));
  sequence.truncate(110);
  EXPECT_TRUE(same_bits(decode_all(engine, sequence, more), first));
}

TEST(Engine, OutOfPagesChangesNothing) {
  EngineOptions options = options_of(sparse_policy(), 256);
  options.max_seqs = 2;
  options.cache_tokens = 256;  // 18 pages for both
  options.prefill_chunk = 32;
  Engine engine(cpu(), vesper(), options);
  Sequence first = engine.cache().new_sequence();
  const auto tokens = some_tokens(200, 11);
  prefill(engine, first, tokens);
  {
    Sequence second = engine.cache().new_sequence();
    prefill(engine, second, std::span(tokens).first(10));
    const std::int32_t free = engine.cache().free_pages();
    // More than is left, though its first chunks would fit.
    EXPECT_EQ(engine.prefill(second, std::span(tokens).first(150)), Engine::Status::kOutOfPages);
    EXPECT_EQ(second.num_tokens(), 10);
    EXPECT_EQ(engine.cache().free_pages(), free);
    prefill(engine, second, std::span(tokens).first(16 * free + 6));
    EXPECT_EQ(engine.cache().free_pages(), 0);
    // A step of both: the first has room in its page, the second does not.
    Sequence* const batch[] = {&first, &second};
    Logits logits(2 * static_cast<std::size_t>(vesper().info().vocab_size), -3.0F);
    const std::int32_t next[] = {5, 6};
    const std::int32_t length = second.num_tokens();
    EXPECT_EQ(engine.decode(batch, next, logits), Engine::Status::kOutOfPages);
    EXPECT_EQ(first.num_tokens(), 200);
    EXPECT_EQ(second.num_tokens(), length);
    for (const float logit : logits) ASSERT_EQ(logit, -3.0F);
  }
  EXPECT_GT(engine.cache().free_pages(), 0);
  const Logits logits = decode_all(engine, first, some_tokens(20, 12));
  Engine fresh(cpu(), vesper(), options);
  Sequence alone = fresh.cache().new_sequence();
  prefill(fresh, alone, tokens);
  EXPECT_TRUE(same_bits(logits, decode_all(fresh, alone, some_tokens(20, 12))));
}

TEST(Engine, PolicyChangesOnAFilledCache) {
  const auto tokens = some_tokens(300, 13);
  const auto next = some_tokens(20, 14);
  for (const char* preset : {"paper", "paper-full", "streaming", "quest:64"}) {
    SCOPED_TRACE(preset);
    const SparsePolicy policy = sparse_policy(preset);
    Engine changed(cpu(), vesper(), options_of(make_policy("dense")));
    Sequence a = changed.cache().new_sequence();
    prefill(changed, a, tokens);
    changed.set_policy(policy);
    EXPECT_EQ(changed.policy().name, preset);
    Engine fresh(cpu(), vesper(), options_of(policy));
    Sequence b = fresh.cache().new_sequence();
    prefill(fresh, b, tokens);
    EXPECT_TRUE(same_bits(decode_all(changed, a, next), decode_all(fresh, b, next)));
    EXPECT_GT(fresh.totals().sparse_layers, 0);
    for (std::int32_t layer = 0; layer < vesper().info().num_layers; ++layer) {
      EXPECT_EQ(changed.last_stats(layer)[0].kept, fresh.last_stats(layer)[0].kept);
      EXPECT_EQ(changed.last_stats(layer)[0].attended, fresh.last_stats(layer)[0].attended);
    }
  }
}

// Label channels: another set, forks, truncation and a change of policy leave what a new cache has.
TEST(Engine, LabelChannelsOnAFilledCache) {
  const ModelInfo& info = vesper().info();
  const auto policy_with = [&](std::int32_t first) {
    SparsePolicy policy = sparse_policy();
    policy.selector = "double_sparsity";
    policy.num_labels = 16;
    for (std::int32_t i = 0; i < info.num_layers * info.num_kv_heads * 16; ++i) {
      policy.labels.push_back(first + 2 * (i % 16));
    }
    return policy;
  };
  const auto tokens = some_tokens(300, 13);
  const auto next = some_tokens(20, 14);
  const auto fresh = [&](const SparsePolicy& policy) {
    Engine engine(cpu(), vesper(), options_of(policy));
    Sequence sequence = engine.cache().new_sequence();
    prefill(engine, sequence, tokens);
    return decode_all(engine, sequence, next);
  };
  const Logits low = fresh(policy_with(0));
  const Logits high = fresh(policy_with(1));
  EXPECT_FALSE(same_bits(low, high));
  Engine engine(cpu(), vesper(), options_of(make_policy("dense")));
  Sequence sequence = engine.cache().new_sequence();
  prefill(engine, sequence, tokens);
  for (const std::int32_t first : {0, 1, 0}) {
    engine.set_policy(policy_with(first));
    EXPECT_TRUE(engine.serves(policy_with(first)));
    EXPECT_FALSE(engine.serves(policy_with(1 - first)));
    Sequence child = sequence.fork();
    EXPECT_TRUE(same_bits(decode_all(engine, child, next), first == 0 ? low : high));
    decode_all(engine, child, some_tokens(20, 15));
    child.truncate(300);
    EXPECT_TRUE(same_bits(decode_all(engine, child, next), first == 0 ? low : high));
  }
  SparsePolicy bad = policy_with(0);
  bad.labels.resize(16);
  expect_error(ErrorCode::kInvalidArgument, {"[kv_cache]", "labels, got 16 channels", "accepted"},
               [&] { engine.set_policy(bad); });
  bad = policy_with(0);
  bad.labels.back() = info.head_dim;
  expect_error(ErrorCode::kInvalidArgument, {"[kv_cache]", "labels, got channel", "accepted 0 to"},
               [&] { engine.set_policy(bad); });
  Sequence after = sequence.fork();
  EXPECT_TRUE(same_bits(decode_all(engine, after, next), low));
}

TEST(Engine, BatchEqualsEachAlone) {
  EngineOptions options = options_of(sparse_policy(), 320);
  // More rows than the matrix-vector kernels would take by themselves.
  constexpr std::size_t kBatch = 11;
  options.max_seqs = kBatch;
  Engine engine(cpu(), vesper(), options);
  const std::size_t lengths[kBatch] = {300, 1, 77, 16, 33, 2, 5, 40, 9, 64, 15};
  const auto vocab = static_cast<std::size_t>(vesper().info().vocab_size);
  std::vector<Sequence> together;
  std::vector<Logits> alone;
  for (std::size_t i = 0; i < kBatch; ++i) {
    const auto tokens = some_tokens(lengths[i], 20 + i);
    Sequence one = engine.cache().new_sequence();
    prefill(engine, one, tokens);
    together.push_back(one.fork());
    alone.push_back(decode_all(engine, one, some_tokens(6, 30 + i)));
  }
  std::vector<Sequence*> batch;
  batch.reserve(together.size());
  for (Sequence& sequence : together) batch.push_back(&sequence);
  Logits logits(kBatch * vocab);
  engine.reset_totals();
  for (std::size_t step = 0; step < 6; ++step) {
    std::int32_t next[kBatch];
    for (std::size_t i = 0; i < kBatch; ++i) next[i] = some_tokens(6, 30 + i)[step];
    ASSERT_EQ(engine.decode(batch, next, logits), Engine::Status::kOk);
  }
  for (std::size_t i = 0; i < kBatch; ++i) {
    EXPECT_TRUE(same_bits(std::span(logits).subspan(i * vocab, vocab), alone[i])) << i;
  }
  EXPECT_EQ(engine.totals().steps, 6 * static_cast<std::int64_t>(kBatch));
  EXPECT_EQ(engine.totals().sparse_layers + engine.totals().dense_layers,
            6 * static_cast<std::int64_t>(kBatch) * vesper().info().num_layers);
  EXPECT_LT(engine.totals().bytes_read, engine.totals().bytes_dense);
}

TEST(Engine, ThreadsDoNotChangeTheTokens) {
  const std::string text = "The special magic number for quiet harbor is 4815162.\n";
  std::string filler;
  for (int i = 0; i < 20; ++i) filler += "It was a cold and quiet morning by the sea.\n";
  const auto tokens = vesper().encode(filler + text + filler +
                                      "Question: What is the special magic number for quiet "
                                      "harbor?\nAnswer: The special magic number for quiet harbor "
                                      "is");
  std::vector<std::int32_t> expected;
  Logits last;
  for (const int threads : {1, 2, 3}) {
    Engine engine(cpu(threads), vesper(), options_of(sparse_policy(), 1024));
    Sequence sequence = engine.cache().new_sequence();
    const Logits logits = prefill(engine, sequence, tokens);
    if (threads == 1) last = logits;
    EXPECT_TRUE(same_bits(logits, last)) << threads;
    GenerateOptions options;
    options.max_tokens = 16;
    options.stop_at_eos = false;
    const GenerateResult result = generate(engine, sequence, logits, options);
    if (threads == 1) expected = result.tokens;
    EXPECT_EQ(result.tokens, expected) << threads;
  }
  EXPECT_NE(vesper().decode(expected).find("4815162"), std::string::npos)
      << vesper().decode(expected);
}

TEST(Engine, ProgressCancelsAndKeepsWhatWasDone) {
  EngineOptions options = options_of(sparse_policy());
  options.prefill_chunk = 32;
  Engine engine(cpu(), vesper(), options);
  Sequence sequence = engine.cache().new_sequence();
  const auto tokens = some_tokens(100, 40);
  std::vector<std::int64_t> seen;
  const auto status =
      engine.prefill(sequence, tokens, {}, [&](std::int64_t done, std::int64_t all) {
        EXPECT_EQ(all, 100);
        seen.push_back(done);
        return done < 64;
      });
  EXPECT_EQ(status, Engine::Status::kCancelled);
  EXPECT_EQ(sequence.num_tokens(), 64);
  EXPECT_EQ(seen, (std::vector<std::int64_t>{0, 32, 64}));
  // The rest gives what an undisturbed run gives.
  const Logits resumed = prefill(engine, sequence, std::span(tokens).subspan(64));
  Engine other(cpu(), vesper(), options);
  Sequence whole = other.cache().new_sequence();
  EXPECT_TRUE(same_bits(resumed, prefill(other, whole, tokens)));
}

TEST(Engine, ErrorsLeaveTheSequenceAlone) {
  EngineOptions options = options_of(sparse_policy(), 128);
  options.prefill_chunk = 16;
  options.max_seqs = 2;
  Engine engine(cpu(), vesper(), options);
  Sequence sequence = engine.cache().new_sequence();
  const auto tokens = some_tokens(40, 41);
  prefill(engine, sequence, tokens);
  const std::int32_t free = engine.cache().free_pages();
  auto bad = some_tokens(40, 42);
  const auto expect_refused = [&](std::initializer_list<std::string> parts, const auto& call) {
    expect_error(ErrorCode::kInvalidArgument, parts, call);
    EXPECT_EQ(sequence.num_tokens(), 40);
    EXPECT_EQ(engine.cache().free_pages(), free);
  };
  Sequence* const batch[] = {&sequence};
  Sequence* const twice[] = {&sequence, &sequence};
  Logits logits(static_cast<std::size_t>(vesper().info().vocab_size));
  for (const std::int32_t token : {-1, vesper().info().vocab_size}) {
    bad.back() = token;  // in the last chunk
    expect_refused({"token id", std::to_string(token), "0 to 4095"},
                   [&] { (void)engine.prefill(sequence, bad, logits); });
    expect_refused({"token id", std::to_string(token)}, [&] {
      (void)engine.decode(batch, {&token, 1}, logits);
    });
  }
  expect_refused({"context", "141", "128"},
                 [&] { (void)engine.prefill(sequence, some_tokens(101, 1)); });
  expect_refused({"number of tokens", "got 0"}, [&] { (void)engine.prefill(sequence, {}); });
  expect_refused({"number of logits", "got 7"},
                 [&] { (void)engine.prefill(sequence, tokens, std::span(logits).first(7)); });
  const std::int32_t two[] = {1, 2};
  expect_refused({"number of logits", "got 7"}, [&] {
    (void)engine.decode(batch, {two, 1}, std::span(logits).first(7));
  });
  expect_refused({"number of tokens", "got 2"}, [&] { (void)engine.decode(batch, two, logits); });
  Logits for_two(2 * logits.size());
  expect_refused({"twice"}, [&] { (void)engine.decode(twice, two, for_two); });
  expect_refused({"layer", "got 99"}, [&] { engine.cache().read(sequence, 99, nullptr, nullptr); });
  expect_refused({"41"}, [&] { sequence.truncate(41); });
  SparsePolicy wrong = sparse_policy();
  wrong.p = 0;
  expect_refused({"p", "got 0"}, [&] { engine.set_policy(wrong); });
  EXPECT_EQ(engine.policy().p, sparse_policy().p);
  // Decode past the end of the context.
  prefill(engine, sequence, some_tokens(88, 43));
  const std::int32_t token = 1;
  expect_error(ErrorCode::kInvalidArgument, {"129", "128"}, [&] {
    (void)engine.decode(batch, {&token, 1}, logits);
  });
  EXPECT_EQ(sequence.num_tokens(), 128);
}

TEST(Engine, BadOptionsNameTheField) {
  struct Bad {
    const char* field;
    void (*edit)(EngineOptions&);
  };
  const Bad bads[] = {{"max_context", [](EngineOptions& o) { o.max_context = -1; }},
                      {"max_context", [](EngineOptions& o) { o.max_context = 1 << 20; }},
                      {"max_seqs", [](EngineOptions& o) { o.max_seqs = 0; }},
                      {"cache_tokens", [](EngineOptions& o) { o.cache_tokens = -1; }},
                      {"page_size", [](EngineOptions& o) { o.page_size = 0; }},
                      {"page_size", [](EngineOptions& o) { o.page_size = 257; }},
                      {"prefill_chunk", [](EngineOptions& o) { o.prefill_chunk = 0; }},
                      {"p, got 2", [](EngineOptions& o) { o.policy.p = 2; }}};
  for (const Bad& bad : bads) {
    SCOPED_TRACE(bad.field);
    EngineOptions options = options_of(sparse_policy(), 64);
    bad.edit(options);
    expect_error(ErrorCode::kInvalidArgument, {bad.field, "got ", "accepted "},
                 [&] { Engine(cpu(1), vesper(), options); });
  }
}

// The crossover is 256 times a power of two, 0, or the whole context.
TEST(Engine, MeasuresWhereSparseStarts) {
  for (const std::int32_t context : {128, 2048}) {
    SparsePolicy policy = make_policy("paper");
    EngineOptions options = options_of(policy, context);
    Engine engine(cpu(), vesper(), options);
    const std::int32_t below = engine.policy().dense_below_tokens;
    bool fits = below == 0 || below == context;
    for (std::int32_t n = 256; n < context; n *= 2) fits = fits || below == n;
    EXPECT_TRUE(fits) << below << " of " << context;
    if (context == 128) {
      EXPECT_EQ(below, context);
    }
  }
  DeviceOptions ref;
  ref.device = "ref";
  Engine engine(Device(ref), vesper(), options_of(make_policy("paper"), 128));
  EXPECT_EQ(engine.policy().dense_below_tokens, 0);
}

}  // namespace
}  // namespace twilight::test
