#include "model/gguf.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/gguf_checkpoint.h"
#include "model/gguf_config.h"
#include "model/tokenizer/gguf_tokenizer.h"
#include "model/weights.h"
#include "support/expect_error.h"
#include "support/gguf_writer.h"
#include "support/temp_dir.h"

namespace twilight {
namespace {

using test::expect_error;
using test::gguf_bytes;
using test::gguf_string;
using test::GgufWriter;
using test::TempDir;

constexpr auto kInvalid = ErrorCode::kInvalidFile;
constexpr auto kUnsupported = ErrorCode::kUnsupported;

GgufHeader parse(const std::string& file) {
  return parse_gguf(std::as_bytes(std::span(file.data(), file.size())), "m.gguf");
}

void expect_bad(const std::string& file, std::initializer_list<std::string> parts,
                ErrorCode code = kInvalid) {
  expect_error(code, {"[gguf] m.gguf: "}, [&] { (void)parse(file); });
  expect_error(code, parts, [&] { (void)parse(file); });
}

std::string header(std::uint32_t version, std::uint64_t tensors, std::uint64_t pairs,
                   const std::string& rest = {}) {
  return "GGUF" + gguf_bytes(version) + gguf_bytes(tensors) + gguf_bytes(pairs) + rest;
}

TEST(Gguf, ReadsEveryTypeOfValue) {
  GgufWriter w;
  w.raw("u8", 0, gguf_bytes<std::uint8_t>(200));
  w.raw("i8", 1, gguf_bytes<std::int8_t>(-5));
  w.raw("u16", 2, gguf_bytes<std::uint16_t>(60000));
  w.raw("i16", 3, gguf_bytes<std::int16_t>(-300));
  w.u32("u32", 4000000000U);
  w.raw("i32", 5, gguf_bytes<std::int32_t>(-70000));
  w.f32("f32", 0.5F);
  w.boolean("yes", true);
  w.string("text", "a\nb");
  w.raw("u64", 10, gguf_bytes<std::uint64_t>(std::numeric_limits<std::uint64_t>::max()));
  w.raw("i64", 11, gguf_bytes<std::int64_t>(-1));
  w.raw("f64", 12, gguf_bytes(0.25));
  w.strings("names", {"x", "", "yz"});
  w.array<float>("floats", 6, {1, 2});
  w.array<std::int32_t>("ints", 5, {3, -1});
  w.raw("nested", 9,
        gguf_bytes<std::uint32_t>(9) + gguf_bytes<std::uint64_t>(1) + gguf_bytes<std::uint32_t>(0) +
            gguf_bytes<std::uint64_t>(2) + "ab");
  const TempDir dir;
  const GgufFile f(dir.write("m.gguf", w.file()));
  EXPECT_EQ(f.integer("u8", 0, 255), 200);
  EXPECT_EQ(f.integer("i8", -10, 0), -5);
  EXPECT_EQ(f.integer("u16", 0, 1 << 20), 60000);
  EXPECT_EQ(f.integer("i16", -1000, 0), -300);
  EXPECT_EQ(f.integer("u32", 0, std::int64_t{1} << 40), 4000000000);
  EXPECT_EQ(f.integer("i32", -100000, 0), -70000);
  EXPECT_EQ(f.number("f32", 0, 1), 0.5);
  EXPECT_EQ(f.number("f64", 0, 1), 0.25);
  EXPECT_EQ(f.number("u8", 0, 255), 200);
  EXPECT_TRUE(f.boolean_or("yes", false));
  EXPECT_EQ(f.string("text"), "a\nb");
  EXPECT_EQ(f.strings("names"), (std::vector<std::string_view>{"x", "", "yz"}));
  EXPECT_EQ(f.floats("floats"), (std::vector<float>{1, 2}));
  EXPECT_EQ(f.integers("ints", -1, 3), (std::vector<std::int32_t>{3, -1}));
  EXPECT_EQ(f.integer_or("missing", 0, 1, 7), 7);
  EXPECT_TRUE(f.strings("missing").empty());

  const auto bad = [&](const char* part, const std::function<void()>& call) {
    expect_error(kInvalid, {"[gguf] " + f.path() + ": ", part}, call);
  };
  bad("u64, got 18446744073709551615, accepted an integer from 0 to 9",
      [&] { (void)f.integer("u64", 0, 9); });
  bad("text, got 'a\\x0ab', accepted an integer", [&] { (void)f.integer("text", 0, 9); });
  bad("f32, got 0.5, accepted an integer", [&] { (void)f.integer("f32", 0, 9); });
  bad("missing, got nothing", [&] { (void)f.integer("missing", 0, 9); });
  bad("i8, got -5, accepted a number from 0 to 1", [&] { (void)f.number("i8", 0, 1); });
  bad("u8, got 200, accepted true or false", [&] { (void)f.boolean_or("u8", true); });
  bad("yes, got true, accepted a string", [&] { (void)f.string("yes"); });
  bad("ints, got an array of 2, accepted an array of strings", [&] { (void)f.strings("ints"); });
  bad("names, got an array of 3", [&] { (void)f.floats("names"); });
  bad("names, got an array of 3", [&] { (void)f.integers("names", 0, 1); });
  bad("ints, got an array of 2", [&] { (void)f.integers("ints", 0, 3); });
  bad("nested, got an array of 1", [&] { (void)f.integers("nested", 0, 3); });
  bad("text, got", [&] { (void)f.floats("text"); });
}

TEST(Gguf, ReadsTensorsInOrderOfPosition) {
  GgufWriter w;
  w.tensor("b", 0, {2, 3}, std::string(24, 'x'));
  w.tensor("a", 3, {64}, std::string(40, 'y'));
  w.tensor("other", 23, {256}, std::string(136, 'z'));
  const std::string file = w.file();
  const auto h = parse(file);
  ASSERT_EQ(h.tensors.size(), 3U);
  EXPECT_EQ(h.tensors[0].name, "b");
  EXPECT_EQ(h.tensors[0].shape, (std::vector<std::int64_t>{3, 2}));
  EXPECT_EQ(h.tensors[0].bytes, 24);
  EXPECT_EQ(h.tensors[1].type, WeightType::kQ4_1);
  EXPECT_EQ(h.tensors[1].bytes, 40);
  EXPECT_EQ(file.substr(static_cast<std::size_t>(h.tensors[1].begin), 3), "yyy");
  EXPECT_FALSE(h.tensors[2].type.has_value());
  EXPECT_EQ(gguf_tensor_type_name(h.tensors[2].type_number), "IQ4_XS");
  EXPECT_EQ(gguf_tensor_type_name(77), "type 77");
}

TEST(Gguf, RejectsBadStarts) {
  expect_bad("", {"first bytes, got '', accepted 'GGUF'"});
  expect_bad("PK\x03\x04", {"first bytes, got 'PK\\x03\\x04'"});
  expect_bad("GGUF", {"size, got 4 bytes", "truncated"});
  expect_bad("version https://git-lfs.github.com/spec/v1\n", {"Git LFS pointer"});
  expect_bad(header(1, 0, 0), {"version, got 1, accepted 2 or 3"}, kUnsupported);
  expect_bad(header(4, 0, 0), {"version, got 4"}, kUnsupported);
  expect_bad(header(0x03000000, 0, 0), {"big-endian"}, kUnsupported);
  EXPECT_TRUE(parse(header(2, 0, 0)).tensors.empty());
}

TEST(Gguf, RejectsCountsThatTheFileCannotHold) {
  constexpr auto kHuge = std::numeric_limits<std::uint64_t>::max();
  expect_bad(header(3, 0, kHuge), {"metadata count, got 18446744073709551615, accepted at most 0"});
  expect_bad(header(3, kHuge, 0), {"tensor count, got 18446744073709551615"});
  expect_bad(header(3, 0, 1), {"metadata count, got 1"});
  for (const std::uint64_t count : {kHuge, kHuge / 4 + 1, std::uint64_t{1} << 40}) {
    for (const std::uint32_t element : {4U, 8U, 9U}) {
      GgufWriter w;
      w.raw("k", 9, gguf_bytes(element) + gguf_bytes(count));
      expect_bad(w.file(), {"'k', got "});
    }
    GgufWriter w;
    w.raw("k", 8, gguf_bytes(count) + "abc");
    expect_bad(w.file(), {"'k', got " + std::to_string(count) + " bytes, accepted at most 3"});
  }
  expect_bad(header(3, 0, 1, gguf_bytes(kHuge) + std::string(20, 'a')), {"key 0, got 18446744"});
}

TEST(Gguf, RejectsEveryTruncation) {
  GgufWriter w;
  w.strings("names", {"x", "yz"});
  w.u32("n", 1);
  w.tensor("a", 0, {4, 2}, std::string(32, 'x'));
  w.tensor("b", 8, {32}, std::string(34, 'y'));
  const std::string file = w.file();
  EXPECT_EQ(parse(file).tensors.size(), 2U);
  for (std::size_t size = 0; size < file.size(); ++size) {
    expect_error(kInvalid, {"[gguf] m.gguf: ", "got"}, [&] { (void)parse(file.substr(0, size)); });
  }
}

TEST(Gguf, RejectsBadMetadata) {
  GgufWriter w;
  w.u32("k", 1);
  w.u32("k", 1);
  expect_bad(w.file(), {"key 'k', got it twice"});
  w = {};
  w.u32("", 1);
  expect_bad(w.file(), {"key 0, got 0 bytes"});
  w = {};
  w.raw("k", 13, "12345678");
  expect_bad(w.file(), {"'k' type, got 13, accepted 0 to 12"});
  w = {};
  w.raw("k", 7, "\2");
  w.string("pad", "enough bytes");
  expect_bad(w.file(), {"'k', got 2, accepted a boolean"});
  w = {};
  w.raw("k", 9, gguf_bytes<std::uint32_t>(7) + gguf_bytes<std::uint64_t>(2) + "\1\3");
  expect_bad(w.file(), {"'k', got 3, accepted a boolean"});
  w = {};
  std::string nested;
  for (int i = 0; i < 20; ++i)
    nested += gguf_bytes<std::uint32_t>(9) + gguf_bytes<std::uint64_t>(1);
  w.raw("k", 9, nested + std::string(64, '\0'));
  expect_bad(w.file(), {"arrays nested deeper, accepted at most 8"});
  for (const std::uint32_t alignment : {0U, 3U, 48U, 1U << 21}) {
    w = {};
    w.u32("general.alignment", alignment);
    expect_bad(w.file(), {"general.alignment, got " + std::to_string(alignment), "power of two"});
  }
  w = {};
  w.string("general.alignment", "32");
  expect_bad(w.file(), {"general.alignment, got '32'"});
}

TEST(Gguf, RejectsBadTensors) {
  const auto one = [](std::uint32_t type, const std::vector<std::uint64_t>& sizes,
                      std::uint64_t offset, std::size_t data) {
    GgufWriter w;
    w.tensor_at("t", type, sizes, offset);
    return w.file() + std::string(data, 'x');
  };
  EXPECT_EQ(parse(one(0, {8}, 0, 32)).tensors.size(), 1U);
  expect_bad(one(0, {}, 0, 64), {"tensor 't' rank, got 0, accepted 1 to 4"});
  expect_bad(one(0, {1, 1, 1, 1, 1}, 0, 64), {"tensor 't' rank, got 5"});
  expect_bad(one(0, {0}, 0, 64), {"tensor 't' shape, got a size of 0"});
  expect_bad(one(0, {std::uint64_t{1} << 63}, 0, 64), {"tensor 't' shape, got a size of"});
  expect_bad(one(0, {1U << 31, 1U << 31, 4}, 0, 64), {"more elements than 64 bits"});
  expect_bad(one(0, {std::uint64_t{1} << 62}, 0, 64), {"more bytes than 64 bits"});
  expect_bad(one(8, {33}, 0, 64), {"tensor 't' row, got 33 elements, accepted multiples of 32"});
  expect_bad(one(14, {128, 2}, 0, 4096), {"row, got 128 elements, accepted multiples of 256"});
  expect_bad(one(0, {8}, 4, 64), {"tensor 't' offset, got 4, accepted multiples of 32"});
  expect_bad(one(0, {8}, 64, 32), {"tensor 't' data, got 32 bytes at offset 64", "truncated"});
  expect_bad(one(0, {8}, std::numeric_limits<std::uint64_t>::max() - 31, 32),
             {"tensor 't' offset"});
  GgufWriter w;
  w.tensor("t", 0, {16}, std::string(64, 'x'));
  w.tensor_at("u", 0, {8}, 32);
  expect_bad(w.file(), {"tensor 'u' data, got a range that overlaps 't'"});
  w = {};
  w.tensor("t", 0, {8}, std::string(32, 'x'));
  w.tensor("t", 0, {8}, std::string(32, 'x'));
  expect_bad(w.file(), {"tensor 't', got it twice"});
}

TEST(Gguf, FindsTheFileOfAFolder) {
  const TempDir dir;
  EXPECT_FALSE(find_gguf(dir.path()).has_value());
  EXPECT_FALSE(find_gguf(dir.path() + "/none").has_value());
  const std::string one = dir.write("one.gguf", "x");
  EXPECT_EQ(find_gguf(dir.path()), one);
  EXPECT_EQ(find_gguf(one), one);
  const std::string two = dir.write("two.gguf", "x");
  expect_error(kInvalid, {dir.path(), "got several *.gguf"}, [&] { (void)find_gguf(dir.path()); });
  EXPECT_EQ(find_gguf(two), two);
  (void)dir.write("config.json", "{}");
  EXPECT_FALSE(find_gguf(dir.path()).has_value());
}

TEST(Gguf, NoticesAFileThatIsWrittenTo) {
  const TempDir dir;
  const std::string path = dir.write("m.gguf", GgufWriter().file());
  const GgufFile file(path);
  file.file().check_unchanged();
  std::filesystem::rename(dir.write("new.gguf", GgufWriter().file() + "more"), path);
  file.file().check_unchanged();  // another file now: the mapped one is as it was
  const GgufFile second(path);
  (void)dir.write("m.gguf", GgufWriter().file());
  expect_error(ErrorCode::kIo, {path, "written to while it was read"},
               [&] { second.file().check_unchanged(); });
}

// --- configuration and tensors ----------------------------------------------------------------

// A model of 1 layer: hidden 8, 2 heads of 4, inner 6, 5 tokens. Element r of a matrix row is the
// row's number, so that an order of rows can be seen.
class ModelWriter {
 public:
  explicit ModelWriter(std::string architecture = "llama") : name_(std::move(architecture)) {
    w.string("general.architecture", name_);
    w.string("tokenizer.ggml.model", "llama");
    w.strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "<|eot_id|>", "a"});
    w.array<std::int32_t>("tokenizer.ggml.token_type", 5, {2, 3, 3, 3, 1});
    w.array<float>("tokenizer.ggml.scores", 6, {0, 0, 0, 0, -1});
    w.u32("tokenizer.ggml.bos_token_id", 1);
    w.u32("tokenizer.ggml.eos_token_id", 2);
  }
  // `except` leaves a key out; a test adds its own.
  void sizes(std::string_view except = {}) {
    const std::vector<std::pair<std::string, std::uint32_t>> all = {
        {".block_count", 1},          {".embedding_length", 8},        {".feed_forward_length", 6},
        {".attention.head_count", 2}, {".attention.head_count_kv", 1}, {".context_length", 64}};
    for (const auto& [suffix, value] : all) {
      if (suffix != except) w.u32(name_ + suffix, value);
    }
    if (except != ".attention.layer_norm_rms_epsilon") {
      w.f32(name_ + ".attention.layer_norm_rms_epsilon", 1e-5F);
    }
  }
  void matrix(const std::string& name, std::uint64_t rows, std::uint64_t cols) {
    std::string data;
    for (std::uint64_t r = 0; r < rows; ++r) {
      for (std::uint64_t c = 0; c < cols; ++c) data += gguf_bytes(static_cast<float>(r));
    }
    w.tensor(name, 0, rows == 1 ? std::vector{cols} : std::vector{cols, rows}, data);
  }
  void tensors(const std::string& except = {}) {
    const std::vector<std::tuple<std::string, std::uint64_t, std::uint64_t>> all = {
        {"token_embd.weight", 5, 8},        {"output_norm.weight", 1, 8},
        {"blk.0.attn_norm.weight", 1, 8},   {"blk.0.attn_q.weight", 8, 8},
        {"blk.0.attn_k.weight", 4, 8},      {"blk.0.attn_v.weight", 4, 8},
        {"blk.0.attn_output.weight", 8, 8}, {"blk.0.ffn_norm.weight", 1, 8},
        {"blk.0.ffn_gate.weight", 6, 8},    {"blk.0.ffn_up.weight", 6, 8},
        {"blk.0.ffn_down.weight", 8, 6}};
    for (const auto& [name, rows, cols] : all) {
      if (name != except) matrix(name, rows, cols);
    }
  }
  [[nodiscard]] const std::string& name() const { return name_; }
  GgufWriter w;

