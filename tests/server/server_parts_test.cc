// Parts of the server that need no model: stop strings, rate limits, the queue of events, logs.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <thread>
#include <vector>

#include "server/choice_stream.h"
#include "server/log.h"
#include "server/rate_limit.h"
#include "server/stop_filter.h"

namespace twilight::server {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(StopFilter, HoldsBackWhatMayBegin) {
  StopFilter filter({"STOP", "end."});
  EXPECT_EQ(filter.push("abcS"), "abc");
  EXPECT_EQ(filter.push("T"), "");
  EXPECT_EQ(filter.push("ILL"), "STILL");
  EXPECT_EQ(filter.push(" the en"), " the ");
  EXPECT_EQ(filter.flush(), "en");
  EXPECT_FALSE(filter.stopped());
}

TEST(StopFilter, DropsEverythingFromTheFirst) {
  StopFilter filter({"ab", "b"});
  EXPECT_EQ(filter.push("x"), "x");
  EXPECT_EQ(filter.push("a"), "");
  EXPECT_EQ(filter.push("bcd"), "");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.push("more"), "");
  EXPECT_EQ(filter.flush(), "");
}

// However a text is cut into pieces, what is shown is the text before the first stop string.
TEST(StopFilter, AnyCutGivesTheSame) {
  std::mt19937 random(3);
  const auto word = [&](std::size_t most) {
    std::string text;
    for (std::size_t n = random() % (most + 1); n > 0; --n) {
      text += static_cast<char>('a' + random() % 2);
    }
    return text;
  };
  for (int trial = 0; trial < 3000; ++trial) {
    const std::string text = word(24);
    const std::string stop = word(4) + "a";
    StopFilter filter({stop});
    std::string shown;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t n = 1 + random() % 5;
      shown += filter.push(text.substr(at, n));
      ASSERT_EQ(shown, text.substr(0, text.find(stop)).substr(0, shown.size()));
      at += n;
    }
    if (!filter.stopped()) shown += filter.flush();
    ASSERT_EQ(shown, text.substr(0, text.find(stop))) << text << " / " << stop;
    ASSERT_EQ(filter.stopped(), text.find(stop) != std::string::npos);
  }
}

TEST(RateLimit, BurstThenRate) {
  RateLimit limit(2, 3);
  const auto start = RateLimit::Clock::now();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(limit.take("a", start), 0);
  EXPECT_NEAR(limit.take("a", start), 0.5, 1e-9);
  EXPECT_EQ(limit.take("b", start), 0);
  EXPECT_EQ(limit.take("a", start + milliseconds(501)), 0);
  EXPECT_GT(limit.take("a", start + milliseconds(502)), 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(limit.take("a", start + seconds(100)), 0);
  EXPECT_GT(limit.take("a", start + seconds(100)), 0);
}

TEST(RateLimit, ManyClientsAreForgotten) {
  RateLimit limit(1, 1);
  const auto start = RateLimit::Clock::now();
  for (int i = 0; i < 10000; ++i) {
    EXPECT_EQ(limit.take(std::to_string(i), start + milliseconds(i)), 0);
  }
  RateLimit off(0, 1);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(off.take("a", start), 0);
}

TEST(EventQueue, FullQueueRefusesButTakesEnds) {
  EventQueue queue(2);
  const auto text = [](const char* words) {
    ChoiceEvent event;
    event.text = words;
    return event;
  };
  EXPECT_TRUE(queue.push(text("a")));
  EXPECT_TRUE(queue.push(text("b")));
  EXPECT_FALSE(queue.overflowed());
  EXPECT_FALSE(queue.push(text("c")));
  EXPECT_TRUE(queue.overflowed());
  ChoiceEvent end;
  end.end = ChoiceEnd{};
  EXPECT_TRUE(queue.push(end));
  EXPECT_EQ(queue.pop(milliseconds(0))->text, "a");
  EXPECT_EQ(queue.pop(milliseconds(0))->text, "b");
  EXPECT_TRUE(queue.pop(milliseconds(0))->end.has_value());
  EXPECT_FALSE(queue.pop(milliseconds(1)).has_value());
}

TEST(EventQueue, AcrossThreads) {
  EventQueue queue(1 << 20);
  std::thread writer([&] {
    for (int i = 0; i < 5000; ++i) {
      ChoiceEvent event;
      event.choice = i;
      EXPECT_TRUE(queue.push(std::move(event)));
    }
  });
  for (int i = 0; i < 5000; ++i) {
    const auto event = queue.pop(seconds(10));
    ASSERT_TRUE(event.has_value());
    ASSERT_EQ(event->choice, i);
  }
  writer.join();
}

std::string logged(bool json, LogLevel threshold, LogLevel level) {
  std::FILE* file = std::tmpfile();
  Log log(file, threshold, json);
  log.write(level, "request", Json{{"id", "x"}, {"text", "two\nlines"}, {"n", 3}});
  std::rewind(file);
  std::string text(4096, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  return text;
}

TEST(Log, OneLineAnEvent) {
  const Json line = Json::parse(logged(true, LogLevel::kInfo, LogLevel::kInfo));
  EXPECT_EQ(line["text"], "two\nlines");
  EXPECT_EQ(line["level"], "info");
  const std::string plain = logged(false, LogLevel::kInfo, LogLevel::kWarning);
  EXPECT_NE(plain.find("warning request id=x text=\"two\\nlines\" n=3\n"), std::string::npos);
  EXPECT_EQ(logged(true, LogLevel::kWarning, LogLevel::kInfo), "");
  EXPECT_EQ(logged(true, LogLevel::kOff, LogLevel::kError), "");
}

}  // namespace
}  // namespace twilight::server
