#ifndef TWILIGHT_TESTS_SUPPORT_PAGED_FIXTURE_H_
#define TWILIGHT_TESTS_SUPPORT_PAGED_FIXTURE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "kvcache/paged_kv_view.h"
#include "ops/params.h"
#include "quant/index_format.h"

namespace twilight::test {

/// What the keys look like to the queries of their group.
enum class Distribution {
  kNormal,         ///< scaled scores about N(0, 1): flat weights, large top-p sets
  kPlanted,        ///< a few heavy tokens for each query head: small top-p sets
  kAllEqual,       ///< one key for every token of a head: all scores tie
  kTiedGroups,     ///< four distinct keys: scores tie in groups
  kOneDominant,    ///< one token near the middle has nearly all the mass
  kSinkDominated,  ///< the first tokens have nearly all the mass
  kZeroRange,      ///< every channel of a key holds the same number
  kWide,           ///< scores of tens: most weights underflow in f32
};

struct FixtureShape {
  std::vector<std::int32_t> lengths;  ///< N of each of the B sequences
  std::int32_t num_q_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t page_size = 0;
  DType dtype = DType::kBf16;
  IndexFormat format;
};

struct FixtureOptions {
  Distribution distribution = Distribution::kNormal;
  std::uint64_t seed = 1;
  bool shuffle_pages = true;  ///< physical order has nothing to do with logical order
  std::int32_t shared_prefix_pages =
      0;                            ///< leading sealed pages all sequences map to the same page
  bool token_major = false;         ///< [page, slot, head, D] in place of [page, head, slot, D]
  std::int32_t row_padding = 0;     ///< elements between rows; odd numbers unalign them
  std::int32_t head_padding = 0;    ///< elements after the outer of head and slot
  std::int32_t page_padding = 0;    ///< elements after each page
  std::int32_t record_padding = 0;  ///< bytes after each index record, a multiple of 16
  std::int32_t reserve_tokens = 0;  ///< tokens past N that the block table also has pages for
  bool poison = true;  ///< unread memory is 0xff bytes (NaN in every dtype); false leaves zeros
};

/// Label channels of `heads` KV heads, evenly spread, another set for each of the first heads.
[[nodiscard]] std::vector<std::int32_t> test_labels(std::int32_t heads, std::int32_t head_dim,
                                                    std::int32_t channels);

/// B sequences in a paged cache with their key index and one query token each. Owns all memory.
/// What nobody may read is poisoned: unused physical pages, padding, slots past the end of a
/// sequence, index records of open and unused pages, block table entries past the last page. The
/// records of sealed pages come from the scalar codec. Everything follows from shape, options and
/// seed.
class PagedFixture {
 public:
  PagedFixture(FixtureShape shape, FixtureOptions options);
  PagedFixture(PagedFixture&&) = default;
  PagedFixture& operator=(PagedFixture&&) = default;

  [[nodiscard]] const FixtureShape& shape() const { return shape_; }
  [[nodiscard]] const FixtureOptions& options() const { return options_; }
  [[nodiscard]] std::int32_t num_seqs() const {
    return static_cast<std::int32_t>(shape_.lengths.size());
  }
  [[nodiscard]] std::int32_t group_size() const { return shape_.num_q_heads / shape_.num_kv_heads; }
  /// 1 / sqrt(D).
  [[nodiscard]] float scale() const;

  [[nodiscard]] PagedKvView kv() const { return kv_; }
  [[nodiscard]] KeyIndexView index() const { return index_; }
  /// [B, Hq, D] with poisoned padding between sequences.
  [[nodiscard]] QueryView q() const;
  [[nodiscard]] std::span<const float> q_row(std::int64_t seq, std::int64_t q_head) const;