 private:
  std::string name_;
};

struct Loaded {
  std::shared_ptr<const GgufFile> file;
  ModelConfig config;
  ModelWeights weights;
};

Loaded load(const std::string& bytes) {
  const TempDir dir;  // the mapping outlives the folder
  Loaded out;
  out.file = std::make_shared<const GgufFile>(dir.write("m.gguf", bytes));
  out.config = gguf_config(*out.file);
  out.weights =
      load_weights(std::make_shared<const GgufCheckpoint>(out.file, out.config), out.config);
  return out;
}

std::vector<float> first_column(const TensorView& tensor) {
  std::vector<float> out;
  for (std::int64_t r = 0; r < tensor.shape[0]; ++r) {
    float value;
    std::memcpy(&value, tensor.data + r * tensor.bytes / tensor.shape[0], sizeof(value));
    out.push_back(value);
  }
  return out;
}

TEST(GgufModel, ReadsConfigurationAndTensors) {
  ModelWriter m;
  m.sizes();
  m.tensors();
  const Loaded l = load(m.w.file());
  EXPECT_EQ(l.config.architecture, Architecture::kLlama);
  EXPECT_EQ(l.config.hidden_size, 8);
  EXPECT_EQ(l.config.head_dim, 4);
  EXPECT_EQ(l.config.num_kv_heads, 1);
  EXPECT_EQ(l.config.vocab_size, 5);
  EXPECT_EQ(l.config.bos_token_id, 1);
  EXPECT_EQ(l.config.eos_token_ids, (std::vector<int>{2, 3}));  // and the end of a turn
  EXPECT_TRUE(l.config.tie_word_embeddings);
  EXPECT_EQ(l.weights.lm_head.data, l.weights.embed.data);
  EXPECT_EQ(l.weights.layers[0].down_proj.shape, (std::vector<std::int64_t>{8, 6}));
  // Pairs side by side in the file, halves in the model; values are not turned.
  EXPECT_EQ(first_column(l.weights.layers[0].q_proj), (std::vector<float>{0, 2, 1, 3, 4, 6, 5, 7}));
  EXPECT_EQ(first_column(l.weights.layers[0].k_proj), (std::vector<float>{0, 2, 1, 3}));
  EXPECT_EQ(first_column(l.weights.layers[0].v_proj), (std::vector<float>{0, 1, 2, 3}));
}

