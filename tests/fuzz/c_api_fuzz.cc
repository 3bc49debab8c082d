#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <vector>

#include "support/c_abi_case.h"
#include "twilight/c.h"

// Bytes choose a small shape, a policy and at most one wrong argument. A wrong one must give a
// status with a text; right ones must give dense attention, or sparse attention inside the range of
// the values.
namespace {

using twilight::test::aligned_memory;
using twilight::test::CAbiCase;
using twilight::test::CAbiShape;

void expect(bool ok, int line = __builtin_LINE()) {
  if (ok) return;
  std::fprintf(stderr, "line %d: expectation failed, last error: %s\n", line, twl_last_error());
  __builtin_trap();
}

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  int below(int n) { return next_ < size_ ? data_[next_++] % n : 0; }
  std::int32_t word() {
    std::uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out = out << 8 | static_cast<std::uint32_t>(below(256));
    return static_cast<std::int32_t>(out);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t next_ = 0;
};

twl_context* make_context(const char* device) {
  twl_context_options options{};
  options.struct_size = sizeof options;
  options.device = device;
  options.threads = 1;
  twl_context* context = nullptr;
  expect(twl_context_create(&options, &context) == TWL_OK);
  return context;
}

CAbiShape read_shape(Input& input) {
  constexpr const char* kPresets[] = {"dense",   "paper",     "paper-full",
                                      "quest:8", "streaming", "adaptive"};
  CAbiShape shape;
  shape.dtype = input.below(3);
  shape.num_kv_heads = 1 + input.below(3);
  shape.group = 1 + input.below(4);
  shape.head_dim = 16 * (1 + input.below(3));
  shape.page_size = 1 + input.below(20);
  shape.lengths.resize(static_cast<std::size_t>(input.below(4)));
  for (auto& n : shape.lengths) n = input.below(90);
  shape.token_major = input.below(2) == 1;
  shape.row_padding = input.below(3) * 8;
  shape.preset = kPresets[input.below(static_cast<int>(std::size(kPresets)))];
  shape.seed = static_cast<std::uint64_t>(input.below(256));
  return shape;
}

// Makes one argument wrong. False where the shape leaves nothing to go wrong there.
bool spoil_cache(CAbiCase& c, Input& input) {
  const std::int32_t negative = -1 - std::abs(input.word() / 2);
  const bool tokens = c.append.num_tokens > 0;
  switch (input.below(14)) {
    case 0:
      c.append.kv = nullptr;
      return true;
    case 1:
      c.kv.struct_size = static_cast<std::size_t>(input.below(sizeof c.kv));
      return true;
    case 2:
      c.append.struct_size = 8;
      return true;
    case 3:
      c.kv.dtype = input.below(2) == 0 ? negative : 3 + input.below(200);
      return true;
    case 4:
      c.kv.page_size = input.below(2) == 0 ? negative : 257;
      return true;
    case 5:
      c.kv.head_dim = negative;
      return true;
    case 6:
      c.kv.num_kv_heads = negative;
      return true;
    case 7:
      c.kv.num_pages = input.below(2) == 0 ? negative : 0;
      return true;
    case 8:
      c.append.num_tokens = negative;
      return true;
    case 9:
      c.append.keys = nullptr;
      return tokens;
    case 10:
      c.append.slots = nullptr;
      return tokens;
    case 11:
      c.kv.k.data = nullptr;
      return tokens;
    case 12:
      if (!tokens) return false;
      c.slots[c.slots.size() / 2] =
          std::int64_t{c.kv.num_pages} * c.kv.page_size + std::abs(input.word() / 2);
      return true;
    default:
      c.append.key_token_stride = negative;
      return c.append.num_tokens > 1;
  }
}

bool spoil_seal(CAbiCase& c, Input& input) {
  const bool planes = c.index.summary != 0 || c.index.key_bits != 0;
  const bool pages = c.seal.num_pages > 0;
  switch (input.below(8)) {
    case 0:
      c.seal.index = nullptr;
      return true;
    case 1:
      c.seal.pages = nullptr;
      return pages;
    case 2:
      if (pages) c.sealed.back() = input.below(2) == 0 ? -1 : c.kv.num_pages;
      return pages;
    case 3:
      c.index.summary = 6 + input.below(9);
      return true;
    case 4:
      c.index.key_bits = 5 + input.below(3);
      return true;
    case 5:
      c.index.value_bits = 1 + input.below(3);
      return true;
    case 6:
      c.index.params = nullptr;
      return pages && c.index.value_bits != 0;
    default:
      c.index.summaries = c.index.estimates = nullptr;
      return pages && planes;
  }
}

bool spoil_decode(CAbiCase& c, Input& input) {
  const bool any = c.kv.num_seqs > 0;
  const bool planes = c.index.summary != 0 || c.index.key_bits != 0;
  switch (input.below(12)) {
    case 0:
      c.decode.kv = nullptr;
      return true;
    case 1:
      c.decode.layer = -1;
      return true;
    case 2:
      c.kv.num_seqs += 1 + c.plan_shape.max_seqs;
      return true;
    case 3:
      c.kv.page_size = c.kv.page_size == 1 ? 2 : c.kv.page_size - 1;
      return true;
    case 4:
      c.decode.index = nullptr;
      return planes;
    case 5:
      c.decode.queries = nullptr;
      return any;
    case 6:
      c.decode.out = nullptr;
      return any;
    case 7:
      c.kv.seq_lens = nullptr;
      return any;
    case 8:
      if (any) c.seq_lens[0] = input.below(2) == 0 ? -1 : c.plan_shape.max_tokens + 1;
      return any;
    case 9:
      if (!any || c.seq_lens[0] == 0) return false;
      c.block_table[0] = input.below(2) == 0 ? -1 : c.kv.num_pages;
      return true;
    case 10:
      if (any) c.p[0] = input.below(2) == 0 ? 0.0F : NAN;
      return any;
    default:
      c.decode.query_seq_stride = 0;
      return c.kv.num_seqs > 1;
  }
}

bool spoil_plan(CAbiCase& c, Input& input) {
  const std::int32_t negative = -std::abs(input.word() / 2);
  switch (input.below(10)) {
    case 0:
      c.plan_shape.num_q_heads += c.plan_shape.num_kv_heads == 1 ? 1024 : 1;
      return true;
    case 1:
      c.plan_shape.max_tokens = negative;
      return true;
    case 2:
      c.plan_shape.max_seqs = negative;
      return true;
    case 3:
      c.plan_shape.kv_dtype = 7;
      return true;
    case 4:
      c.policy.selector = 8 + input.below(100);
      return true;
    case 5:
      c.policy.p = -1;
      return c.policy.selector != TWL_SELECTOR_DENSE;
    case 6:
      c.policy.prune = 2;
      return true;
    case 7:
      c.policy.criterion = input.below(2) == 0 ? negative - 1 : 2;
      return true;
    case 8:
      c.policy.candidate_mass = input.below(2) == 0 ? 1 : -0.5;
      return c.policy.selector != TWL_SELECTOR_DENSE;
    default:
      c.policy.struct_size = 1;
      return true;
  }
}

void expect_failure(twl_status status, int line = __builtin_LINE()) {
  expect(status == TWL_INVALID_ARGUMENT || status == TWL_UNSUPPORTED, line);
  expect(twl_last_error()[0] == '[', line);
}

void check_outputs(const CAbiCase& c, const std::vector<twl_seq_stats>& stats) {
  std::vector<double> expected(static_cast<std::size_t>(c.shape.head_dim));
  for (std::int32_t seq = 0; seq < c.kv.num_seqs; ++seq) {
    const twl_seq_stats& s = stats[static_cast<std::size_t>(seq)];
    expect(s.num_tokens == c.seq_lens[static_cast<std::size_t>(seq)]);
    expect(s.attended_mean <= s.candidates_mean && s.candidates_mean <= s.num_tokens);
    for (std::int32_t head = 0; head < c.plan_shape.num_q_heads; ++head) {
      const std::int64_t at = seq * c.q_row() + std::int64_t{head} * c.shape.head_dim;
      c.plain_attention(seq, s.num_tokens, head, c.queries.data() + at, expected.data());
      for (std::int32_t d = 0; d < c.shape.head_dim; ++d) {
        const auto got = static_cast<double>(c.out[static_cast<std::size_t>(at + d)]);
        // bf16 products may round queries and weights to 8 bits.
        if (s.path != TWL_PATH_SPARSE) {
          expect(std::abs(got - expected[static_cast<std::size_t>(d)]) < 0.05);
        }
        expect(std::abs(got) <= static_cast<double>(CAbiCase::kMaxValue) + 0.02);
      }
    }
  }
}

void run(twl_context* context, Input& input) {
  CAbiCase c(read_shape(input));
  const int stage = input.below(8);  // 0 to 3: one argument of that call is wrong
  if (stage == 0 && spoil_cache(c, input)) return expect_failure(twl_append(context, &c.append));
  if (stage == 0) return;
  expect(twl_append(context, &c.append) == TWL_OK);
  if (stage == 1) {
    if (spoil_seal(c, input)) expect_failure(twl_seal(context, &c.seal));
    return;
  }
  expect(twl_seal(context, &c.seal) == TWL_OK);
  twl_plan* plan = nullptr;
  if (stage == 2) {
    if (!spoil_plan(c, input)) return;
    expect_failure(twl_plan_create(context, &c.policy, &c.plan_shape, &plan));
    return expect(plan == nullptr);
  }
  expect(twl_plan_create(context, &c.policy, &c.plan_shape, &plan) == TWL_OK);
  const std::size_t bytes = twl_plan_workspace_bytes(plan);
  const auto workspace = aligned_memory(bytes);
  std::vector<twl_seq_stats> stats(c.shape.lengths.size() + 1);
  stats[0].struct_size = sizeof stats[0];
  if (stage == 3) {
    if (spoil_decode(c, input)) {
      expect_failure(twl_decode(plan, &c.decode, workspace.get(), bytes, stats.data()));
    }
  } else {
    expect(twl_decode(plan, &c.decode, workspace.get(), bytes, stats.data()) == TWL_OK);
    check_outputs(c, stats);
  }
  twl_plan_destroy(plan);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static twl_context* const kCpu = make_context("cpu");
  static twl_context* const kRef = make_context("ref");
  Input input(data, size);
  run(input.below(2) == 0 ? kCpu : kRef, input);
  return 0;
}
