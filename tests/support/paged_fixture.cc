#include "support/paged_fixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "core/float16.h"
#include "quant/page_codec.h"
#include "support/random.h"

namespace twilight::test {
namespace {

constexpr std::int64_t kQueryPadding = 16;
constexpr std::int32_t kTableGarbage = -77777777;

std::uint64_t row_key(std::int64_t seq, std::int64_t token, std::int64_t head) {
  return (static_cast<std::uint64_t>(seq) << 48) ^ (static_cast<std::uint64_t>(token) << 16) ^
         static_cast<std::uint64_t>(head);
}

Buffer poisoned(std::int64_t bytes, bool poison) {
  Buffer buffer(static_cast<std::size_t>(bytes));
  if (poison && bytes > 0) std::memset(buffer.data(), 0xff, buffer.size());
  return buffer;
}

}  // namespace

float load_element(DType dtype, const std::byte* base, std::int64_t index) {
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, base + index * 4, 4);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, base + index * 2, 2);
  return dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

void store_element(DType dtype, std::byte* base, std::int64_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(base + index * 4, &value, 4);
    return;
  }
  const std::uint16_t bits = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
  std::memcpy(base + index * 2, &bits, 2);
}

PagedFixture::PagedFixture(FixtureShape shape, FixtureOptions options)
    : shape_(std::move(shape)), options_(options) {
  require(shape_.num_kv_heads > 0 && shape_.num_q_heads % shape_.num_kv_heads == 0, "fixture",
          "bad head counts");
  require(options_.record_padding % 16 == 0, "fixture", "record_padding breaks the alignment");
  lens_ = shape_.lengths;
  lay_out_pages();
  make_pools();
  make_queries();
  fill_rows();
  seal();
}

float PagedFixture::scale() const { return 1.0F / std::sqrt(static_cast<float>(shape_.head_dim)); }

void PagedFixture::lay_out_pages() {
  const std::int32_t p = shape_.page_size;
  std::int64_t widest = 0;
  for (const std::int32_t n : lens_) {
    const std::int32_t pages = (n + options_.reserve_tokens + p - 1) / p;
    capacity_pages_.push_back(pages);
    widest = std::max<std::int64_t>(widest, pages);
  }
  if (!lens_.empty()) shared_pages_ = std::min(options_.shared_prefix_pages, lens_[0] / p);
  std::int32_t total = kSparePages;
  std::vector<std::int32_t> shared(capacity_pages_.size(), 0);
  for (std::size_t b = 0; b < capacity_pages_.size(); ++b) {
    shared[b] = b == 0 ? 0 : std::min(shared_pages_, lens_[b] / p);
    total += capacity_pages_[b] - shared[b];
  }
  num_physical_ = total;

  std::vector<std::int32_t> order(static_cast<std::size_t>(total));
  for (std::int32_t i = 0; i < total; ++i) order[static_cast<std::size_t>(i)] = i;
  if (options_.shuffle_pages) {
    Random random(hash64(options_.seed, 11));
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1],
                order[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
    }
  }
  spare_.assign(order.begin(), order.begin() + kSparePages);
  std::size_t next = kSparePages;
  kv_.block_table_stride = widest + 3;
  block_table_.assign(lens_.size() * static_cast<std::size_t>(kv_.block_table_stride),
                      kTableGarbage);
  for (std::size_t b = 0; b < lens_.size(); ++b) {
    std::int32_t* row = block_table_.data() + b * static_cast<std::size_t>(kv_.block_table_stride);
    for (std::int32_t i = 0; i < capacity_pages_[b]; ++i) {
      row[i] = i < shared[b] ? block_table_[static_cast<std::size_t>(i)] : order[next++];
    }
  }
}

