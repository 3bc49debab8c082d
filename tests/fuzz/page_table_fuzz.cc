#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "core/check.h"
#include "kvcache/page_table.h"

// Bytes are operations on sequences that share a small pool: new, fork, drop, truncate, append. A
// plain model holds each sequence's values and which page slots hold what.
namespace {

using twilight::AppendPlan;
using twilight::PagePool;
using twilight::PageTable;

void expect(bool ok) {
  if (!ok) __builtin_trap();
}

struct Model {
  PageTable table;
  std::vector<int> values;
};

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  bool empty() const { return next_ >= size_; }
  int below(int n) { return empty() || n <= 0 ? 0 : data_[next_++] % n; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t next_ = 0;
};

class World {
 public:
  World(int page_size, int num_pages) : page_size_(page_size), pool_(num_pages) {}

  void step(Input& input) {
    const int op = input.below(10);
    if (models_.empty() || op == 0) {
      if (models_.size() < 8) models_.push_back({PageTable(pool_, page_size_), {}});
      return;
    }
    const int which = input.below(static_cast<int>(models_.size()));
    Model& model = models_[static_cast<std::size_t>(which)];
    if (op == 1) {
      Model copy{model.table.fork(), model.values};
      if (models_.size() < 8) models_.push_back(std::move(copy));
    } else if (op == 2) {
      models_.erase(models_.begin() + which);
    } else if (op == 3) {
      truncate(model, input.below(255));
    } else {
      append(model, input.below(3 * page_size_ + 2));
    }
  }

  void check() const {
    std::map<int, int> references;
    for (const Model& model : models_) {
      const auto pages = model.table.pages();
      const auto n = static_cast<int>(model.values.size());
      expect(model.table.num_tokens() == n);
      expect(static_cast<int>(pages.size()) == (n + page_size_ - 1) / page_size_);
      for (const std::int32_t page : pages) ++references[page];
      for (int i = 0; i < n; ++i) {
        const std::int64_t slot =
            std::int64_t{pages[static_cast<std::size_t>(i / page_size_)]} * page_size_ +
            i % page_size_;
        const auto found = memory_.find(slot);
        expect(found != memory_.end() &&
               found->second == model.values[static_cast<std::size_t>(i)]);
      }
    }
    for (std::int32_t page = 0; page < pool_.num_pages(); ++page) {
      const auto found = references.find(page);
      expect(pool_.ref_count(page) == (found == references.end() ? 0 : found->second));
    }
    expect(pool_.free_pages() == pool_.num_pages() - static_cast<int>(references.size()));
  }

 private:
  static void truncate(Model& model, int keep) {
    const auto n = static_cast<int>(model.values.size());
    bool thrown = false;
    try {
      model.table.truncate(keep);
    } catch (const twilight::Error&) {
      thrown = true;
    }
    expect(thrown == (keep > n));
    if (!thrown) model.values.resize(static_cast<std::size_t>(keep));
  }

  void append(Model& model, int count) {
    AppendPlan plan;
    const int needed = model.table.pages_needed(count);
    const int free_before = pool_.free_pages();
    if (!model.table.append(count, plan)) {
      expect(needed > free_before && pool_.free_pages() == free_before && plan.slots.empty());
      return;
    }
    expect(free_before - pool_.free_pages() == needed);
    expect(plan.slots.size() == static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < plan.copy_from.size(); ++i) {
      for (int slot = 0; slot < page_size_; ++slot) {
        const auto from = memory_.find(std::int64_t{plan.copy_from[i]} * page_size_ + slot);
        if (from == memory_.end()) continue;
        memory_[std::int64_t{plan.copy_to[i]} * page_size_ + slot] = from->second;
      }
    }
    for (const std::int64_t slot : plan.slots) {
      memory_[slot] = next_value_;
      model.values.push_back(next_value_++);
    }
  }

  int page_size_;
  PagePool pool_;
  std::vector<Model> models_;
  std::map<std::int64_t, int> memory_;
  int next_value_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const int page_size = 1 + input.below(9);
  World world(page_size, 1 + input.below(24));
  for (int step = 0; step < 300 && !input.empty(); ++step) {
    world.step(input);
    world.check();
  }
  return 0;
}
