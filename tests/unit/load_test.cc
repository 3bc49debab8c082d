#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <vector>

#include "event_parser.h"
#include "load_plan.h"
#include "load_stats.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

Lengths lengths(const char* text) { return Lengths::parse("--x", text); }

LoadShape shape(const char* prompt, const char* output, std::int32_t context = 1 << 20) {
  LoadShape shape;
  shape.prompt = lengths(prompt);
  shape.output = lengths(output);
  shape.context = context;
  return shape;
}

TEST(Lengths, RangeHasBothEndsAndIsLogUniform) {
  const Lengths range = lengths("256:32768");
  EXPECT_EQ(range.draw(0), 256);
  EXPECT_EQ(range.draw(std::nextafter(1.0, 0.0)), 32768);
  // Half of them below the geometric mean.
  EXPECT_NEAR(range.draw(0.5), std::sqrt(256.0 * 32769), 1);
  EXPECT_EQ(lengths("7:7").draw(0.9), 7);
}

TEST(Lengths, ListEntriesAreAsLikely) {
  const Lengths list = lengths("10,20,30,40");
  std::map<std::int32_t, int> seen;
  for (int i = 0; i < 400; ++i) ++seen[list.draw(i / 400.0)];
  EXPECT_EQ(seen, (std::map<std::int32_t, int>{{10, 100}, {20, 100}, {30, 100}, {40, 100}}));
  EXPECT_EQ(lengths("5").draw(0.99), 5);
}

TEST(Lengths, RefusesWhatIsNone) {
  for (const char* text : {"", "0", "-3", "a", "1:", ":2", "1:2:3", "9:3", "1,,2", "1,x", "3.5",
                           "1,2:3", "99999999999"}) {
    try {
      (void)lengths(text);
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find("[--x] tokens, got '" + std::string(text) + "'"),
                std::string::npos)
          << error.what();
    }
  }
}

TEST(LoadSource, ArrivalsArePoisson) {
  LoadShape load = shape("10", "10");
  load.rate = 4;
  LoadSource source(load);
  constexpr int kCount = 20000;
  double last = 0;
  double square = 0;
  int long_gaps = 0;
  for (int i = 0; i < kCount; ++i) {
    const LoadRequest request = source.next();
    EXPECT_EQ(request.index, i);
    const double gap = request.at - last;
    EXPECT_GE(gap, 0);
    square += gap * gap;
    long_gaps += gap > 0.5 ? 1 : 0;
    last = request.at;
  }
  // Exponential gaps: mean 1 / 4, mean square 2 / 16, and e^-2 of them above two means; four
  // standard errors of each.
  EXPECT_NEAR(last / kCount, 0.25, 4 * 0.25 / std::sqrt(kCount));
  EXPECT_NEAR(square / kCount, 0.125, 4 * 0.125 * std::sqrt(5.0 / kCount));
  EXPECT_NEAR(long_gaps / double{kCount}, std::exp(-2), 4 * 0.342 / std::sqrt(kCount));
}

TEST(LoadSource, SameSeedSameRequestsWhateverTheRate) {
  LoadShape load = shape("256:32768", "32:256", 32768);
  LoadSource closed(load);
  load.rate = 3;
  LoadSource open(load);
  load.seed = 2;
  LoadSource other(load);
  int differ = 0;
  for (int i = 0; i < 100; ++i) {
    const LoadRequest a = closed.next();
    const LoadRequest b = open.next();
    EXPECT_EQ(a.at, 0);
    EXPECT_EQ(a.prompt_tokens, b.prompt_tokens);
    EXPECT_EQ(a.output_tokens, b.output_tokens);
    EXPECT_EQ(a.place, b.place);
    EXPECT_LE(a.prompt_tokens + a.output_tokens, 32768);
    differ += other.next().prompt_tokens != a.prompt_tokens ? 1 : 0;
  }
  EXPECT_GT(differ, 90);
}

TEST(LoadSource, RefusesLengthsBeyondTheContext) {
  EXPECT_THROW(LoadSource(shape("500:9000", "20", 512)), Error);
  EXPECT_THROW(LoadSource(shape("100,500", "20", 512)), Error);
  LoadSource cut(shape("400:9000", "20", 512));  // the upper end is cut
  std::int32_t longest = 0;
  for (int i = 0; i < 100; ++i) longest = std::max(longest, cut.next().prompt_tokens);
  EXPECT_EQ(longest, 492);
}

TEST(LoadText, PromptsStartAtTheirPlaceAndGoRoundTheText) {
  const LoadText text({10, 11, 12, 13}, {1});
  LoadRequest request;
  request.prompt_tokens = 7;
  request.place = 0.5;
  EXPECT_EQ(text.prompt(request, {}), (std::vector<std::int32_t>{1, 12, 13, 10, 11, 12, 13}));
  EXPECT_EQ(text.prompt(request, {5, 6}), (std::vector<std::int32_t>{1, 5, 6, 12, 13, 10, 11}));
  request.prompt_tokens = 1;
  EXPECT_EQ(text.prompt(request, {5}), (std::vector<std::int32_t>{1}));
  EXPECT_THROW(LoadText({}, {1}), Error);
}