void PagedFixture::make_pools() {
  const std::int64_t d = shape_.head_dim;
  const std::int64_t heads = shape_.num_kv_heads;
  PagePlane plane;
  if (options_.token_major) {
    plane.head_stride = d + options_.row_padding;
    plane.token_stride = heads * plane.head_stride + options_.head_padding;
    plane.page_stride = shape_.page_size * plane.token_stride + options_.page_padding;
  } else {
    plane.token_stride = d + options_.row_padding;
    plane.head_stride = shape_.page_size * plane.token_stride + options_.head_padding;
    plane.page_stride = heads * plane.head_stride + options_.page_padding;
  }
  const std::int64_t bytes = num_physical_ * plane.page_stride * dtype_bytes(shape_.dtype);
  k_ = poisoned(bytes, options_.poison);
  v_ = poisoned(bytes, options_.poison);
  kv_.dtype = shape_.dtype;
  kv_.num_seqs = num_seqs();
  kv_.num_kv_heads = shape_.num_kv_heads;
  kv_.head_dim = shape_.head_dim;
  kv_.page_size = shape_.page_size;
  kv_.k = plane;
  kv_.v = plane;
  kv_.k.data = k_.data();
  kv_.v.data = v_.data();
  kv_.block_table = block_table_.data();
  kv_.seq_lens = lens_.data();

  const auto record_stride = [&](std::int64_t record_bytes) {
    return static_cast<std::int64_t>(align_up(static_cast<std::size_t>(record_bytes), 16)) +
           options_.record_padding;
  };
  index_.format = shape_.format;
  const auto make_plane = [&](std::int64_t record_bytes, Buffer& pool, std::byte*& data,
                              std::int64_t& page_stride, std::int64_t& head_stride) {
    if (record_bytes == 0) return;
    head_stride = record_stride(record_bytes);
    page_stride = head_stride * heads + options_.record_padding;
    pool = Buffer(static_cast<std::size_t>(num_physical_ * page_stride));
    data = pool.data();
  };
  const IndexFormat& format = shape_.format;
  if (format.summary == SummaryKind::kLabels) {
    labels_ = test_labels(shape_.num_kv_heads, shape_.head_dim, format.label_channels);
    index_.labels = labels_.data();
  }
  make_plane(summary_record_bytes(format, shape_.page_size, shape_.head_dim), summaries_,
             index_.summaries, index_.summary_page_stride, index_.summary_head_stride);
  make_plane(estimate_record_bytes(format, shape_.page_size, shape_.head_dim), estimates_,
             index_.estimates, index_.estimate_page_stride, index_.estimate_head_stride);
  make_plane(format.value_bits == 0 ? 0 : nibble_bytes(shape_.head_dim), value_means_,
             index_.value_means, index_.value_page_stride, index_.value_head_stride);
  make_plane(format.has_params() ? static_cast<std::int64_t>(sizeof(PageParams)) : 0, params_,
             index_.params, index_.params_page_stride, index_.params_head_stride);
  clear_index();
}

std::vector<std::int32_t> test_labels(std::int32_t heads, std::int32_t head_dim,
                                      std::int32_t channels) {
  std::vector<std::int32_t> labels;
  for (std::int32_t head = 0; head < heads; ++head) {
    const std::int32_t shift = head % std::max(1, head_dim / channels);
    for (std::int32_t i = 0; i < channels; ++i) {
      labels.push_back(i * (head_dim / channels) + shift);
    }
  }
  return labels;
}

void PagedFixture::make_queries() {
  const std::int64_t row = std::int64_t{shape_.num_q_heads} * shape_.head_dim;
  q_stride_ = row + kQueryPadding;
  q_.assign(static_cast<std::size_t>(q_stride_ * num_seqs()),
            options_.poison ? std::numeric_limits<float>::quiet_NaN() : 0.0F);
  for (std::int64_t b = 0; b < num_seqs(); ++b) {
    const std::uint64_t seed = hash64(options_.seed, 0x51ULL + static_cast<std::uint64_t>(b));
    for (std::int64_t i = 0; i < row; ++i) {
      q_[static_cast<std::size_t>(b * q_stride_ + i)] =
          normal_from_bits(hash64(seed, static_cast<std::uint64_t>(i)));
    }
  }
}

std::int64_t PagedFixture::content_seq(std::int64_t seq, std::int64_t token) const {
  const std::int64_t shared_tokens =
      std::min<std::int64_t>(shared_pages_,
                             shape_.lengths[static_cast<std::size_t>(seq)] / shape_.page_size) *
      shape_.page_size;
  return token < shared_tokens ? 0 : seq;
}

