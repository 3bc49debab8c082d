#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cpu/kernels/select.h"
#include "support/random.h"

/// The selection kernels on rows of every shape, against sorting in double. Memory behind rows is
/// poisoned, outputs have no room to spare.
namespace twilight::test {
namespace {

using cpu::HeadSet;
using cpu::Isa;
using cpu::UnitePart;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class SelectRows : public ::testing::TestWithParam<Isa> {
 protected:
  const cpu::SelectKernels& kernels_ = cpu::select_kernels(GetParam());
  // The emulated set is ten times slower.
  int rounds(int count) const { return GetParam() == Isa::scalar ? count / 4 : count; }
};

enum class Scores { kNormal, kFewValues, kAllEqual, kSpecial, kZeros, kCount };

std::vector<float> make_scores(Random& random, Scores kind, std::int64_t size) {
  std::vector<float> scores(static_cast<std::size_t>(size));
  for (float& s : scores) {
    s = random.normal();
    if (kind == Scores::kFewValues) s = std::round(s);
    if (kind == Scores::kAllEqual) s = 0.25F;
    if (kind == Scores::kZeros) s = random.below(2) == 0 ? 0.0F : -0.0F;
    if (kind == Scores::kSpecial) {
      const std::int64_t which = random.below(8);
      if (which == 0) s = kNan;
      if (which == 1) s = -kInfinity;
      if (which == 2) s = kInfinity;
    }
  }
  return scores;
}

TEST_P(SelectRows, TopPages) {
  Random random(11);
  for (int round = 0; round < rounds(600); ++round) {
    const std::int64_t end = 1 + random.below(round % 20 == 0 ? 5000 : 400);
    const std::int64_t begin = random.below(std::min<std::int64_t>(end, 9));
    const std::int64_t count = random.below(end + 3);
    const auto kind = static_cast<Scores>(round % static_cast<int>(Scores::kCount));
    std::vector<float> scores = make_scores(random, kind, end);
    std::vector<std::int32_t> expected(static_cast<std::size_t>(end - begin));
    std::iota(expected.begin(), expected.end(), static_cast<std::int32_t>(begin));
    std::ranges::stable_sort(expected, [&](std::int32_t a, std::int32_t b) {
      const float x = scores[static_cast<std::size_t>(a)];
      const float y = scores[static_cast<std::size_t>(b)];
      if (std::isnan(x) || std::isnan(y)) return !std::isnan(x) && std::isnan(y);
      return x > y;
    });
    expected.resize(std::min(expected.size(), static_cast<std::size_t>(count)));
    std::ranges::sort(expected);

    const auto capacity = std::ssize(expected);
    std::vector<std::int32_t> out(expected.size() + 16, -7);
    std::vector<std::int32_t> scratch(
        static_cast<std::size_t>(cpu::select_scratch_entries(end - begin)), -1);
    const std::int64_t written =
        kernels_.select_top(scores.data(), begin, end, count, out.data(), capacity, scratch.data());
    ASSERT_EQ(written, capacity);
    for (std::size_t i = expected.size(); i < out.size(); ++i) ASSERT_EQ(out[i], -7);
    out.resize(expected.size());
    ASSERT_EQ(out, expected) << "round " << round;
  }
}

enum class Row {
  kNormal,
  kFewValues,
  kAllEqual,
  kPlanted,
  kSinks,
  kWide,
  kOneDominant,
  kHoles,
  kWithNan,
  kInfinite,
  kEmpty,
  kCount
};

std::vector<float> make_row(Random& random, Row kind, std::int64_t size) {
  std::vector<float> row(static_cast<std::size_t>(cpu::padded_row(size)) + 16, kNan);
  for (std::int64_t i = 0; i < size; ++i) {
    float e = random.normal();
    const std::int64_t dice = random.below(50);
    switch (kind) {
      case Row::kFewValues:
        e = std::round(2 * e) / 2;
        break;
      case Row::kAllEqual:
        e = 1.5F;
        break;
      case Row::kPlanted:
        e = 0.5F * e + (dice == 0 ? 8.0F : 0.0F);
        break;
      case Row::kSinks:
        e = i < 2 ? 20.0F : e;
        break;
      case Row::kWide:
        e *= 30;
        break;
      case Row::kOneDominant:
        e = i == size / 2 ? 300.0F : e;
        break;
      case Row::kHoles:
        e = dice < 20 ? -kInfinity : e;
        break;
      case Row::kWithNan:
        e = dice < 5 ? kNan : e;
        break;
      case Row::kInfinite:
        e = dice < 2 ? kInfinity : e;
        break;
      case Row::kEmpty:
        e = -kInfinity;
        break;
      default:
        break;
    }
    row[static_cast<std::size_t>(i)] = e;
  }
  return row;
}

TEST_P(SelectRows, CountsByMass) {
  constexpr double kShares[] = {1e-9, 0.25, 0.5, 0.8, 0.9, 0.999, 1.0 - 1e-9};
  Random random(14);
  for (int round = 0; round < rounds(800); ++round) {
    const std::int64_t pages = 1 + random.below(round % 20 == 0 ? 3000 : 300);
    cpu::MassPart part;
    part.pages = pages;
    part.begin = random.below(std::min<std::int64_t>(pages, 5));
    part.end = std::max(part.begin, pages - random.below(5));
    part.mass = kShares[random.below(std::ssize(kShares))];
    const auto kind = static_cast<Scores>(round % static_cast<int>(Scores::kCount));
    std::vector<float> scores = make_scores(random, kind, pages);
    const float spread = round % 3 == 0 ? 40.0F : 2.0F;
    for (float& s : scores) s *= spread;
    part.scores = scores.data();

    std::vector<double> masses(scores.size(), 0.0);
    float top = -kInfinity;
    for (const float s : scores) top = s > top ? s : top;
    double all = 0;
    double taken = 0;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (!std::isinf(top) && !std::isnan(scores[i])) {
        masses[i] = std::exp(double{scores[i]} - double{top});
      }
      all += masses[i];
      const auto page = static_cast<std::int64_t>(i);
      if (page < part.begin || page >= part.end) taken += masses[i];
    }
    std::vector<double> ranked(masses.begin() + part.begin, masses.begin() + part.end);
    std::ranges::sort(ranked, std::greater<>());
    const auto reached = [&](std::int64_t count, double slack) {
      double sum = taken;
      for (std::int64_t i = 0; i < count; ++i) sum += ranked[static_cast<std::size_t>(i)];
      return sum >= part.mass * all + slack * all;
    };
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(cpu::select_scratch_entries(pages)),
                                      -1);
    const std::int64_t count = kernels_.count_by_mass(part, scratch.data());
    ASSERT_TRUE(count >= 0 && count <= part.end - part.begin) << "round " << round;
    EXPECT_TRUE(count == part.end - part.begin || reached(count, -1e-13)) << "round " << round;
    EXPECT_FALSE(count > 0 && reached(count - 1, 1e-13)) << "round " << round;
  }
}

