#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "support/random.h"
#include "twilight/attention.h"
#include "twilight/c.h"

// Counts what any thread of this process takes from the heap while a step runs. malloc and its kin
// are replaced for the whole process, libraries included; under a sanitizer, which does the same,
// operator new alone is.
namespace {

std::atomic<bool> counting{false};
std::atomic<std::int64_t> allocations{0};

void count_one() {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1);
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TWILIGHT_COUNTS_MALLOC 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TWILIGHT_COUNTS_MALLOC 0
#endif
#endif
#ifndef TWILIGHT_COUNTS_MALLOC
#define TWILIGHT_COUNTS_MALLOC 1
#endif

#if TWILIGHT_COUNTS_MALLOC
extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): glibc's own names.
void* __libc_malloc(std::size_t bytes);
void* __libc_calloc(std::size_t count, std::size_t bytes);
void* __libc_realloc(void* old, std::size_t bytes);
void* __libc_memalign(std::size_t alignment, std::size_t bytes);
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)

void* malloc(std::size_t bytes) noexcept {
  count_one();
  return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) noexcept {
  count_one();
  return __libc_calloc(count, bytes);
}
void* realloc(void* old, std::size_t bytes) noexcept {
  count_one();
  return __libc_realloc(old, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) noexcept {
  count_one();
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept {
  return memalign(alignment, bytes);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) noexcept {
  *out = memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}
#else
void* operator new(std::size_t bytes) {
  count_one();
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace twilight {
namespace {

constexpr std::int32_t kLayers = 3, kQueryHeads = 8, kKvHeads = 2, kHeadDim = 64, kPageSize = 16;
constexpr std::int32_t kPrompt = 2500;

template <typename Body>
std::int64_t allocations_of(Body&& body) {
  allocations = 0;
  counting = true;
  body();
  counting = false;
  return allocations;
}

TEST(Allocations, TheCounterSeesAllocationsOfLibraries) {
  const auto count = allocations_of([] {
    std::vector<int> vector(100);
    std::string text(1000, 'x');
    auto policy = std::make_unique<SparsePolicy>(make_policy("quest:1234567"));
  });
  EXPECT_GE(count, 3);
  EXPECT_EQ(allocations_of([] {}), 0);
}

std::vector<float> noise(std::int64_t count, unsigned seed) {
  test::Random random(seed);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& value : out) value = random.normal();
  return out;
}

class AttentionAllocations : public ::testing::TestWithParam<const char*> {};

TEST_P(AttentionAllocations, DecodeAllocatesNothing) {
  const SparsePolicy policy = make_policy(GetParam());
  const Device device({.device = "cpu", .threads = 2});
  KvCache cache(device,
                {.num_layers = kLayers,
                 .num_kv_heads = kKvHeads,
                 .head_dim = kHeadDim,
                 .page_size = kPageSize,
                 .num_pages = 2 * (kPrompt / kPageSize + 8)},
                policy);
  Attention attention(cache, policy,
                      {.num_q_heads = kQueryHeads, .max_seqs = 2, .max_tokens = kPrompt + 64});
  attention.collect_stats(true);
  Sequence first = cache.new_sequence();
  Sequence second = cache.new_sequence();
  Sequence* const batch[] = {&first, &second};
  const auto k = noise(std::int64_t{2} * kPrompt * kKvHeads * kHeadDim, 1);
  const auto q = noise(std::int64_t{2} * kQueryHeads * kHeadDim, 2);
  std::vector<float> out(q.size());
  ASSERT_TRUE(attention.begin(batch, kPrompt));
  for (std::int32_t layer = 0; layer < kLayers; ++layer) {
    attention.append(layer, k.data(), k.data());
  }
  // More steps than a page has slots, so that pages open and seal on the way.
  for (int step = 0; step < 2 * kPageSize; ++step) {
    ASSERT_TRUE(attention.begin(batch, 1));
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const auto count = allocations_of([&] {
        attention.append(layer, k.data(), k.data());
        attention.decode(layer, q.data(), out.data());
      });
      if (step == 0) continue;  // statistics are sized on first use
      EXPECT_EQ(count, 0) << "step " << step << " layer " << layer;
    }
  }
  const bool sparse = attention.stats(kLayers - 1)[0].path == StepPath::kSparse;
  EXPECT_EQ(sparse, !policy.is_dense());
}

INSTANTIATE_TEST_SUITE_P(Policies, AttentionAllocations,
                         ::testing::Values("dense", "paper", "paper-full", "quest:512",
                                           "streaming"));

// The same promise of the C interface: nothing after creation, the first call included.
class CAllocations : public ::testing::TestWithParam<const char*> {};

TEST_P(CAllocations, HotCallsAllocateNothing) {
  twl_context_options options{};
  options.struct_size = sizeof options;
  options.threads = 2;
  twl_context* context = nullptr;
  ASSERT_EQ(twl_context_create(&options, &context), TWL_OK) << twl_last_error();
  twl_policy policy{};
  policy.struct_size = sizeof policy;
  ASSERT_EQ(twl_policy_init(GetParam(), &policy), TWL_OK) << twl_last_error();

  const std::int32_t pages = (kPrompt + kPageSize - 1) / kPageSize;
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  for (std::int32_t i = 0; i < pages; ++i) table[static_cast<std::size_t>(i)] = pages - 1 - i;
  const std::int64_t row = std::int64_t{kKvHeads} * kHeadDim;
  std::vector<float> k_pool(static_cast<std::size_t>(row * pages * kPageSize));
  std::vector<float> v_pool(k_pool.size());
  const std::int32_t length = kPrompt;
  twl_kv_view kv{};
  kv.struct_size = sizeof kv;
  kv.dtype = TWL_F32;
  kv.num_seqs = 1;
  kv.num_kv_heads = kKvHeads;
  kv.head_dim = kHeadDim;
  kv.page_size = kPageSize;
  kv.num_pages = pages;
  kv.k = {k_pool.data(), row * kPageSize, kHeadDim, row};
  kv.v = {v_pool.data(), row * kPageSize, kHeadDim, row};
  kv.block_table = table.data();
  kv.block_table_stride = pages;
  kv.seq_lens = &length;

  twl_index_view index{};
  index.struct_size = sizeof index;
  std::size_t summary_bytes = 0, estimate_bytes = 0;
  ASSERT_EQ(twl_index_sizes(&policy, kPageSize, kHeadDim, &summary_bytes, &estimate_bytes), TWL_OK);
  ASSERT_EQ(twl_index_view_init(&policy, &index), TWL_OK);
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  const auto lines = [](std::size_t bytes) { return std::vector<Line>(bytes / 64 + 1); };
  const auto records = static_cast<std::size_t>(pages) * kKvHeads;
  auto summaries = lines(records * summary_bytes);
  auto estimates = lines(records * estimate_bytes);
  if (summary_bytes > 0) index.summaries = summaries.data();
  if (estimate_bytes > 0) index.estimates = estimates.data();
  index.summary_head_stride = static_cast<std::int64_t>(summary_bytes);
  index.summary_page_stride = index.summary_head_stride * kKvHeads;
  index.estimate_head_stride = static_cast<std::int64_t>(estimate_bytes);
  index.estimate_page_stride = index.estimate_head_stride * kKvHeads;

  twl_plan_shape shape{};
  shape.struct_size = sizeof shape;
  shape.max_seqs = 1;
  shape.num_q_heads = kQueryHeads;
  shape.num_kv_heads = kKvHeads;
  shape.head_dim = kHeadDim;
  shape.page_size = kPageSize;
  shape.max_tokens = kPrompt;
  shape.kv_dtype = TWL_F32;
  twl_plan* plan = nullptr;
  ASSERT_EQ(twl_plan_create(context, &policy, &shape, &plan), TWL_OK) << twl_last_error();
  auto workspace = lines(twl_plan_workspace_bytes(plan));

  const auto keys = noise(row * kPrompt, 3);
  const auto queries = noise(std::int64_t{kQueryHeads} * kHeadDim, 4);
  std::vector<float> out(queries.size());
  std::vector<std::int64_t> slots(kPrompt);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    slots[i] =
        std::int64_t{table[i / kPageSize]} * kPageSize + static_cast<std::int64_t>(i % kPageSize);
  }
  twl_append_args append{};
  append.struct_size = sizeof append;
  append.kv = &kv;
  append.keys = append.values = keys.data();
  append.key_token_stride = append.value_token_stride = row;
  append.slots = slots.data();
  append.num_tokens = kPrompt;
  twl_seal_args seal{};
  seal.struct_size = sizeof seal;
  seal.kv = &kv;
  seal.index = &index;
  seal.pages = table.data();
  seal.num_pages = kPrompt / kPageSize;
  twl_decode_args decode{};
  decode.struct_size = sizeof decode;
  decode.kv = &kv;
  decode.index = &index;
  decode.layer = kLayers - 1;
  decode.queries = queries.data();
  decode.query_seq_stride = std::int64_t{kQueryHeads} * kHeadDim;
  decode.out = out.data();
  decode.out_seq_stride = decode.query_seq_stride;
  twl_seq_stats stats{};
  stats.struct_size = sizeof stats;

  twl_status status[3] = {};
  EXPECT_EQ(allocations_of([&] { status[0] = twl_append(context, &append); }), 0);
  EXPECT_EQ(allocations_of([&] { status[1] = twl_seal(context, &seal); }), 0);
  for (int call = 0; call < 3; ++call) {
    EXPECT_EQ(allocations_of([&] {
                status[2] = twl_decode(plan, &decode, workspace.data(),
                                       twl_plan_workspace_bytes(plan), &stats);
              }),
              0)
        << "call " << call;
  }
  for (const twl_status each : status) EXPECT_EQ(each, TWL_OK) << twl_last_error();
  EXPECT_EQ(stats.path == TWL_PATH_SPARSE, policy.selector != TWL_SELECTOR_DENSE);
  twl_plan_destroy(plan);
  twl_context_destroy(context);
}

INSTANTIATE_TEST_SUITE_P(Policies, CAllocations,
                         ::testing::Values("dense", "paper", "paper-full", "quest:512",
                                           "streaming"));

}  // namespace
}  // namespace twilight
