#ifndef TWILIGHT_QUANT_PAGE_CODEC_H_
#define TWILIGHT_QUANT_PAGE_CODEC_H_

#include <cstddef>
#include <span>

#include "quant/index_format.h"

/// Scalar encoder and decoders of a whole page's index records: the reference every fast version is
/// held to, byte for byte. Thread-safe: they touch only their arguments.
namespace twilight {

/// The records of one (page, KV head); null where the format has no such plane.
struct PageRecords {
  std::byte* summary = nullptr;
  std::byte* estimate = nullptr;
  std::byte* centres = nullptr;  ///< in the summary, or at the end of the estimate record
  std::byte* value_mean = nullptr;
  PageParams* params = nullptr;
  const std::int32_t* labels = nullptr;  ///< channels of a kLabels summary
};

/// Addresses of the records of a (page, KV head).
[[nodiscard]] PageRecords page_records(const KeyIndexView& index, std::int64_t page,
                                       std::int64_t head, int page_size, int head_dim);

/// Copies every record of page `from` to page `to`.
void copy_records(const KeyIndexView& index, std::int64_t from, std::int64_t to, std::int64_t head,
                  int page_size, int head_dim);

/// Writes all of them. `keys` and `values` are [P, D] f32, row-major; `values` is read only where
/// the format has value means.
void encode_page(const IndexFormat& format, int page_size, int head_dim,
                 std::span<const float> keys, std::span<const float> values,
                 const PageRecords& records);

/// The key of token `slot` as the estimates hold it, into `key` [D]: in the rotated basis for 2
/// bits, plain otherwise.
void decode_estimated_key(const IndexFormat& format, int page_size, int head_dim,
                          const PageRecords& records, int slot, std::span<float> key);

/// The i-th mean of a page [D], rotated: of tokens [i n, (i + 1) n), n = centroid_tokens.
void decode_centre(const PageRecords& records, int i, std::span<float> mean);

/// Rotated residual of the most deviant key [D]; kCentroid summaries.
void decode_deviant(const PageRecords& records, std::span<float> residual);

/// Mean value of a page [D].
void decode_value_mean(const PageRecords& records, std::span<float> mean);

}  // namespace twilight

#endif  // TWILIGHT_QUANT_PAGE_CODEC_H_