TEST(GgufModel, QwenRowsAreInOrderAndQwen3NormsItsHeads) {
  ModelWriter m("qwen3");
  m.sizes();
  m.tensors();
  m.matrix("blk.0.attn_q_norm.weight", 1, 4);
  m.matrix("blk.0.attn_k_norm.weight", 1, 4);
  const Loaded l = load(m.w.file());
  EXPECT_TRUE(l.config.qk_norm);
  EXPECT_TRUE(static_cast<bool>(l.weights.layers[0].k_norm));
  EXPECT_EQ(first_column(l.weights.layers[0].q_proj), (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7}));
  ModelWriter without("qwen3");
  without.sizes();
  without.tensors();
  expect_error(kInvalid, {"[weights]", "tensor 'blk.0.attn_q_norm.weight', got nothing"},
               [&] { (void)load(without.w.file()); });
}

TEST(GgufModel, Rope) {
  ModelWriter m;
  m.sizes();
  m.w.f32("llama.rope.freq_base", 500000.0F);
  m.w.string("llama.rope.scaling.type", "linear");
  m.w.f32("llama.rope.scaling.factor", 4.0F);
  m.tensors();
  const Loaded linear = load(m.w.file());
  EXPECT_EQ(linear.config.rope.theta, 500000.0);
  EXPECT_EQ(linear.config.rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(max_context_length(linear.config), 256);

  ModelWriter divided;
  divided.sizes();
  divided.tensors();
  divided.w.tensor("rope_freqs.weight", 0, {2}, gguf_bytes(1.0F) + gguf_bytes(8.0F));
  const Loaded l = load(divided.w.file());
  EXPECT_EQ(l.config.rope.scaling, RopeScaling::kLlama3);
  ModelConfig plain = l.config;
  plain.rope = {};
  const auto with = rope_inverse_frequencies(l.config);
  const auto bare = rope_inverse_frequencies(plain);
  EXPECT_EQ(with[0], bare[0]);
  EXPECT_FLOAT_EQ(with[1], bare[1] / 8);

  ModelWriter bad;
  bad.sizes();
  bad.tensors();
  bad.w.tensor("rope_freqs.weight", 0, {2}, gguf_bytes(1.0F) + gguf_bytes(0.0F));
  expect_error(kInvalid, {"'rope_freqs.weight' element 1, got 0"},
               [&] { (void)load(bad.w.file()); });
  ModelWriter odd;
  odd.sizes();
  odd.tensors();
  odd.w.tensor("rope_freqs.weight", 0, {3}, std::string(12, 'x'));
  expect_error(kInvalid, {"'rope_freqs.weight'", "accepted F32 [2]"},
               [&] { (void)load(odd.w.file()); });
}

TEST(GgufModel, ASlidingWindowLimitsTheContext) {
  ModelWriter m;
  m.sizes();
  m.w.u32("llama.attention.sliding_window", 16);
  m.tensors();
  EXPECT_EQ(max_context_length(load(m.w.file()).config), 16);
}

TEST(GgufModel, RefusesWhatItCannotRun) {
  const auto refused =
      [](ErrorCode code, const std::string& part, const std::function<void(ModelWriter&)>& edit,
         const std::string& without_key = {}, const std::string& without_tensor = {}) {
        SCOPED_TRACE(part);
        ModelWriter m;
        m.sizes(without_key);
        edit(m);
        m.tensors(without_tensor);
        expect_error(code, {part}, [&] { (void)load(m.w.file()); });
      };
  const auto nothing = [](ModelWriter&) {};
  for (const char* key : {".block_count", ".embedding_length", ".feed_forward_length",
                          ".attention.head_count", ".context_length"}) {
    refused(kInvalid, std::string("llama") + key + ", got nothing, accepted an integer from 1",
            nothing, key);
    refused(
        kInvalid, std::string("llama") + key + ", got 0, accepted an integer from 1",
        [&](ModelWriter& m) { m.w.u32(std::string("llama") + key, 0); }, key);
  }
  refused(kInvalid, "layer_norm_rms_epsilon, got nothing", nothing,
          ".attention.layer_norm_rms_epsilon");
  refused(
      kInvalid, "head_count, got an array of 1",
      [](ModelWriter& m) { m.w.array<std::int32_t>("llama.attention.head_count", 5, {2}); },
      ".attention.head_count");
  refused(
      kInvalid, "head_count_kv, got 3, accepted a divisor",
      [](ModelWriter& m) { m.w.u32("llama.attention.head_count_kv", 3); },
      ".attention.head_count_kv");
  refused(kInvalid, "key_length, got 7",
          [](ModelWriter& m) { m.w.u32("llama.attention.key_length", 7); });
  const auto unsupported = [&](const std::string& part,
                               const std::function<void(ModelWriter&)>& edit) {
    refused(kUnsupported, part, edit);
  };
  unsupported("value_length, got 6",
              [](ModelWriter& m) { m.w.u32("llama.attention.value_length", 6); });
  unsupported("rope.dimension_count, got 2",
              [](ModelWriter& m) { m.w.u32("llama.rope.dimension_count", 2); });
  unsupported("rope.scaling.type, got 'yarn', accepted none or linear",
              [](ModelWriter& m) { m.w.string("llama.rope.scaling.type", "yarn"); });
  unsupported("expert_count, got 8", [](ModelWriter& m) { m.w.u32("llama.expert_count", 8); });
  unsupported("logit_scale, got 0.5", [](ModelWriter& m) { m.w.f32("llama.logit_scale", 0.5F); });
  unsupported("split.count, got 3, accepted 1", [](ModelWriter& m) { m.w.u32("split.count", 3); });
  unsupported("attention.causal, got false",
              [](ModelWriter& m) { m.w.boolean("llama.attention.causal", false); });
  unsupported("tensor 'blk.0.attn_v.bias' type, got IQ4_NL", [](ModelWriter& m) {
    m.w.tensor("blk.0.attn_q.bias", 0, {8}, std::string(32, '\0'));
    m.w.tensor("blk.0.attn_k.bias", 0, {4}, std::string(16, '\0'));
    m.w.tensor("blk.0.attn_v.bias", 20, {4}, std::string(16, '\0'));
  });
  refused(kInvalid, "tensor 'token_embd.weight', got nothing", nothing, {}, "token_embd.weight");
  refused(kInvalid, "tensor 'blk.0.ffn_up.weight', got nothing, accepted shape [6, 8]", nothing, {},
          "blk.0.ffn_up.weight");
  refused(
      kInvalid, "tensor 'blk.0.ffn_up.weight' shape, got [7, 8], accepted [6, 8]",
      [](ModelWriter& m) { m.matrix("blk.0.ffn_up.weight", 7, 8); }, {}, "blk.0.ffn_up.weight");
  refused(kInvalid, "tensor 'blk.0.extra', got one that the configuration has no place for",
          [](ModelWriter& m) { m.matrix("blk.0.extra", 1, 8); });
  for (const char* name : {"gemma2", ""}) {
    ModelWriter m(name);
    m.sizes();
    expect_error(kUnsupported, {"general.architecture, got '", "accepted llama, qwen2 or qwen3"},
                 [&] { (void)load(m.w.file()); });
  }
  GgufWriter bare;
  expect_error(kUnsupported, {"general.architecture, got nothing"},
               [&] { (void)load(bare.file()); });
}

TEST(GgufModel, RefusesScalesThatAreNotFinite) {
  ModelWriter m("qwen2");
  m.w.u32("qwen2.block_count", 1);
  m.w.u32("qwen2.embedding_length", 32);
  m.w.u32("qwen2.feed_forward_length", 32);
  m.w.u32("qwen2.attention.head_count", 1);
  m.w.u32("qwen2.context_length", 64);
  m.w.f32("qwen2.attention.layer_norm_rms_epsilon", 1e-5F);
  m.matrix("token_embd.weight", 5, 32);
  for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"}) {
    m.matrix(std::string(name) + ".weight", 1, 32);
  }
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down"}) {
    m.matrix(std::string("blk.0.") + name + ".weight", 32, 32);
  }
  std::string blocks(32 * 20, '\0');  // Q4_1: d, m, 16 bytes
  blocks[20 * 7 + 3] = '\x7c';        // m of row 7 is infinite
  m.w.tensor("blk.0.ffn_up.weight", 3, {32, 32}, blocks);
  expect_error(kInvalid, {"tensor 'blk.0.ffn_up.weight' element 224 of 1024, got a scale"},
               [&] { (void)load(m.w.file()); });
}

