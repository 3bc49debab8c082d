#ifndef TWILIGHT_TESTS_SUPPORT_C_ABI_CASE_H_
#define TWILIGHT_TESTS_SUPPORT_C_ABI_CASE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "twilight/c.h"

namespace twilight::test {

struct CAbiShape {
  std::int32_t dtype = TWL_F32;
  std::int32_t num_kv_heads = 1;
  std::int32_t group = 1;
  std::int32_t head_dim = 16;
  std::int32_t page_size = 4;
  std::vector<std::int32_t> lengths = {10};
  bool token_major = false;      ///< planes [page][slot][head][D] instead of [page][head][slot][D]
  std::int32_t row_padding = 0;  ///< elements between rows
  const char* preset = "paper";
  std::uint64_t seed = 1;
};

struct FreeAligned {
  void operator()(void* memory) const;
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;
/// 64-byte aligned memory of exactly that size, so that a sanitizer sees the byte after it.
AlignedMemory aligned_memory(std::size_t bytes);

/// Everything the C interface asks of a caller for a small cache: pools of exactly the needed size,
/// shuffled pages, keys and values, argument structs that point at them. `policy` is set up so that
/// a few tokens already run sparse. Not movable: the structs point into it.
class CAbiCase {
 public:
  explicit CAbiCase(const CAbiShape& shape_in);
  CAbiCase(const CAbiCase&) = delete;
  CAbiCase& operator=(const CAbiCase&) = delete;

  [[nodiscard]] std::int64_t q_row() const {
    return std::int64_t{shape.num_kv_heads} * shape.group * shape.head_dim;
  }
  /// Softmax attention in double over positions [0, n) of a sequence; out [D].
  void plain_attention(std::int32_t seq, std::int32_t n, std::int32_t q_head, const float* q,
                       double* out) const;
  /// Largest |value| the cache can give back.
  static constexpr float kMaxValue = 1.0F;

  CAbiShape shape;
  twl_policy policy{};
  twl_plan_shape plan_shape{};
  twl_kv_view kv{};
  twl_index_view index{};
  twl_append_args append{};
  twl_seal_args seal{};
  twl_decode_args decode{};
  std::vector<std::int32_t> block_table, seq_lens, sealed;
  std::vector<std::int64_t> slots;
  std::vector<float> keys, values, queries, out, p;

 private:
  [[nodiscard]] std::size_t row_of(std::int32_t seq, std::int32_t token) const;

  AlignedMemory k_pool_, v_pool_, summaries_, estimates_, value_means_, params_;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_C_ABI_CASE_H_
