#include "kvcache/kv_storage.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace twilight {
namespace {

KvStorageOptions options_of(IndexLayout layout) {
  KvStorageOptions options;
  options.num_layers = 2;
  options.num_kv_heads = 3;
  options.head_dim = 64;
  options.page_size = 16;
  options.num_pages = 5;
  options.dtype = DType::kBf16;
  options.index = {SummaryKind::kSubCentroid, 2, 4, layout};
  return options;
}

/// Records of one plane, by their first byte, in ascending order.
template <typename RecordAt>
std::vector<const std::byte*> records_of(const KvStorageOptions& options, const RecordAt& at) {
  std::vector<const std::byte*> records;
  for (std::int32_t page = 0; page < options.num_pages; ++page) {
    for (std::int32_t head = 0; head < options.num_kv_heads; ++head) {
      records.push_back(at(page, head));
    }
  }
  std::ranges::sort(records);
  return records;
}

TEST(KvStorage, IndexRecordsLieSideBySide) {
  for (const IndexLayout layout : {IndexLayout::kTokenLanes, IndexLayout::kMma}) {
    const KvStorageOptions options = options_of(layout);
    KvStorage storage(options);
    for (std::int32_t layer = 0; layer < options.num_layers; ++layer) {
      const KeyIndexView index = storage.index(layer);
      const auto expect_dense = [&](const std::byte* pool, std::int64_t bytes, const auto& at) {
        const std::vector<const std::byte*> records = records_of(options, at);
        for (std::size_t i = 0; i < records.size(); ++i) {
          EXPECT_EQ(records[i], pool + static_cast<std::int64_t>(i) * bytes);
        }
      };
      expect_dense(index.summaries, 128,
                   [&](int page, int head) { return index.summary(page, head); });
      expect_dense(index.estimates, 288,
                   [&](int page, int head) { return index.estimate(page, head); });
      expect_dense(index.value_means, 32,
                   [&](int page, int head) { return index.value_mean(page, head); });
      expect_dense(index.params, sizeof(PageParams), [&](int page, int head) {
        return reinterpret_cast<const std::byte*>(index.page_params(page, head));
      });
    }
  }
}

// A sector of 32 bytes then serves two heads of a page.
TEST(KvStorage, ParamsOfAPageLieTogetherOnADevice) {
  KvStorage storage(options_of(IndexLayout::kMma));
  const KeyIndexView index = storage.index(0);
  EXPECT_EQ(index.page_params(3, 1), index.page_params(3, 0) + 1);
  storage.set_index_format({SummaryKind::kSubCentroid, 2, 4, IndexLayout::kTokenLanes}, {});
  const KeyIndexView host = storage.index(0);
  EXPECT_EQ(host.page_params(3, 1), host.page_params(2, 1) + 1);
}

}  // namespace
}  // namespace twilight