TEST_P(SelectRows, HeadSets) {
  // f32 weights: e - max rounds by half a unit of up to 128, the exponential by 3 units, sums
  // of 16.
  constexpr double kMass = 2e-6;
  constexpr float kSteps[] = {1e-30F, 1e-6F, 0.1F, 0.5F, 0.9F, 0.95F, 0.99F, 0.999999F, 1.0F};
  Random random(12);
  for (int round = 0; round < rounds(1500); ++round) {
    const std::int64_t size = 1 + random.below(round % 20 == 0 ? 9000 : 500);
    const auto kind = static_cast<Row>(round % static_cast<int>(Row::kCount));
    const float p = kSteps[random.below(std::ssize(kSteps))];
    const auto min_tokens =
        static_cast<std::int32_t>(random.below(3) == 0 ? random.below(200) : random.below(2));
    std::vector<float> row = make_row(random, kind, size);
    const std::vector<float> scores(row.begin(), row.begin() + size);
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(cpu::prune_scratch_entries(size)));
    const float known = std::accumulate(scores.begin(), scores.end(), -kInfinity,
                                        [](float m, float e) { return e > m ? e : m; });
    HeadSet set;
    kernels_.find_head_set(row.data(), size, round % 2 == 0 ? nullptr : &known, p, min_tokens,
                           scratch.data(), &set);
    ASSERT_EQ(set.maximum, known);

    const auto real = [](float e) { return e > -kInfinity; };
    const std::int64_t num_real = std::ranges::count_if(scores, real);
    const double max = num_real == 0 ? 0 : std::ranges::max(scores, {}, [&](float e) {
      return real(e) ? e : -kInfinity;
    });
    const auto weight = [&](float e) {
      return !real(e) ? 0.0 : static_cast<double>(e) == max ? 1.0 : std::exp(e - max);
    };
    double total = 0;
    for (const float e : scores) total += weight(e);
    ASSERT_NEAR(set.total, total, kMass * total) << "round " << round;

    std::int64_t kept = 0;
    double kept_mass = 0;
    float weakest = kInfinity;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (!(row[i] >= set.threshold)) continue;
      ASSERT_TRUE(real(scores[i])) << "round " << round;
      ++kept;
      kept_mass += weight(scores[i]);
      weakest = std::min(weakest, scores[i]);
    }
    ASSERT_GE(kept, std::min<std::int64_t>(std::max(min_tokens, 1), num_real)) << "round " << round;
    if (p == 1.0F) {
      ASSERT_EQ(kept, num_real);
      continue;
    }
    ASSERT_GE(kept_mass, (p - kMass) * total) << "round " << round;
    // Those certainly heavier than the weakest one must not have been enough.
    std::int64_t heavier = 0;
    double heavier_mass = 0;
    const double slack = 4e-6 * std::max(1.0, (max - weakest) / 64);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (real(scores[i]) && scores[i] >= weakest) {
        ASSERT_TRUE(row[i] >= set.threshold) << "a tie was dropped, round " << round;
      }
      if (!(scores[i] > weakest + slack)) continue;
      ++heavier;
      heavier_mass += weight(scores[i]);
    }
    if (num_real > 0) {
      EXPECT_TRUE(heavier < min_tokens || heavier_mass < p * total + kMass * total)
          << "round " << round << ", kept " << kept << ", heavier " << heavier << " with "
          << heavier_mass / total << ", p " << p;
    }
  }
}