// --- tokenizers -------------------------------------------------------------------------------

std::unique_ptr<Tokenizer> tokenizer_of(const GgufWriter& w) {
  const TempDir dir;
  const GgufFile file(dir.write("m.gguf", w.file()));
  return load_gguf_tokenizer(file, std::nullopt);
}

GgufWriter bpe_writer(const std::string& pre, const std::vector<std::string>& merges) {
  GgufWriter w;
  w.string("tokenizer.ggml.model", "gpt2");
  if (!pre.empty()) w.string("tokenizer.ggml.pre", pre);
  w.strings("tokenizer.ggml.tokens", {"a", "b", "ab", "1", "<|x|>", "ab1"});
  w.array<std::int32_t>("tokenizer.ggml.token_type", 5, {1, 1, 1, 1, 3, 1});
  w.strings("tokenizer.ggml.merges", merges);
  return w;
}

using Ids = std::vector<std::int32_t>;

TEST(GgufTokenizer, Bpe) {
  const auto t = tokenizer_of(bpe_writer("gpt-2", {"a b"}));
  EXPECT_EQ(t->encode("abba<|x|>ab", false), (Ids{2, 1, 0, 4, 2}));
  EXPECT_EQ(t->encode("acb", false), (Ids{0, 1}));  // c has no token and still parts a and b
  EXPECT_EQ(t->decode(Ids{2, 4}), "ab<|x|>");
  EXPECT_EQ(t->vocab_size(), 6);
  // Of the pre-tokenisers with ignore_merges a whole word is its token.
  EXPECT_EQ(tokenizer_of(bpe_writer("llama-bpe", {}))->encode("ab", false), (Ids{2}));
  EXPECT_EQ(tokenizer_of(bpe_writer("", {}))->encode("ab", false), (Ids{0, 1}));
}

