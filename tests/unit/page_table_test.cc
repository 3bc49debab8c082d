#include "kvcache/page_table.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

#include "core/check.h"

namespace twilight {
namespace {

// A plain reference: every sequence is a vector of token values; memory is a map from slot to value.
struct Model {
  PageTable table;
  std::vector<int> tokens;
};

class Memory {
 public:
  explicit Memory(int page_size) : page_size_(page_size) {}

  void run(const AppendPlan& plan, const std::vector<int>& values) {
    for (std::size_t i = 0; i < plan.copy_from.size(); ++i) {
      for (int slot = 0; slot < page_size_; ++slot) {
        const auto from = slots_.find(std::int64_t{plan.copy_from[i]} * page_size_ + slot);
        if (from != slots_.end()) {
          slots_[std::int64_t{plan.copy_to[i]} * page_size_ + slot] = from->second;
        }
      }
    }
    ASSERT_EQ(plan.slots.size(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i) slots_[plan.slots[i]] = values[i];
  }

  void check(const Model& model) const {
    ASSERT_EQ(model.table.num_tokens(), static_cast<int>(model.tokens.size()));
    for (std::size_t i = 0; i < model.tokens.size(); ++i) {
      const auto page = model.table.pages()[i / static_cast<std::size_t>(page_size_)];
      const auto offset = static_cast<std::int64_t>(i) % page_size_;
      ASSERT_EQ(slots_.at(std::int64_t{page} * page_size_ + offset), model.tokens[i]);
    }
  }

 private:
  int page_size_;
  std::map<std::int64_t, int> slots_;
};

class PageTableModel : public ::testing::TestWithParam<int> {};

TEST_P(PageTableModel, RandomOperationsMatchPlainVectors) {
  const int page_size = GetParam();
  std::mt19937 random(static_cast<unsigned>(page_size));
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  PagePool pool(64);
  Memory memory(page_size);
  int out_of_pages = 0;
  int copies = 0;
  {
    std::vector<Model> models;
    int next_value = 0;
    for (int step = 0; step < 4000; ++step) {
      const int op = below(10);
      if (models.empty() || op == 0) {
        models.push_back({PageTable(pool, page_size), {}});
      } else if (op == 1) {
        const Model& source = models[static_cast<std::size_t>(below(static_cast<int>(models.size())))];
        Model copy{source.table.fork(), source.tokens};
        models.push_back(std::move(copy));
      } else if (op == 2) {
        const int victim = below(static_cast<int>(models.size()));
        models.erase(models.begin() + victim);
      } else if (op == 3) {
        Model& model = models[static_cast<std::size_t>(below(static_cast<int>(models.size())))];
        const int keep = below(static_cast<int>(model.tokens.size()) + 1);
        model.table.truncate(keep);
        model.tokens.resize(static_cast<std::size_t>(keep));
      } else {
        Model& model = models[static_cast<std::size_t>(below(static_cast<int>(models.size())))];
        const int count = below(3 * page_size + 2);
        AppendPlan plan;
        const int needed = model.table.pages_needed(count);
        const int free_before = pool.free_pages();
        const int length_before = model.table.num_tokens();
        if (!model.table.append(count, plan)) {
          ++out_of_pages;
          ASSERT_GT(needed, free_before);
          ASSERT_EQ(pool.free_pages(), free_before);
          ASSERT_EQ(model.table.num_tokens(), length_before);
          ASSERT_TRUE(plan.slots.empty());
        } else {
          ASSERT_EQ(free_before - pool.free_pages(), needed);
          copies += static_cast<int>(plan.copy_to.size());
          ASSERT_EQ(static_cast<int>(plan.sealed_pages.size()),
                    (length_before + count) / page_size - length_before / page_size);
          std::vector<int> values(static_cast<std::size_t>(count));
          for (int& value : values) value = next_value++;
          memory.run(plan, values);
          model.tokens.insert(model.tokens.end(), values.begin(), values.end());
        }
      }
      for (const Model& model : models) memory.check(model);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_EQ(pool.free_pages(), pool.num_pages());
  EXPECT_GT(out_of_pages, 0);
  EXPECT_EQ(copies > 0, page_size > 1);
}

INSTANTIATE_TEST_SUITE_P(PageSizes, PageTableModel, ::testing::Values(1, 2, 5, 16));

TEST(PageTable, RejectsBadArguments) {
  PagePool pool(4);
  EXPECT_THROW(PageTable(pool, 0), Error);
  EXPECT_THROW(PageTable(pool, 257), Error);
  PageTable table(pool, 16);
  EXPECT_THROW(table.truncate(1), Error);
  AppendPlan plan;
  EXPECT_THROW((void)table.append(-1, plan), Error);
}

}  // namespace
}  // namespace twilight
