#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "calibrate.h"
#include "journal.h"
#include "lab_cell.h"
#include "lab_stats.h"
#include "pareto_picture.h"
#include "task.h"
#include "telemetry.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

TEST(LabStats, WilsonIntervalOfKnownCases) {
  // Published values of the interval without continuity correction.
  const Interval all = wilson_interval(1, 10);
  EXPECT_NEAR(all.low, 0.7225, 1e-4);
  EXPECT_NEAR(all.high, 1, 1e-12);
  const Interval half = wilson_interval(0.5, 100);
  EXPECT_NEAR(half.low, 0.4038, 1e-4);
  EXPECT_NEAR(half.high, 0.5962, 1e-4);
  EXPECT_EQ(wilson_interval(0, 0).low, 0);
  EXPECT_EQ(wilson_interval(0, 0).high, 1);
}

TEST(LabStats, ErrorsOfMeans) {
  const std::vector<double> values = {1, 2, 3, 4};
  const MeanError error = mean_error(values);
  EXPECT_DOUBLE_EQ(error.mean, 2.5);
  EXPECT_NEAR(error.standard_error, std::sqrt(5.0 / 3 / 4), 1e-12);
  EXPECT_TRUE(std::isnan(mean_error(std::vector<double>{1}).standard_error));
  // Neighbours that are alike count once: blocks of two equal values give what one of each gives.
  const MeanError blocks = block_mean_error({{1, 1, 2, 2}, {3, 3, 4, 4}}, 2);
  EXPECT_DOUBLE_EQ(blocks.mean, 2.5);
  EXPECT_EQ(blocks.count, 8);
  EXPECT_NEAR(blocks.standard_error, error.standard_error, 1e-12);
  // The mean is of all values, the remainder included.
  EXPECT_DOUBLE_EQ(block_mean_error({{0, 0, 3}}, 2).mean, 1);
}

TEST(LabStats, FrontHasWhatNothingBeats) {
  const std::vector<Point> points = {{3, 1}, {1, 3}, {2, 2}, {2, 1.5}, {4, 1}, {5, NAN}, {1, 4}};
  EXPECT_EQ(pareto_front(points), (std::vector<std::size_t>{1, 3, 0}));
  EXPECT_TRUE(pareto_front({}).empty());
}

TEST(LabCell, ReferencesAreWholeWords) {
  EXPECT_TRUE(contains_word(" 4821907 and 1.", "4821907"));
  EXPECT_FALSE(contains_word("14821907", "4821907"));
  EXPECT_FALSE(contains_word("beta, zeta", "eta"));
  EXPECT_TRUE(contains_word("beta, ETA", "eta"));
  EXPECT_TRUE(contains_word("eta", "eta"));
  EXPECT_TRUE(contains_word("etaeta eta", "eta"));
  EXPECT_FALSE(contains_word("", "eta"));
  EXPECT_FALSE(contains_word("eta", ""));
}

TEST(LabCell, RankScoreCountsTheRightOnesAndNoTies) {
  EXPECT_EQ(rank_score(std::vector<double>{5, 4, 3, 2}, 2), 1);
  EXPECT_EQ(rank_score(std::vector<double>{5, 1, 3, 2}, 2), 0.5);
  EXPECT_EQ(rank_score(std::vector<double>{1, 1, 1, 1}, 2), 0);
}

TEST(LabCell, CellsReadBackToTheLastBit) {
  Cell cell;
  cell.score = 1.0 / 3;
  cell.digits = 14;
  cell.digits_right = 13;
  cell.nll = {0.1, 1e-300, 12345.678901234567};
  cell.answers = {{1, 2}, {}};
  cell.totals.kept_sum = 0.1 + 0.2;
  cell.totals.bytes_read = std::int64_t{1} << 60;
  cell.telemetry.dense["short"] = 4;
  cell.telemetry.true_mass_sum = 2.0 / 3;
  const auto text = cell.json().dump();
  const Cell back = Cell::from_json(nlohmann::ordered_json::parse(text));
  EXPECT_EQ(back.json().dump(), text);
  EXPECT_EQ(back.score, cell.score);
  EXPECT_EQ(back.nll, cell.nll);
  EXPECT_EQ(back.totals.bytes_read, cell.totals.bytes_read);
}