TEST(GgufTokenizer, Scores) {
  GgufWriter w;
  w.string("tokenizer.ggml.model", "llama");
  const std::string space_a =
      "\xE2\x96\x81"
      "a";
  std::vector<std::string> tokens = {"<unk>", "<s>", "\xE2\x96\x81", "a",      "b",
                                     space_a, "ab",  "<0xC3>",       "<0xA9>", "<m>"};
  w.strings("tokenizer.ggml.tokens", tokens);
  w.array<float>("tokenizer.ggml.scores", 6, {0, 0, -9, -9, -9, -2, -1, 0, 0, 0});
  w.array<std::int32_t>("tokenizer.ggml.token_type", 5, {2, 3, 1, 1, 1, 1, 1, 6, 6, 4});
  const auto t = tokenizer_of(w);
  EXPECT_EQ(t->encode("ab", false), (Ids{2, 6}));  // "ab" scores above " a"
  EXPECT_EQ(t->encode("a a", false), (Ids{5, 5}));
  EXPECT_EQ(t->encode("b\xC3\xA9", false), (Ids{2, 4, 7, 8}));
  EXPECT_EQ(t->encode("z", false), (Ids{2, 0}));  // no byte token
  EXPECT_EQ(t->encode("b<m>b<s>", false), (Ids{2, 4, 9, 2, 4, 1}));
  EXPECT_EQ(t->encode("", false), Ids{});
  EXPECT_EQ(t->decode(Ids{5, 5, 7, 8}), "a a\xC3\xA9");
  EXPECT_EQ(t->token_bytes(5), " a");
  w.boolean("tokenizer.ggml.add_space_prefix", false);
  EXPECT_EQ(tokenizer_of(w)->encode("ab", false), (Ids{6}));
}