TEST(LoadSource, DocumentsAreStartsOfPrompts) {
  LoadShape load = shape("10:100", "5");
  load.documents = 4;
  LoadSource source(load);
  std::map<double, int> places;
  for (int i = 0; i < 400; ++i) ++places[source.next().place];
  ASSERT_EQ(places.size(), 4U);
  for (const auto& [place, count] : places) {
    EXPECT_EQ(place * 4, std::floor(place * 4));
    EXPECT_GT(count, 60);
  }
}

TEST(Percentiles, OfKnownValues) {
  std::vector<double> values;
  for (int i = 100; i >= 0; --i) values.push_back(i);
  const Percentiles p(values);
  EXPECT_EQ(p.count, 101U);
  EXPECT_DOUBLE_EQ(p.mean, 50);
  EXPECT_DOUBLE_EQ(p.p50, 50);
  EXPECT_DOUBLE_EQ(p.p90, 90);
  EXPECT_DOUBLE_EQ(p.p99, 99);
  EXPECT_DOUBLE_EQ(p.max, 100);
  EXPECT_DOUBLE_EQ(Percentiles({3, 1}).p50, 2);
  EXPECT_EQ(Percentiles(std::vector<double>()).count, 0U);
  EXPECT_EQ(Percentiles(std::vector<double>()).max, 0);
}

LoadResult result(double sent, std::vector<double> times, std::int32_t tokens) {
  LoadResult r;
  r.due = sent;
  r.sent = sent;
  r.times = std::move(times);
  r.done = r.times.back();
  r.completion_tokens = tokens;
  r.prompt_tokens = 10;
  r.request.prompt_tokens = 10;
  return r;
}

TEST(LoadStats, LatenciesCountFromWhenARequestWasDue) {
  LoadResult late = result(1.5, {2, 3, 5}, 3);
  late.due = 1;
  const std::vector<LoadResult> results = {late};
  const LoadSummary summary = summarize(results);
  EXPECT_DOUBLE_EQ(summary.first_token.p50, 1);
  EXPECT_DOUBLE_EQ(summary.per_token.p50, 1.5);
  EXPECT_DOUBLE_EQ(summary.gap.max, 2);
  EXPECT_DOUBLE_EQ(summary.total.p50, 4);
  EXPECT_DOUBLE_EQ(summary.lag.max, 0.5);
  EXPECT_DOUBLE_EQ(summary.output_rate(), 3 / 5.0);
  EXPECT_DOUBLE_EQ(summary.token_rate(), 13 / 5.0);
}

TEST(LoadStats, ErrorsAndCutsAreNotLatencies) {
  LoadResult failed = result(0, {1}, 0);
  failed.error = "429 queue_full";
  LoadResult cut = result(0, {1, 9}, 0);
  cut.cut = true;
  cut.error = "read";
  const std::vector<LoadResult> results = {failed, cut, result(0, {1, 2}, 2), failed};
  const LoadSummary summary = summarize(results);
  EXPECT_EQ(summary.requests, 4);
  EXPECT_EQ(summary.ok, 1);
  EXPECT_EQ(summary.cut, 1);
  EXPECT_EQ(summary.errors, (std::map<std::string, std::int64_t>{{"429 queue_full", 2}}));
  EXPECT_EQ(summary.total.count, 1U);
  EXPECT_EQ(summary.peak_streams, 4);
}

TEST(LoadStats, DecodeRateLeavesOutTimesWithAWaitingRequest) {
  // Alone from 1 to 2 (one token) and, both decoding, from 4 to 6 (2 + 4 tokens). The second's
  // events stand for two tokens each.
  const std::vector<LoadResult> results = {result(0, {1, 2, 3, 5, 6}, 5), result(2, {4, 5, 6}, 6)};
  const DecodeRate decode = decode_rate(results);
  EXPECT_DOUBLE_EQ(decode.seconds, 3);
  EXPECT_DOUBLE_EQ(decode.tokens, 7);
  EXPECT_DOUBLE_EQ(decode.rate(), 7 / 3.0);
  EXPECT_DOUBLE_EQ(decode.streams, (1 + 2 * 2) / 3.0);
  EXPECT_EQ(decode_rate({}).rate(), 0);
}

TEST(LoadStats, ClassesByPromptLength) {
  std::vector<LoadResult> results;
  for (const std::int32_t tokens : {1023, 1024, 4095, 16384, 40000}) {
    results.push_back(result(0, {1, 2}, 2));
    results.back().request.prompt_tokens = tokens;
  }
  std::vector<std::int64_t> counts;
  for (const LoadClass& each : by_prompt(results)) counts.push_back(each.ok);
  EXPECT_EQ(counts, (std::vector<std::int64_t>{1, 2, 0, 2}));
}

TEST(EventParser, EventsInAnyCut) {
  const std::string text =
      "data: {\"a\": 1}\n\n: a comment\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\ndata: [DONE]\n\n"
      "data: unfinished";
  const std::vector<std::string> wanted = {"{\"a\": 1}", "b\nc", "[DONE]"};
  for (std::size_t size = 1; size <= text.size(); ++size) {
    EventParser parser;
    std::vector<std::string> events;
    for (std::size_t at = 0; at < text.size(); at += size) {
      for (std::string& event : parser.feed(std::string_view(text).substr(at, size))) {
        events.push_back(std::move(event));
      }
    }
    EXPECT_EQ(events, wanted) << size;
  }
}

}  // namespace
}  // namespace twilight::app
