#include "support/c_abi_case.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <utility>

#include "support/random.h"

namespace twilight::test {
namespace {

// Numbers that f32, f16 and bf16 all hold exactly, so that the plain reference needs no rounding:
// multiples of 1 / 64 in [-1, 1].
float coarse(Random& random) { return static_cast<float>(random.below(129) - 64) / 64.0F; }

}  // namespace

void FreeAligned::operator()(void* memory) const { std::free(memory); }

AlignedMemory aligned_memory(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<std::size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0, bytes);
  return AlignedMemory(memory);
}

CAbiCase::CAbiCase(const CAbiShape& shape_in) : shape(shape_in), seq_lens(shape_in.lengths) {
  Random random(shape.seed);
  const auto num_seqs = static_cast<std::int32_t>(shape.lengths.size());
  const std::int32_t page_size = shape.page_size;
  const std::int64_t heads = shape.num_kv_heads;
  const std::int64_t head_dim = shape.head_dim;

  policy.struct_size = sizeof policy;
  (void)twl_policy_init(shape.preset, &policy);
  policy.min_candidates = 2 * page_size;
  policy.max_candidates = std::max(policy.max_candidates, policy.min_candidates);
  policy.min_tokens = 2;
  policy.sink_tokens = 1;
  policy.recent_pages = 1;
  policy.dense_layers = 0;

  // Pages in shuffled order, with one that no sequence has.
  std::int32_t widest = 1;
  std::int32_t total = 1;
  for (const std::int32_t n : seq_lens) {
    const std::int32_t pages = (n + page_size - 1) / page_size;
    widest = std::max(widest, pages);
    total += pages;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(total));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[static_cast<std::size_t>(random.below(static_cast<int>(i)))]);
  }
  // Entries past a sequence's pages are never read.
  block_table.assign(static_cast<std::size_t>(widest) * shape.lengths.size(), -77);
  std::size_t taken = 0;
  for (std::int32_t seq = 0; seq < num_seqs; ++seq) {
    const std::int32_t n = seq_lens[static_cast<std::size_t>(seq)];
    for (std::int32_t page = 0; page * page_size < n; ++page) {
      const std::int32_t physical = order[taken++];
      block_table[static_cast<std::size_t>(seq * widest + page)] = physical;
      if ((page + 1) * page_size <= n) sealed.push_back(physical);
      for (std::int32_t slot = 0; slot < std::min(page_size, n - page * page_size); ++slot) {
        slots.push_back(std::int64_t{physical} * page_size + slot);
      }
    }
  }

  const std::int64_t row = head_dim + shape.row_padding;
  kv.struct_size = sizeof kv;
  kv.dtype = shape.dtype;
  kv.num_seqs = num_seqs;
  kv.num_kv_heads = shape.num_kv_heads;
  kv.head_dim = shape.head_dim;
  kv.page_size = page_size;
  kv.num_pages = total;
  const std::int64_t page_stride = row * heads * page_size;
  const std::size_t pool_bytes =
      static_cast<std::size_t>(page_stride * total) * (shape.dtype == TWL_F32 ? 4 : 2);
  k_pool_ = aligned_memory(pool_bytes);
  v_pool_ = aligned_memory(pool_bytes);
  kv.k = {k_pool_.get(), page_stride, shape.token_major ? row : row * page_size,
          shape.token_major ? row * heads : row};
  kv.v = kv.k;
  kv.v.data = v_pool_.get();
  kv.block_table = block_table.data();
  kv.block_table_stride = widest;
  kv.seq_lens = seq_lens.data();

  twl_index_bytes bytes{};
  bytes.struct_size = sizeof bytes;
  index.struct_size = sizeof index;
  (void)twl_index_view_init(&policy, &index);
  (void)twl_index_record_bytes(&policy, page_size, shape.head_dim, &bytes);
  const auto plane = [&](std::size_t record, AlignedMemory& memory, void*& data, std::int64_t& page,
                         std::int64_t& head) {
    memory = aligned_memory(static_cast<std::size_t>(total * heads) * record);
    data = record > 0 ? memory.get() : nullptr;
    head = static_cast<std::int64_t>(record);
    page = head * heads;
  };
  plane(bytes.summary, summaries_, index.summaries, index.summary_page_stride,
        index.summary_head_stride);
  plane(bytes.estimate, estimates_, index.estimates, index.estimate_page_stride,
        index.estimate_head_stride);
  plane(bytes.value_mean, value_means_, index.value_means, index.value_mean_page_stride,
        index.value_mean_head_stride);
  plane(bytes.params, params_, index.params, index.params_page_stride, index.params_head_stride);

  keys.resize(slots.size() * static_cast<std::size_t>(heads * head_dim));
  values.resize(keys.size());
  for (float& key : keys) key = coarse(random);
  for (float& value : values) value = coarse(random);
  append.struct_size = sizeof append;
  append.kv = &kv;
  append.keys = keys.data();
  append.values = values.data();
  append.key_token_stride = append.value_token_stride = heads * head_dim;
  append.slots = slots.data();
  append.num_tokens = static_cast<std::int32_t>(slots.size());

  seal.struct_size = sizeof seal;
  seal.kv = &kv;
  seal.index = &index;
  seal.pages = sealed.data();
  seal.num_pages = static_cast<std::int32_t>(sealed.size());

  queries.resize(static_cast<std::size_t>(q_row() * num_seqs));
  for (float& q : queries) q = 2 * random.normal();
  out.assign(queries.size(), std::numeric_limits<float>::quiet_NaN());
  p.assign(shape.lengths.size(), 0.9F);
  decode.struct_size = sizeof decode;
  decode.kv = &kv;
  decode.index = &index;
  decode.queries = queries.data();
  decode.query_seq_stride = q_row();
  decode.p = p.data();
  decode.out = out.data();
  decode.out_seq_stride = q_row();

  plan_shape.struct_size = sizeof plan_shape;
  plan_shape.max_seqs = std::max(num_seqs, 1);
  plan_shape.num_q_heads = shape.num_kv_heads * shape.group;
  plan_shape.num_kv_heads = shape.num_kv_heads;
  plan_shape.head_dim = shape.head_dim;
  plan_shape.page_size = page_size;
  plan_shape.max_tokens = 1;
  for (const std::int32_t n : seq_lens) plan_shape.max_tokens = std::max(plan_shape.max_tokens, n);
  plan_shape.kv_dtype = shape.dtype;
}