TEST(TelemetryTest, TellsWhatRanAndWarns) {
  SparsePolicy policy = make_policy("paper");
  policy.min_candidates = 64;
  policy.max_candidates = 128;
  LayerStats sparse;
  sparse.path = StepPath::kSparse;
  sparse.num_tokens = 1000;  // a quarter is above the cap
  sparse.candidates = sparse.attended = {128};
  sparse.kept = {60, 60};
  sparse.estimated_mass = {0.96F, 0.98F};
  sparse.true_mass = {0.5F, 0.7F};
  Telemetry telemetry;
  telemetry.steps = telemetry.audited_steps = 1;
  telemetry.add(policy, sparse);
  LayerStats dense;
  dense.path = StepPath::kDenseLayer;
  telemetry.add(policy, dense);
  EXPECT_EQ(telemetry.sparse, 1);
  EXPECT_EQ(telemetry.cap_hits, 1);
  EXPECT_NEAR(telemetry.true_mass(), 0.6, 1e-6);
  const std::vector<std::string> warnings = telemetry.warnings(policy);
  ASSERT_EQ(warnings.size(), 2U);
  EXPECT_NE(warnings[0].find("cap of 128"), std::string::npos);
  EXPECT_NE(warnings[1].find("true mass 60.0 % where 97.0 %"), std::string::npos);
  EXPECT_NE(telemetry.line(policy).find("1 of 2 layer steps sparse; 1 dense: dense layer"),
            std::string::npos);
  sparse.num_tokens = 400;
  EXPECT_FALSE(cap_hit(policy, sparse));
  EXPECT_FALSE(cap_hit(policy, dense));
  EXPECT_EQ(telemetry.line(make_policy("dense")), "");
  policy.candidate_mass = 0.9;  // the budget of 100 was used up before the mass was reached
  sparse.candidates = {112};
  EXPECT_TRUE(cap_hit(policy, sparse));
  sparse.candidates = {96};
  EXPECT_FALSE(cap_hit(policy, sparse));
}

class JournalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = (std::filesystem::temp_directory_path() /
             ("lab_test_" + std::to_string(::getpid()) + ".jsonl"))
                .string();
    std::filesystem::remove(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }
  std::string path_;
};