std::vector<float> PagedFixture::make_key(std::int64_t seq, std::int64_t token,
                                          std::int64_t kv_head) const {
  const std::int32_t d = shape_.head_dim;
  std::uint64_t seed = hash64(options_.seed + 1, row_key(seq, token, kv_head));
  const std::int64_t n = shape_.lengths[static_cast<std::size_t>(seq)];
  const std::int64_t group = group_size();
  float noise = 1.0F;
  float boost = 0.0F;  // wanted scaled score against the query of head `target`
  std::int64_t target = kv_head * group;
  switch (options_.distribution) {
    case Distribution::kNormal:
      break;
    case Distribution::kPlanted: {
      noise = 0.5F;
      const std::uint64_t draw = hash64(seed, 0xabc);
      if (draw % 48 < 1 || token == n / 2) {
        boost = 7.0F + 4.0F * uniform_from_bits(draw);
        target += static_cast<std::int64_t>((draw >> 8) % static_cast<std::uint64_t>(group));
      }
      break;
    }
    case Distribution::kAllEqual:
      seed = hash64(options_.seed + 1, row_key(seq, 0, kv_head));
      break;
    case Distribution::kTiedGroups: {
      const auto kind = static_cast<std::int64_t>(hash64(seed, 0xabc) % 4);
      seed = hash64(options_.seed + 1, row_key(seq, kind, kv_head));
      break;
    }
    case Distribution::kOneDominant:
      if (token == n / 2) boost = 40.0F;
      break;
    case Distribution::kSinkDominated:
      if (token < 4) boost = 25.0F + static_cast<float>(token);
      break;
    case Distribution::kZeroRange:
      noise = 0.0F;
      break;
    case Distribution::kWide:
      noise = 24.0F;
      break;
  }
  std::vector<float> key(static_cast<std::size_t>(d));
  for (std::int32_t i = 0; i < d; ++i) {
    key[static_cast<std::size_t>(i)] =
        noise * normal_from_bits(hash64(seed, static_cast<std::uint64_t>(i) + 1));
  }
  if (options_.distribution == Distribution::kZeroRange) {
    std::fill(key.begin(), key.end(), normal_from_bits(hash64(seed, 0)));
  }
  if (boost != 0.0F) {
    const std::span<const float> q = q_row(seq, target);
    float norm2 = 0;
    for (const float x : q) norm2 += x * x;
    const float factor = boost / (scale() * norm2);
    for (std::size_t i = 0; i < key.size(); ++i) key[i] += factor * q[i];
  }
  return key;
}

void PagedFixture::fill_rows() {
  const std::int32_t d = shape_.head_dim;
  std::vector<float> value(static_cast<std::size_t>(d));
  for (std::int64_t b = 0; b < num_seqs(); ++b) {
    for (std::int64_t t = 0; t < lens_[static_cast<std::size_t>(b)]; ++t) {
      const std::int64_t content = content_seq(b, t);
      if (content != b) continue;  // sequence 0 wrote it
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        set_k(b, t, h, make_key(b, t, h));
        const std::uint64_t seed = hash64(options_.seed + 2, row_key(b, t, h));
        for (std::int32_t i = 0; i < d; ++i) {
          value[static_cast<std::size_t>(i)] =
              normal_from_bits(hash64(seed, static_cast<std::uint64_t>(i)));
        }
        set_v(b, t, h, value);
      }
    }
  }
}

QueryView PagedFixture::q() const {
  return {.data = q_.data(), .seq_stride = q_stride_, .num_heads = shape_.num_q_heads};
}

std::span<const float> PagedFixture::q_row(std::int64_t seq, std::int64_t q_head) const {
  return {q_.data() + seq * q_stride_ + q_head * shape_.head_dim,
          static_cast<std::size_t>(shape_.head_dim)};
}

std::int64_t PagedFixture::row_offset(const PagePlane& plane, std::int64_t seq, std::int64_t token,
                                      std::int64_t kv_head) const {
  const std::int64_t slot = slot_of(seq, token);
  return slot / shape_.page_size * plane.page_stride + kv_head * plane.head_stride +
         slot % shape_.page_size * plane.token_stride;
}

std::int64_t PagedFixture::slot_of(std::int64_t seq, std::int64_t token) const {
  const std::int64_t page_idx = token / shape_.page_size;
  require(page_idx < capacity_pages_[static_cast<std::size_t>(seq)], "fixture", "token ", token,
          " has no page");
  return std::int64_t{kv_.page_of(seq, page_idx)} * shape_.page_size + token % shape_.page_size;
}