  /// One stored key or value as f32 [D]; token < N.
  [[nodiscard]] std::vector<float> k_row(std::int64_t seq, std::int64_t token,
                                         std::int64_t kv_head) const;
  [[nodiscard]] std::vector<float> v_row(std::int64_t seq, std::int64_t token,
                                         std::int64_t kv_head) const;
  /// Overwrites one token's row [D], rounding to the dtype. Call `seal` afterwards.
  void set_k(std::int64_t seq, std::int64_t token, std::int64_t kv_head, std::span<const float> k);
  void set_v(std::int64_t seq, std::int64_t token, std::int64_t kv_head, std::span<const float> v);
  void set_q(std::int64_t seq, std::int64_t q_head, std::span<const float> q);

  /// Recomputes the index records of all sealed pages.
  void seal();
  /// Sets every index record (and its padding) back to poison, e.g. before an op under test seals.
  void clear_index();
  /// Physical page * P + offset of a token below N + reserve_tokens.
  [[nodiscard]] std::int64_t slot_of(std::int64_t seq, std::int64_t token) const;
  /// Changes N; at most the first length + reserve_tokens.
  void set_length(std::int64_t seq, std::int32_t n);
  /// Points one block table entry at another physical page.
  void remap_page(std::int64_t seq, std::int64_t page_idx, std::int32_t page);
  /// Distinct physical pages that are sealed, ascending.
  [[nodiscard]] std::vector<std::int32_t> sealed_physical_pages() const;
  /// A physical page no sequence uses; i in [0, kSparePages).
  [[nodiscard]] std::int32_t spare_page(std::int32_t i) const;
  [[nodiscard]] std::int32_t num_physical_pages() const { return num_physical_; }
  static constexpr std::int32_t kSparePages = 4;

  /// Whole pools with padding, for checks that nothing else was written.
  [[nodiscard]] std::span<const std::byte> k_pool() const { return {k_.data(), k_.size()}; }
  [[nodiscard]] std::span<const std::byte> v_pool() const { return {v_.data(), v_.size()}; }
  [[nodiscard]] std::span<const std::byte> summary_pool() const {
    return {summaries_.data(), summaries_.size()};
  }
  [[nodiscard]] std::span<const std::byte> estimate_pool() const {
    return {estimates_.data(), estimates_.size()};
  }
  [[nodiscard]] std::span<const std::byte> value_mean_pool() const {
    return {value_means_.data(), value_means_.size()};
  }
  [[nodiscard]] std::span<const std::byte> params_pool() const {
    return {params_.data(), params_.size()};
  }

 private:
  void lay_out_pages();
  void make_pools();
  void make_queries();
  void fill_rows();
  [[nodiscard]] std::vector<float> make_key(std::int64_t seq, std::int64_t token,
                                            std::int64_t kv_head) const;
  [[nodiscard]] std::int64_t row_offset(const PagePlane& plane, std::int64_t seq,
                                        std::int64_t token, std::int64_t kv_head) const;
  /// The sequence whose content a token shows: 0 in the shared prefix.
  [[nodiscard]] std::int64_t content_seq(std::int64_t seq, std::int64_t token) const;

  FixtureShape shape_;
  FixtureOptions options_;
  std::int32_t num_physical_ = 0;
  std::int32_t shared_pages_ = 0;
  std::vector<std::int32_t> spare_;
  std::vector<std::int32_t> block_table_;
  std::vector<std::int32_t> labels_;
  std::vector<std::int32_t> lens_;
  std::vector<std::int32_t> capacity_pages_;
  std::int64_t q_stride_ = 0;
  std::vector<float> q_;
  Buffer k_;
  Buffer v_;
  Buffer summaries_;
  Buffer estimates_;
  Buffer value_means_;
  Buffer params_;
  PagedKvView kv_;
  KeyIndexView index_;
};

/// Reads and writes one element of a cache dtype; `index` in elements.
[[nodiscard]] float load_element(DType dtype, const std::byte* base, std::int64_t index);
void store_element(DType dtype, std::byte* base, std::int64_t index, float value);

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_PAGED_FIXTURE_H_