std::size_t CAbiCase::row_of(std::int32_t seq, std::int32_t token) const {
  std::size_t row = static_cast<std::size_t>(token);
  for (std::int32_t s = 0; s < seq; ++s) {
    row += static_cast<std::size_t>(shape.lengths[static_cast<std::size_t>(s)]);
  }
  return row;
}

void CAbiCase::plain_attention(std::int32_t seq, std::int32_t n, std::int32_t q_head,
                               const float* q, double* result) const {
  const auto head_dim = static_cast<std::size_t>(shape.head_dim);
  const auto heads = static_cast<std::size_t>(shape.num_kv_heads);
  const auto kv_head = static_cast<std::size_t>(q_head / shape.group);
  std::fill_n(result, head_dim, 0.0);
  if (n == 0) return;
  std::vector<double> scores(static_cast<std::size_t>(n));
  for (std::int32_t t = 0; t < n; ++t) {
    const float* k = keys.data() + (row_of(seq, t) * heads + kv_head) * head_dim;
    double score = 0;
    for (std::size_t d = 0; d < head_dim; ++d) {
      score += static_cast<double>(q[d]) * static_cast<double>(k[d]);
    }
    scores[static_cast<std::size_t>(t)] = score / std::sqrt(static_cast<double>(shape.head_dim));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (std::int32_t t = 0; t < n; ++t) {
    const double weight = std::exp(scores[static_cast<std::size_t>(t)] - top);
    const float* v = values.data() + (row_of(seq, t) * heads + kv_head) * head_dim;
    total += weight;
    for (std::size_t d = 0; d < head_dim; ++d) result[d] += weight * static_cast<double>(v[d]);
  }
  for (std::size_t d = 0; d < head_dim; ++d) result[d] /= total;
}

}  // namespace twilight::test