std::vector<float> PagedFixture::k_row(std::int64_t seq, std::int64_t token,
                                       std::int64_t kv_head) const {
  std::vector<float> row(static_cast<std::size_t>(shape_.head_dim));
  const std::int64_t base = row_offset(kv_.k, seq, token, kv_head);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = load_element(shape_.dtype, kv_.k.data, base + static_cast<std::int64_t>(i));
  }
  return row;
}

std::vector<float> PagedFixture::v_row(std::int64_t seq, std::int64_t token,
                                       std::int64_t kv_head) const {
  std::vector<float> row(static_cast<std::size_t>(shape_.head_dim));
  const std::int64_t base = row_offset(kv_.v, seq, token, kv_head);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = load_element(shape_.dtype, kv_.v.data, base + static_cast<std::int64_t>(i));
  }
  return row;
}

void PagedFixture::set_k(std::int64_t seq, std::int64_t token, std::int64_t kv_head,
                         std::span<const float> k) {
  const std::int64_t base = row_offset(kv_.k, seq, token, kv_head);
  for (std::size_t i = 0; i < k.size(); ++i) {
    store_element(shape_.dtype, kv_.k.data, base + static_cast<std::int64_t>(i), k[i]);
  }
}

void PagedFixture::set_v(std::int64_t seq, std::int64_t token, std::int64_t kv_head,
                         std::span<const float> v) {
  const std::int64_t base = row_offset(kv_.v, seq, token, kv_head);
  for (std::size_t i = 0; i < v.size(); ++i) {
    store_element(shape_.dtype, kv_.v.data, base + static_cast<std::int64_t>(i), v[i]);
  }
}

void PagedFixture::set_q(std::int64_t seq, std::int64_t q_head, std::span<const float> q) {
  std::copy(q.begin(), q.end(), q_.begin() + seq * q_stride_ + q_head * shape_.head_dim);
}

void PagedFixture::clear_index() {
  const int byte = options_.poison ? 0xff : 0;
  for (Buffer* pool : {&summaries_, &estimates_, &value_means_, &params_}) {
    if (pool->size() > 0) std::memset(pool->data(), byte, pool->size());
  }
}

void PagedFixture::seal() {
  const std::int32_t p = shape_.page_size;
  const std::int32_t d = shape_.head_dim;
  std::vector<float> keys(static_cast<std::size_t>(p) * static_cast<std::size_t>(d));
  std::vector<float> values(keys.size());
  for (const std::int32_t page : sealed_physical_pages()) {
    for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
      for (std::int64_t slot = 0; slot < p; ++slot) {
        for (std::int64_t i = 0; i < d; ++i) {
          keys[static_cast<std::size_t>(slot * d + i)] =
              load_element(shape_.dtype, kv_.k_rows(page, h), slot * kv_.k.token_stride + i);
          values[static_cast<std::size_t>(slot * d + i)] =
              load_element(shape_.dtype, kv_.v_rows(page, h), slot * kv_.v.token_stride + i);
        }
      }
      encode_page(shape_.format, p, d, keys, values, page_records(index_, page, h, p, d));
    }
  }
}

void PagedFixture::set_length(std::int64_t seq, std::int32_t n) {
  require(n <= capacity_pages_[static_cast<std::size_t>(seq)] * shape_.page_size, "fixture",
          "length ", n, " has no pages");
  lens_[static_cast<std::size_t>(seq)] = n;
}

void PagedFixture::remap_page(std::int64_t seq, std::int64_t page_idx, std::int32_t page) {
  block_table_[static_cast<std::size_t>(seq * kv_.block_table_stride + page_idx)] = page;
}

std::vector<std::int32_t> PagedFixture::sealed_physical_pages() const {
  std::vector<std::int32_t> pages;
  for (std::int64_t b = 0; b < num_seqs(); ++b) {
    for (std::int64_t i = 0; i < kv_.sealed_pages(b); ++i) pages.push_back(kv_.page_of(b, i));
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  return pages;
}

std::int32_t PagedFixture::spare_page(std::int32_t i) const {
  return spare_[static_cast<std::size_t>(i)];
}

}  // namespace twilight::test