TEST_P(SelectRows, Unions) {
  constexpr std::int32_t kPageSizes[] = {16, 8, 32, 4, 5, 1, 24, 48};
  constexpr std::int32_t kGroups[] = {1, 2, 4, 8, 3, 5};
  Random random(13);
  for (int round = 0; round < rounds(600); ++round) {
    const std::int32_t page_size = kPageSizes[round % std::ssize(kPageSizes)];
    const std::int32_t group = kGroups[random.below(std::ssize(kGroups))];
    const std::int64_t n = 1 + random.below(1500);
    ForcedTokens forced;
    forced.sink_tokens = static_cast<std::int32_t>(random.below(20));
    forced.recent_pages = static_cast<std::int32_t>(random.below(4));
    std::vector<std::int32_t> pages;
    for (std::int64_t page = 0; page * page_size < n; ++page) {
      if (forced.contains_page(page, n, page_size) || random.below(2) == 0) {
        pages.push_back(static_cast<std::int32_t>(page));
      }
    }
    const std::int64_t slots = std::ssize(pages) * page_size;
    const std::int64_t stride = cpu::padded_row(slots) + 16 * random.below(2);
    const auto token_of = [&](std::int64_t slot) {
      return std::int64_t{pages[static_cast<std::size_t>(slot / page_size)]} * page_size +
             slot % page_size;
    };
    std::vector<float> rows(static_cast<std::size_t>(group * stride), kNan);
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(cpu::prune_scratch_entries(slots)));
    std::vector<HeadSet> sets(static_cast<std::size_t>(group));
    for (std::int32_t g = 0; g < group; ++g) {
      float* row = rows.data() + g * stride;
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        row[slot] = token_of(slot) < n ? 2 * random.normal() : -kInfinity;
      }
      kernels_.find_head_set(row, slots, nullptr, random.uniform(0.05F, 0.95F), 1, scratch.data(),
                             &sets[static_cast<std::size_t>(g)]);
    }

    const bool group_mean = round % 2 == 1;
    const float p = random.below(8) == 0 ? 1.0F : random.uniform(0.05F, 0.99F);
    const auto min_tokens = static_cast<std::int32_t>(random.below(40));
    // The set of the mean, in double; slots that f32 may decide otherwise are left out of the
    // comparison by taking the threshold in the middle between two means.
    float mean_threshold = -kInfinity;
    std::vector<float> mean(static_cast<std::size_t>(slots), -1.0F);
    if (group_mean) {
      std::vector<float> ranked;
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        if (token_of(slot) >= n) continue;
        double sum = 0;
        for (std::int32_t g = 0; g < group; ++g) {
          sum += static_cast<double>(rows[static_cast<std::size_t>(g * stride + slot)]) /
                 sets[static_cast<std::size_t>(g)].total / group;
        }
        mean[static_cast<std::size_t>(slot)] = static_cast<float>(sum);
        ranked.push_back(static_cast<float>(sum));
      }
      std::ranges::sort(ranked, std::greater<>());
      double sum = 0;
      std::size_t size = 0;
      while (size < ranked.size() &&
             (p >= 1 || sum < static_cast<double>(p) || std::ssize(ranked) <= min_tokens ||
              static_cast<std::int32_t>(size) < min_tokens)) {
        sum += static_cast<double>(ranked[size++]);
      }
      if (size < ranked.size()) mean_threshold = (ranked[size - 1] + ranked[size]) / 2;
    }

    std::vector<std::int32_t> kept;
    std::vector<std::int32_t> counts(static_cast<std::size_t>(group), 0);
    const std::int64_t page_count = std::ssize(pages);
    std::vector<double> dropped(static_cast<std::size_t>(group * page_count), 0);
    std::vector<double> masses(static_cast<std::size_t>(group), 0);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      if (token_of(slot) >= n) continue;
      const bool always = forced.contains(token_of(slot), n, page_size);
      bool any = always;
      for (std::size_t g = 0; g < sets.size(); ++g) {
        const bool in =
            group_mean
                ? mean[static_cast<std::size_t>(slot)] > mean_threshold
                : rows[g * static_cast<std::size_t>(stride) + static_cast<std::size_t>(slot)] >=
                      sets[g].threshold;
        counts[g] += in || always ? 1 : 0;
        any |= in;
      }
      if (!any) {
        for (std::size_t g = 0; g < sets.size(); ++g) {
          const auto at = static_cast<std::int64_t>(g);
          dropped[static_cast<std::size_t>(at * page_count + slot / page_size)] +=
              static_cast<double>(
                  std::max(0.0F, rows[static_cast<std::size_t>(at * stride + slot)]));
        }
        continue;
      }
      kept.push_back(static_cast<std::int32_t>(token_of(slot)));
      for (std::size_t g = 0; g < sets.size(); ++g) {
        masses[g] +=
            std::max(0.0F,
                     rows[g * static_cast<std::size_t>(stride) + static_cast<std::size_t>(slot)]) /
            sets[g].total;
      }
    }

    std::vector<std::int32_t> out(kept.size() + 16, -9);
    std::vector<std::int32_t> head_counts(sets.size(), -1);
    std::vector<float> head_mass(sets.size(), -1);
    const bool with_tail = round % 3 != 0;
    std::vector<float> tail_mass(dropped.size() + 16, -9);
    std::vector<float> tail_shift(sets.size(), kNan);
    UnitePart part;
    part.criterion = group_mean ? PruneCriterion::kGroupMean : PruneCriterion::kPerHead;
    part.p = p;
    part.min_tokens = min_tokens;
    if (with_tail) {
      part.tail_mass = tail_mass.data();
      part.tail_stride = page_count;
      part.tail_shift = tail_shift.data();
    }
    part.weights = rows.data();
    part.stride = stride;
    part.heads = sets.data();
    part.pages = pages.data();
    part.page_count = std::ssize(pages);
    part.group = group;
    part.page_size = page_size;
    part.num_tokens = n;
    part.forced = forced;
    part.kept = out.data();
    part.kept_capacity = std::ssize(kept);
    part.head_counts = head_counts.data();
    part.head_mass = head_mass.data();
    ASSERT_EQ(kernels_.unite_heads(part, scratch.data()), std::ssize(kept));
    for (std::size_t i = kept.size(); i < out.size(); ++i) ASSERT_EQ(out[i], -9);
    out.resize(kept.size());
    ASSERT_EQ(out, kept) << "round " << round;
    ASSERT_EQ(head_counts, counts);
    for (std::size_t g = 0; g < sets.size(); ++g) ASSERT_NEAR(head_mass[g], masses[g], 1e-6);
    for (std::size_t i = 0; i < tail_mass.size(); ++i) {
      if (!with_tail || i >= dropped.size()) {
        ASSERT_EQ(tail_mass[i], -9);
      } else if (dropped[i] == 0) {
        ASSERT_EQ(tail_mass[i], 0) << "round " << round;
      } else {
        ASSERT_NEAR(tail_mass[i], dropped[i], 1e-5 * dropped[i]) << "round " << round;
      }
    }
    for (std::size_t g = 0; with_tail && g < sets.size(); ++g) {
      ASSERT_EQ(tail_shift[g], sets[g].maximum);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SelectRows, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& param) { return std::string(cpu::isa_name(param.param)); });

}  // namespace
}  // namespace twilight::test
