#ifndef TWILIGHT_TESTS_SUPPORT_BAD_VALUES_H_
#define TWILIGHT_TESTS_SUPPORT_BAD_VALUES_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "ops/validate.h"
#include "support/expect_error.h"

/// Lists of edits that make one field of a good parameter block bad. They fit blocks of two
/// sequences, more than one page and D = 64.
namespace twilight::test {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// One bad value: the field's name as the message must have it, and the edit.
template <typename Params>
struct Bad {
  std::string field;
  std::function<void(Params&)> edit;
};

template <typename Params>
void expect_each_rejected(const std::string& op, const Params& good,
                          const std::vector<Bad<Params>>& bads) {
  EXPECT_NO_THROW(validate(good)) << op;
  for (const Bad<Params>& bad : bads) {
    SCOPED_TRACE(op + " " + bad.field);
    Params params = good;
    bad.edit(params);
    expect_error(ErrorCode::kInvalidArgument, {"[" + op + "]", bad.field, "got ", "accepted "},
                 [&] { validate(params); });
  }
}

/// Bad values every op with a cache shares.
template <typename Params>
std::vector<Bad<Params>> shape_bads() {
  return {{"kv.num_kv_heads", [](Params& p) { p.kv.num_kv_heads = 0; }},
          {"kv.page_size", [](Params& p) { p.kv.page_size = 0; }},
          {"kv.page_size", [](Params& p) { p.kv.page_size = 257; }},
          {"kv.head_dim", [](Params& p) { p.kv.head_dim = 0; }},
          {"kv.head_dim", [](Params& p) { p.kv.head_dim = 513; }},
          {"kv.dtype", [](Params& p) { p.kv.dtype = static_cast<DType>(7); }},
          {"kv.num_seqs", [](Params& p) { p.kv.num_seqs = -1; }}};
}

template <typename Params>
std::vector<Bad<Params>> k_bads() {
  return {{"kv.k.data", [](Params& p) { p.kv.k.data = nullptr; }},
          {"kv.k.token_stride", [](Params& p) { p.kv.k.token_stride = 63; }},
          {"kv.k.head_stride", [](Params& p) { p.kv.k.head_stride = 1; }},
          {"kv.k.page_stride", [](Params& p) { p.kv.k.page_stride = 0; }}};
}

template <typename Params>
std::vector<Bad<Params>> v_bads() {
  return {{"kv.v.data", [](Params& p) { p.kv.v.data = nullptr; }},
          {"kv.v.token_stride", [](Params& p) { p.kv.v.token_stride = -64; }},
          {"kv.v.head_stride", [](Params& p) { p.kv.v.head_stride = 63; }},
          {"kv.v.page_stride", [](Params& p) { p.kv.v.page_stride = 63; }}};
}

inline constexpr std::int32_t kDescending[] = {1, 0};
inline constexpr std::int32_t kTooHigh[] = {2};
inline constexpr std::int32_t kNegativeLengths[] = {-1, -1};
inline constexpr std::int32_t kLongLengths[] = {100000, 5};

template <typename Params>
std::vector<Bad<Params>> subset_bads() {
  return {{"seqs.count", [](Params& p) { p.seqs.count = 3; }},
          {"seqs.count", [](Params& p) { p.seqs.count = -1; }},
          {"seqs.ids", [](Params& p) { p.seqs = {.ids = kDescending, .count = 2}; }},
          {"seqs.ids", [](Params& p) { p.seqs = {.ids = kTooHigh, .count = 1}; }},
          {"kv.seq_lens", [](Params& p) { p.kv.seq_lens = nullptr; }},
          {"kv.seq_lens", [](Params& p) { p.kv.seq_lens = kNegativeLengths; }}};
}

template <typename Params>
std::vector<Bad<Params>> query_bads() {
  return {{"kv.block_table", [](Params& p) { p.kv.block_table = nullptr; }},
          {"kv.block_table_stride", [](Params& p) { p.kv.block_table_stride = 1; }},
          {"kv.block_table_stride", [](Params& p) { p.kv.seq_lens = kLongLengths; }},
          {"q.data", [](Params& p) { p.q.data = nullptr; }},
          {"q.num_heads", [](Params& p) { p.q.num_heads = 3; }},
          {"q.num_heads", [](Params& p) { p.q.num_heads = 0; }},
          {"q.seq_stride", [](Params& p) { p.q.seq_stride = 10; }},
          {"scale", [](Params& p) { p.scale = 0; }},
          {"scale", [](Params& p) { p.scale = kNan; }}};
}

template <typename Params>
std::vector<Bad<Params>> summary_bads() {
  return {{"index.summaries", [](Params& p) { p.index.summaries = nullptr; }},
          {"index.summaries", [](Params& p) { p.index.summaries += 8; }},
          {"index.summaries head stride", [](Params& p) { p.index.summary_head_stride = 16; }},
          {"index.summaries page stride", [](Params& p) { p.index.summary_page_stride += 1; }}};
}

template <typename Params>
std::vector<Bad<Params>> estimate_bads() {
  return {{"index.estimates", [](Params& p) { p.index.estimates = nullptr; }},
          {"index.estimates head stride", [](Params& p) { p.index.estimate_head_stride = 16; }},
          {"index.estimates page stride", [](Params& p) { p.index.estimate_page_stride += 8; }},
          {"index.format.key_bits", [](Params& p) { p.index.format.key_bits = 5; }},
          {"kv.head_dim", [](Params& p) { p.kv.head_dim = 60; }}};
}

template <typename Params>
std::vector<Bad<Params>> join(std::initializer_list<std::vector<Bad<Params>>> lists) {
  std::vector<Bad<Params>> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_BAD_VALUES_H_
