#include "support/cache_writes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "support/random.h"

namespace twilight::test {
namespace {

void expect_same_index(const PagedFixture& actual, const PagedFixture& expected) {
  EXPECT_TRUE(std::ranges::equal(actual.summary_pool(), expected.summary_pool()));
  EXPECT_TRUE(std::ranges::equal(actual.estimate_pool(), expected.estimate_pool()));
  EXPECT_TRUE(std::ranges::equal(actual.value_mean_pool(), expected.value_mean_pool()));
  EXPECT_TRUE(std::ranges::equal(actual.params_pool(), expected.params_pool()));
}

}  // namespace

void expect_same_seal(Backend& reference, Backend& backend, const OpCase& op_case,
                      PagedFixture& fixture) {
  PagedFixture other = op_case.make_fixture();
  fixture.clear_index();
  other.clear_index();
  const auto pages = fixture.sealed_physical_pages();
  const auto seal = [&](Backend& by, PagedFixture& in) {
    by.seal_pages({.kv = in.kv(),
                   .index = in.index(),
                   .pages = pages.data(),
                   .num_pages = static_cast<std::int32_t>(pages.size())});
  };
  seal(reference, other);
  seal(backend, fixture);
  expect_same_index(fixture, other);
}

void expect_same_append_and_copy(Backend& reference, Backend& backend, const OpCase& op_case,
                                 PagedFixture& fixture) {
  PagedFixture other = op_case.make_fixture();
  const PagedKvView kv = fixture.kv();
  const std::int64_t row = std::int64_t{kv.num_kv_heads} * kv.head_dim;
  std::vector<std::int64_t> slots;
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    for (std::int64_t token = kv.seq_lens[seq] - 1; token >= 0 && slots.size() < 40; token -= 3) {
      slots.push_back(fixture.slot_of(seq, token));
    }
  }
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  Random random(hash64(op_case.options.seed, 77));
  std::vector<float> k(slots.size() * static_cast<std::size_t>(row) + 1);
  std::vector<float> v(k.size());
  for (std::vector<float>* values : {&k, &v}) {
    for (float& x : *values) {
      x = std::ldexp(random.uniform(-2.0F, 2.0F), static_cast<int>(random.uniform(-26.0F, 18.0F)));
    }
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float special[] = {
      0.0F,      -0.0F,    kInfinity,     -kInfinity, std::nanf("1"), -std::nanf("1"), 65504.0F,
      65519.99F, 65520.0F, 3.3895314e38F, 6.1e-5F,    5.9e-8F,        2.9e-8F,         1e-40F};
  for (std::size_t i = 0; i < std::size(special) && i < k.size(); ++i) k[i] = special[i];
  const auto run = [&](Backend& by, PagedFixture& in) {
    by.append_kv({.kv = in.kv(),
                  .k = k.data(),
                  .v = v.data(),
                  .k_token_stride = row,
                  .v_token_stride = row,
                  .slots = slots.data(),
                  .num_tokens = static_cast<std::int32_t>(slots.size())});
    const std::int32_t first =
        slots.empty() ? in.spare_page(0) : static_cast<std::int32_t>(slots[0] / kv.page_size);
    const std::int32_t from[] = {first, in.spare_page(1)};
    const std::int32_t to[] = {in.spare_page(1), in.spare_page(2)};
    by.copy_pages({.kv = in.kv(), .index = in.index(), .from = from, .to = to, .num_pages = 2});
  };
  run(reference, other);
  run(backend, fixture);
  EXPECT_TRUE(std::ranges::equal(fixture.k_pool(), other.k_pool()));
  EXPECT_TRUE(std::ranges::equal(fixture.v_pool(), other.v_pool()));
  expect_same_index(fixture, other);
}

}  // namespace twilight::test
