#include "quant/page_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "quant/code_place.h"
#include "quant/codec.h"
#include "quant/f16_fields.h"
#include "quant/lane_sum.h"
#include "quant/nibbles.h"
#include "quant/rotation.h"

namespace twilight {
namespace {

/// Rows of a page, [P, D].
std::span<const float> row_of(std::span<const float> rows, int slot, int head_dim) {
  const auto dim = static_cast<std::size_t>(head_dim);
  return rows.subspan(static_cast<std::size_t>(slot) * dim, dim);
}

/// Mean of rows [begin, end), summed in slot order.
void mean_of(std::span<const float> rows, int begin, int end, std::span<float> mean) {
  std::fill(mean.begin(), mean.end(), 0.0F);
  for (int slot = begin; slot < end; ++slot) {
    const auto row = row_of(rows, slot, static_cast<int>(mean.size()));
    for (std::size_t d = 0; d < mean.size(); ++d) mean[d] += row[d];
  }
  for (float& x : mean) x /= static_cast<float>(end - begin);
}

/// A token's 2-bit code from its residual, and |code - 1.5|.
unsigned residual_code(float r, float rms) {
  return r >= 0 ? 2U + (r > rms ? 1U : 0U) : 1U - (r < -rms ? 1U : 0U);
}
float residual_level(float r, float rms) { return std::abs(r) > rms ? 1.5F : 0.5F; }

void encode_residual(const IndexFormat& format, std::span<const float> residual, float energy,
                     int t, std::byte* tile) {
  const auto head_dim = static_cast<int>(residual.size());
  const float rms = std::sqrt(energy / static_cast<float>(head_dim));
  const float matched = lane_sum(residual.size(), [&](std::size_t d) {
    return std::abs(residual[d]) * residual_level(residual[d], rms);
  });
  const float levels = lane_sum(residual.size(), [&](std::size_t d) {
    const float u = residual_level(residual[d], rms);
    return u * u;
  });
  for (int d = 0; d < head_dim; ++d) {
    const CodePlace place = code_place(format.layout, 2, head_dim, t, d);
    const unsigned code = residual_code(residual[static_cast<std::size_t>(d)], rms);
    tile[place.byte] |= static_cast<std::byte>(code << place.shift);
  }
  store_f16(tile + estimate_code_bytes(2, head_dim) + scale_place(format.layout, 2, t),
            f16_clamped(matched / levels));
}

/// Everything of a page that lives in the rotated basis.
void encode_rotated(const IndexFormat& format, int page_size, int head_dim,
                    std::span<const float> keys, const PageRecords& records) {
  const auto dim = static_cast<std::size_t>(head_dim);
  std::vector<float> rows(keys.begin(), keys.end());
  for (int slot = 0; slot < page_size; ++slot) {
    rotate(std::span(rows).subspan(static_cast<std::size_t>(slot) * dim, dim));
  }
  const SummaryKind centring = format.own_centre() ? SummaryKind::kCentroid : format.summary;
  const int tokens = centroid_tokens(centring, page_size);
  std::vector<float> centre(dim);
  for (int i = 0; i < num_centroids(centring); ++i) {
    std::byte* codes = records.centres + i * nibble_bytes(head_dim);
    const int begin = std::min(i * tokens, page_size);
    const int end = std::min(begin + tokens, page_size);
    if (begin == end) {
      std::fill(centre.begin(), centre.end(), 0.0F);
    } else {
      mean_of(rows, begin, end, centre);
    }
    records.params->centre_scale[i] = encode_nibbles(centre, codes);
    decode_nibbles(codes, records.params->centre_scale[i], centre);
    for (int slot = begin; slot < end; ++slot) {
      for (std::size_t d = 0; d < dim; ++d) {
        rows[static_cast<std::size_t>(slot) * dim + d] -= centre[d];
      }
    }
  }

  float total = 0;
  float farthest = -1;
  int deviant = 0;
  for (int slot = 0; slot < page_size; ++slot) {
    const auto residual = row_of(rows, slot, head_dim);
    const float energy = sum_of_squares(residual);
    total += energy;
    if (energy > farthest) {
      farthest = energy;
      deviant = slot;
    }
    if (format.key_bits == 2) {
      std::byte* tile =
          records.estimate + slot / kEstimateTileTokens * estimate_tile_bytes(2, head_dim);
      encode_residual(format, residual, energy, slot % kEstimateTileTokens, tile);
    }
  }
  records.params->variance = f16_clamped(total / static_cast<float>(page_size * head_dim));
  if (format.summary == SummaryKind::kCentroid) {
    records.params->centre_scale[1] =
        encode_nibbles(row_of(rows, deviant, head_dim), records.summary + nibble_bytes(head_dim));
  }
}

void encode_labels(int channels, int page_size, int head_dim, std::span<const float> keys,
                   const PageRecords& records) {
  std::vector<float> gathered;
  for (int slot = 0; slot < page_size; ++slot) {
    const auto row = row_of(keys, slot, head_dim);
    for (int i = 0; i < channels; ++i) {
      gathered.push_back(row[static_cast<std::size_t>(records.labels[i])]);
    }
  }
  std::memset(records.summary, 0,
              static_cast<std::size_t>(estimate_tiles_per_page(page_size) *
                                       estimate_tile_bytes(4, channels)));
  encode_estimates(IndexLayout::kTokenLanes, 4, page_size, channels, gathered, records.summary);
}

void encode_value_mean(int page_size, int head_dim, std::span<const float> values,
                       const PageRecords& records) {
  std::vector<float> mean(static_cast<std::size_t>(head_dim));
  mean_of(values, 0, page_size, mean);
  records.params->value_scale = encode_nibbles(mean, records.value_mean);
}

}  // namespace

PageRecords page_records(const KeyIndexView& index, std::int64_t page, std::int64_t head,
                         int page_size, int head_dim) {
  const IndexFormat& format = index.format;
  PageRecords records;
  if (format.summary != SummaryKind::kNone) records.summary = index.summary(page, head);
  if (format.key_bits != 0) records.estimate = index.estimate(page, head);
  if (num_centroids(format.summary) > 0 || format.own_centre()) {
    records.centres = index.centres(page, head, page_size, head_dim);
  }
  if (format.value_bits != 0) records.value_mean = index.value_mean(page, head);
  if (format.has_params()) records.params = index.page_params(page, head);
  if (format.summary == SummaryKind::kLabels) records.labels = index.head_labels(head);
  return records;
}

void copy_records(const KeyIndexView& index, std::int64_t from, std::int64_t to, std::int64_t head,
                  int page_size, int head_dim) {
  const PageRecords source = page_records(index, from, head, page_size, head_dim);
  const PageRecords target = page_records(index, to, head, page_size, head_dim);
  const auto copy = [](void* out, const void* in, std::int64_t bytes) {
    if (out != nullptr) std::memcpy(out, in, static_cast<std::size_t>(bytes));
  };
  copy(target.summary, source.summary, summary_record_bytes(index.format, page_size, head_dim));
  copy(target.estimate, source.estimate, estimate_record_bytes(index.format, page_size, head_dim));
  copy(target.value_mean, source.value_mean, nibble_bytes(head_dim));
  copy(target.params, source.params, sizeof(PageParams));
}

void encode_page(const IndexFormat& format, int page_size, int head_dim,
                 std::span<const float> keys, std::span<const float> values,
                 const PageRecords& records) {
  if (records.params != nullptr) *records.params = {};
  if (records.estimate != nullptr) {
    std::memset(records.estimate, 0,
                static_cast<std::size_t>(estimate_record_bytes(format, page_size, head_dim)));
  }
  if (num_centroids(format.summary) > 0 || format.key_bits == 2) {
    encode_rotated(format, page_size, head_dim, keys, records);
  }
  if (format.summary == SummaryKind::kLabels) {
    encode_labels(format.label_channels, page_size, head_dim, keys, records);
  } else if (num_centroids(format.summary) == 0) {
    encode_summary(format.summary, page_size, head_dim, keys, records.summary);
  }
  if (format.key_bits == 4 || format.key_bits == 8) {
    encode_estimates(format.layout, format.key_bits, page_size, head_dim, keys, records.estimate);
  }
  if (format.value_bits != 0) encode_value_mean(page_size, head_dim, values, records);
}

void decode_estimated_key(const IndexFormat& format, int page_size, int head_dim,
                          const PageRecords& records, int slot, std::span<float> key) {
  if (format.key_bits != 2) {
    decode_estimate(format.layout, format.key_bits, page_size, head_dim, records.estimate, slot,
                    key);
    return;
  }
  decode_centre(records, slot / centroid_tokens(format.summary, page_size), key);
  const std::byte* tile =
      records.estimate + slot / kEstimateTileTokens * estimate_tile_bytes(2, head_dim);
  const int t = slot % kEstimateTileTokens;
  const float scale =
      load_f16(tile + estimate_code_bytes(2, head_dim) + scale_place(format.layout, 2, t));
  for (int d = 0; d < head_dim; ++d) {
    const CodePlace place = code_place(format.layout, 2, head_dim, t, d);
    const unsigned code = (std::to_integer<unsigned>(tile[place.byte]) >> place.shift) & 3U;
    key[static_cast<std::size_t>(d)] += scale * (static_cast<float>(code) - 1.5F);
  }
}

void decode_centre(const PageRecords& records, int i, std::span<float> mean) {
  decode_nibbles(records.centres + i * nibble_bytes(static_cast<int>(mean.size())),
                 records.params->centre_scale[i], mean);
}

void decode_deviant(const PageRecords& records, std::span<float> residual) {
  decode_nibbles(records.summary + nibble_bytes(static_cast<int>(residual.size())),
                 records.params->centre_scale[1], residual);
}

void decode_value_mean(const PageRecords& records, std::span<float> mean) {
  decode_nibbles(records.value_mean, records.params->value_scale, mean);
}

}  // namespace twilight