TEST_F(JournalTest, KeepsPiecesAndDropsAHalfLine) {
  const nlohmann::ordered_json settings = {{"seed", 1}, {"p", 0.95F}, {"trials", 2}};
  {
    Journal journal(path_, settings, {});
    EXPECT_EQ(journal.size(), 0U);
    journal.add("a", {{"score", 0.1}});
    EXPECT_THROW(Journal(path_, settings, {}), Error);  // in use
  }
  std::ofstream(path_, std::ios::app) << "{\"key\":\"b\",\"val";
  {
    Journal journal(path_, settings, {});
    ASSERT_NE(journal.find("a"), nullptr);
    EXPECT_EQ((*journal.find("a"))["score"], 0.1);
    EXPECT_EQ(journal.find("b"), nullptr);
    journal.add("b", {{"score", 1}});
  }
  nlohmann::ordered_json other = settings;
  other["trials"] = 3;
  EXPECT_THROW(Journal(path_, other, {}), Error);
  EXPECT_EQ(Journal(path_, other, {"trials"}).size(), 2U);
  other["seed"] = 2;
  try {
    const Journal refused(path_, other, {"trials"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find("seed, got 2, accepted 1"), std::string::npos);
  }
}

TEST_F(JournalTest, RefusesAndKeepsOtherFiles) {
  std::ofstream(path_) << "a diary";
  EXPECT_THROW(Journal(path_, {{"seed", 1}}, {}), Error);
  std::ifstream file(path_);
  std::string content;
  std::getline(file, content);
  EXPECT_EQ(content, "a diary");
}

TEST(Calibrate, RungsTakeTheCheapestLossFirst) {
  // Layer 0 saves much for nothing, layer 1 little for much.
  const std::vector<std::vector<double>> bytes = {{10, 20, 30}, {28, 29, 30}};
  const std::vector<std::vector<double>> loss = {{0.01, 0, -0.001}, {0.5, 0, -0.5}};
  const auto choice = choose_rungs(bytes, loss, {2, 2}, 0);
  EXPECT_EQ(choice, (std::vector<std::size_t>{0, 2}));
  // Without room nothing moves.
  EXPECT_EQ(choose_rungs(bytes, loss, {2, 2}, -1), (std::vector<std::size_t>{2, 2}));
  EXPECT_TRUE(std::is_sorted(p_ladder().begin(), p_ladder().end()));
  EXPECT_NE(std::find(p_ladder().begin(), p_ladder().end(), kFirstP), p_ladder().end());
}

TEST(ParetoPicture, DrawsEveryPointAndEscapes) {
  ParetoData data;
  data.title = "A < B & C";
  data.dense = "dense: ppl 20";
  for (int i = 0; i < 12; ++i) {
    ParetoPoint point;
    point.label = "p<" + std::to_string(i);
    point.series = "series " + std::to_string(i);
    point.bytes = 0.02 * (i + 1);
    point.loss = i == 0 ? 5.0 : 0.01 / (i + 1);
    point.half_width = i == 1 ? NAN : 0.001;
    point.on_front = i > 3;
    data.points.push_back(point);
  }
  const std::string svg = draw_pareto(data, true);
  std::size_t titles = 0;
  for (std::size_t at = 0; (at = svg.find("<circle", at)) != std::string::npos; ++at) ++titles;
  EXPECT_EQ(titles, 24U);  // points and legend
  EXPECT_NE(svg.find("A &lt; B &amp; C"), std::string::npos);
  EXPECT_NE(svg.find("class=\"hollow\""), std::string::npos);  // far above the others
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  // Nothing to draw is no error.
  EXPECT_NE(draw_pareto({}, true).find("</svg>"), std::string::npos);
}

// The bundled model's tokenizer and novel.
class TaskTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string root = TWILIGHT_SOURCE_DIR;
    std::ifstream file(root + "/data/Persuasion.txt", std::ios::binary);
    const std::string novel((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
    text = new FillerText(Model::load(root + "/models/vesper-19m"), "novel", novel);
  }
  static void TearDownTestSuite() { delete text; }
  static FillerText* text;

  static std::size_t longest(const TaskItem& item) {
    std::size_t most = 0;
    for (const Question& question : item.questions) {
      most = std::max(most, question.tokens.size() + question.forced.size() +
                                static_cast<std::size_t>(question.answer_tokens));
    }
    return item.prompt.size() + item.path.size() + most;
  }
};
FillerText* TaskTest::text = nullptr;

TEST_F(TaskTest, ItemsFitTheirContextAndDependOnTheSeedAlone) {
  std::vector<std::unique_ptr<Task>> tasks;
  tasks.push_back(make_ppl_task({100}));
  tasks.push_back(make_needle_task({"niah", 4, 2, 3}));
  tasks.push_back(make_recall_task({6, 50}));
  tasks.push_back(make_chain_task({2, 4}));
  for (const bool zipf : {false, true}) {
    for (const bool ranked : {false, true}) tasks.push_back(make_words_task({zipf, 3, 2, ranked}));
  }
  for (const auto& task : tasks) {
    for (const std::int32_t context : {1000, 2048}) {
      SCOPED_TRACE(task->name() + " " + std::to_string(context));
      Random one = item_random(1, "a"), same = item_random(1, "a"), other = item_random(2, "a");
      const TaskItem item = task->make(*text, context, 0.3, one);
      EXPECT_LE(longest(item), static_cast<std::size_t>(context));
      EXPECT_GE(longest(item), static_cast<std::size_t>(context) * 9 / 10);
      const TaskItem again = task->make(*text, context, 0.3, same);
      EXPECT_EQ(again.prompt, item.prompt);
      EXPECT_EQ(again.path, item.path);
      const TaskItem different = task->make(*text, context, 0.3, other);
      EXPECT_EQ(different.prompt == item.prompt, !task->is_drawn());
      EXPECT_LE(item.targets.size(), item.path.size());
    }
  }
}

TEST_F(TaskTest, NeedlesStandInTheTextWhereTheyShould) {
  const auto task = make_needle_task({"niah", 4, 2, 3});
  Random random(5);
  const TaskItem item = task->make(*text, 2000, 0.5, random);
  const std::string prompt = text->model().decode(item.prompt);
  ASSERT_EQ(item.questions.size(), 3U);
  std::set<std::string> values;
  for (const Question& question : item.questions) {
    ASSERT_EQ(question.references.size(), 2U);
    for (const std::string& value : question.references) {
      EXPECT_TRUE(contains_word(prompt, value));
      values.insert(value);
    }
  }
  EXPECT_EQ(values.size(), 6U);
  const double place = static_cast<double>(prompt.find(item.questions[0].references[0])) /
                       static_cast<double>(prompt.size());
  EXPECT_NEAR(place, 0.5, 0.08);
  std::size_t facts = 0;
  for (std::size_t at = 0; (at = prompt.find("special magic number", at)) != std::string::npos;
       ++at) {
    ++facts;
  }
  EXPECT_EQ(facts, 8U);
}

TEST_F(TaskTest, ChainsNameOnlyWhatStandsBefore) {
  const auto task = make_chain_task({1, 5});
  Random random(7);
  const TaskItem item = task->make(*text, 2000, 0, random);
  const std::string prompt = text->model().decode(item.prompt);
  ASSERT_EQ(item.questions.front().references.size(), 6U);
  std::size_t last = 0;
  for (const std::string& variable : item.questions.front().references) {
    const std::size_t at = prompt.find("VAR " + variable + " = ");
    ASSERT_NE(at, std::string::npos);
    EXPECT_GE(at, last);
    last = at;
  }
}

TEST_F(TaskTest, CommonWordsAreCommon) {
  const auto task = make_words_task({false, 5, 2, true});
  Random random(9);
  const TaskItem item = task->make(*text, 3000, 0, random);
  std::vector<std::int32_t> tokens = item.prompt;
  tokens.insert(tokens.end(), item.path.begin(), item.path.end());
  ASSERT_GT(item.rank.candidates.size(), 50U);
  EXPECT_EQ(std::set<std::int32_t>(item.rank.candidates.begin(), item.rank.candidates.end()).size(),
            item.rank.candidates.size());
  const auto times = [&](std::size_t i) {
    return std::count(tokens.begin(), tokens.end(), item.rank.candidates[i]);
  };
  for (std::size_t i = 0; i < 5; ++i) {
    for (std::size_t j = 5; j < item.rank.candidates.size(); j += 7) {
      EXPECT_GT(times(i), 3 * times(j));
    }
  }
  EXPECT_EQ(std::count(item.rank.at.begin(), item.rank.at.end(), 1), 32);
}

TEST_F(TaskTest, ForcedAnswersHoldTheDigits) {
  const auto task = make_recall_task({3, 10});
  Random random(11);
  const TaskItem item = task->make(*text, 1500, 0, random);
  EXPECT_EQ(item.targets.size(), 10U);
  EXPECT_EQ(item.path.size(), 11U);
  EXPECT_TRUE(std::equal(item.targets.begin(), item.targets.end(), item.path.begin() + 1));
  for (const Question& question : item.questions) {
    EXPECT_EQ(text->model().decode(question.forced), " " + question.references[0]);
    std::int32_t digits = 0;
    for (const std::int32_t count : question.digits) digits += count;
    EXPECT_EQ(digits, 7);
  }
}

TEST_F(TaskTest, DrawDistinctDrawsEachOnce) {
  Random random(3);
  std::vector<std::int32_t> drawn = draw_distinct(50, 50, random);
  std::sort(drawn.begin(), drawn.end());
  for (std::int32_t i = 0; i < 50; ++i) EXPECT_EQ(drawn[static_cast<std::size_t>(i)], i);
}

}  // namespace
}  // namespace twilight::app