TEST(GgufTokenizer, Refusals) {
  const auto refused = [](ErrorCode code, std::initializer_list<std::string> parts,
                          const GgufWriter& w) {
    expect_error(code, parts, [&] { (void)tokenizer_of(w); });
  };
  refused(ErrorCode::kNotFound, {"tokenizer.ggml.model, got nothing"}, GgufWriter());
  GgufWriter w;
  w.string("tokenizer.ggml.model", "bert");
  refused(kUnsupported, {"tokenizer.ggml.model, got 'bert', accepted gpt2 or llama"}, w);
  refused(kUnsupported,
          {"tokenizer.ggml.pre, got 'klingon', accepted default, llama-bpe, ", "qwen2"},
          bpe_writer("klingon", {}));
  refused(kInvalid, {"tokenizer.ggml.merges[0]", "two tokens with one space between"},
          bpe_writer("gpt-2", {"ab"}));
  refused(kInvalid, {"tokenizer.ggml.merges[0]", "it lacks"}, bpe_writer("gpt-2", {"a c"}));
  w = {};
  w.string("tokenizer.ggml.model", "gpt2");
  refused(kInvalid, {"tokenizer.ggml.tokens, got nothing"}, w);
  w.strings("tokenizer.ggml.tokens", {"a", "\xFF"});
  refused(kInvalid, {"tokenizer.ggml.tokens[1], got '\\xff', accepted UTF-8"}, w);
  w = {};
  w.string("tokenizer.ggml.model", "llama");
  w.strings("tokenizer.ggml.tokens", {"a", "b"});
  refused(kInvalid, {"tokenizer.ggml.scores, got nothing, accepted an array of 2"}, w);
  w.array<std::int32_t>("tokenizer.ggml.token_type", 5, {1});
  refused(kInvalid, {"token_type, got an array of 1, accepted an array of 2"}, w);
  w = {};
  w.string("tokenizer.ggml.model", "llama");
  w.strings("tokenizer.ggml.tokens", {"a"});
  w.array<std::int32_t>("tokenizer.ggml.token_type", 5, {7});
  refused(kInvalid, {"token_type, got an array of 1, accepted an array of integers from 0 to 6"},
          w);
}

}  // namespace
}  // namespace twilight
