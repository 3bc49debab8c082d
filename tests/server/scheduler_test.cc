#include "server/scheduler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <thread>

#include "server/scheduler_runs.h"
#include "support/expect_error.h"

/// One behaviour a test; every test checks that no page leaks.
namespace twilight::test {
namespace {

using server::EndReason;
using server::Request;
using server::Scheduler;

std::vector<std::int32_t> prompt_of(std::size_t count, std::uint64_t seed = 1) {
  return some_tokens(count, seed);
}

TEST(Scheduler, GeneratesWhatTheEngineGenerates) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  const auto prompt = prompt_of(150);
  const auto sink = start(scheduler, request_of(prompt, 12));
  EXPECT_EQ(sink->wait(), EndReason::kLength);

  EngineOptions options = scheduler_options().engine;
  options.prefill_chunk = 64;
  Engine engine(cpu(), vesper(), options);
  Sequence sequence = engine.cache().new_sequence();
  std::vector<float> logits(static_cast<std::size_t>(vesper().info().vocab_size));
  ASSERT_EQ(engine.prefill(sequence, prompt, logits), Engine::Status::kOk);
  GenerateOptions generate_options;
  generate_options.max_tokens = 12;
  generate_options.stop_at_eos = false;
  EXPECT_EQ(sink->tokens(), generate(engine, sequence, logits, generate_options).tokens);
  EXPECT_EQ(sink->usage().prompt_tokens, 150);
  EXPECT_EQ(sink->usage().completion_tokens, 12);
  EXPECT_GT(sink->usage().sparse_layers, 0);
  EXPECT_LT(sink->usage().kv_bytes_read, sink->usage().kv_bytes_dense);
}

TEST(Scheduler, TheRestOfTheBatchChangesNothing) {
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 6; ++i) {
    requests.push_back(request_of(prompt_of(40 + 37 * i, i + 1), 10));
    requests.back().sampling.temperature = i % 2 == 0 ? 0.0 : 0.8;
    requests.back().sampling.seed = i;
  }
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  const std::vector<std::shared_ptr<Recorder>> sinks = start_all(scheduler, requests);
  for (std::size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->wait(), EndReason::kLength);
    EXPECT_EQ(sinks[i]->tokens(), tokens_alone(requests[i])) << i;
  }
}

// Log-probabilities want logits, which take the sampling to the host; a bias of nothing as well.
TEST(Scheduler, WhereTokensAreDrawnChangesNothing) {
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 4; ++i) {
    Request request = request_of(prompt_of(30 + 20 * i, i + 1), 12);
    request.sampling = {.temperature = 0.4 * static_cast<double>(i),
                        .top_k = i == 2 ? 10 : 0,
                        .top_p = i == 3 ? 0.8 : 1,
                        .seed = i};
    requests.push_back(request);
    request.top_logprobs = 0;
    requests.push_back(request);
    request.top_logprobs = -1;
    request.logit_bias = {{3, 0.0F}};
    requests.push_back(request);
  }
  Scheduler scheduler(cpu(), vesper(), scheduler_options(12));
  const LeakCheck leaks(scheduler);
  const std::vector<std::shared_ptr<Recorder>> sinks = start_all(scheduler, requests);
  for (std::size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->wait(), EndReason::kLength);
    EXPECT_EQ(sinks[i]->tokens(), tokens_alone(requests[i / 3 * 3])) << i;
    EXPECT_EQ(sinks[i]->tokens().size(), 12U);
  }
  for (const auto& shown : sinks[1]->shown()) EXPECT_LT(shown.logprob, 0);
}

TEST(Scheduler, ACachedPrefixChangesNothing) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  auto first = prompt_of(200);
  start(scheduler, request_of(first, 4))->wait();
  EXPECT_EQ(scheduler.stats().pages_cached, 3 * 64 / 16);
  // The same prompt, a longer one, one that leaves it in the third block, and another.
  auto longer = first;
  for (const std::int32_t token : prompt_of(80, 9)) longer.push_back(token);
  auto other = first;
  other[150] = other[150] == 5 ? 6 : 5;
  const struct {
    std::vector<std::int32_t> prompt;
    int cached;
  } cases[] = {{first, 192}, {longer, 192}, {other, 128}, {prompt_of(100, 77), 0}};
  for (const auto& c : cases) {
    const Request request = request_of(c.prompt, 8);
    const auto sink = start(scheduler, request);
    EXPECT_EQ(sink->wait(), EndReason::kLength);
    EXPECT_EQ(sink->usage().cached_tokens, c.cached);
    EXPECT_EQ(sink->tokens(), tokens_alone(request));
  }
  EXPECT_EQ(scheduler.stats().cached_prompt_tokens, 192 + 192 + 128);
}

TEST(Scheduler, RequestsThatComeTogetherShareTheirBeginning) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  const auto common = prompt_of(256);
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (std::uint64_t i = 0; i < 5; ++i) {
    auto prompt = common;
    for (const std::int32_t token : prompt_of(10 + 30 * i, i + 50)) prompt.push_back(token);
    requests.push_back(request_of(prompt, 6));
    sinks.push_back(start(scheduler, requests.back()));
  }
  for (std::size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->wait(), EndReason::kLength);
    EXPECT_EQ(sinks[i]->tokens(), tokens_alone(requests[i])) << i;
  }
  EXPECT_GE(scheduler.stats().cached_prompt_tokens, 4 * 192);
}

TEST(Scheduler, AWaitingRequestDoesNotCostThePrefixItWants) {
  // 24 pages: the first prompt leaves 16 in the prefix cache.
  Scheduler scheduler(cpu(), vesper(), scheduler_options(2, 352));
  const LeakCheck leaks(scheduler);
  const auto prompt = prompt_of(270);
  start(scheduler, request_of(prompt, 2))->wait();
  EXPECT_EQ(scheduler.stats().pages_cached, 16);
  const auto a = start(scheduler, request_of(prompt_of(40, 2), 40));
  const auto b = start(scheduler, request_of(prompt, 2));
  EXPECT_EQ(a->wait(), EndReason::kLength);
  EXPECT_EQ(b->wait(), EndReason::kLength);
  EXPECT_EQ(b->usage().cached_tokens, 256);
}

TEST(Scheduler, ManyPoliciesTakeTurns) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options(4));
  const LeakCheck leaks(scheduler);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int i = 0; i < 30; ++i) {
    Request request = request_of(prompt_of(100), 4);
    request.policy = sparse_policy("adaptive");
    request.policy->p = 0.5F + 0.01F * static_cast<float>(i);
    sinks.push_back(start(scheduler, request));
  }
  for (const auto& sink : sinks) EXPECT_EQ(sink->wait(), EndReason::kLength) << sink->error();
}

TEST(Scheduler, AShutdownSeesARequestThatCameLast) {
  for (int i = 0; i < 10; ++i) {
    Scheduler scheduler(cpu(), vesper(), scheduler_options());
    const auto first = start(scheduler, request_of(prompt_of(8), 1));
    first->wait();  // the round that ends it may still be on its way
    const auto last = start(scheduler, request_of(prompt_of(100), 400));
    scheduler.shutdown(std::chrono::milliseconds(0));
    EXPECT_TRUE(last->ended());
  }
}

TEST(Scheduler, PreemptionChangesNothing) {
  // Room for two sequences at full length, four want it.
  Scheduler scheduler(cpu(), vesper(), scheduler_options(4, 512));
  const LeakCheck leaks(scheduler);
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (std::uint64_t i = 0; i < 4; ++i) {
    requests.push_back(request_of(prompt_of(20 + i, i + 1), 200));
    requests.back().sampling.temperature = 0.7;
    requests.back().sampling.seed = i;
    sinks.push_back(start(scheduler, requests.back()));
  }
  for (std::size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->wait(), EndReason::kLength) << sinks[i]->error();
    EXPECT_EQ(sinks[i]->tokens(), tokens_alone(requests[i])) << i;
  }
  EXPECT_GT(scheduler.stats().preemptions, 0);
}

TEST(Scheduler, PoliciesOfSingleRequests) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  const auto prompt = prompt_of(300);
  Request dense = request_of(prompt, 6);
  dense.policy = make_policy("dense");
  Request wide = request_of(prompt, 6);
  wide.policy = sparse_policy("adaptive");
  wide.policy->p = 0.99F;
  const auto a = start(scheduler, dense);
  const auto b = start(scheduler, wide);
  const auto c = start(scheduler, request_of(prompt, 6));
  a->wait(), b->wait(), c->wait();
  EXPECT_EQ(a->usage().kv_bytes_read, a->usage().kv_bytes_dense);
  EXPECT_GT(b->usage().kept_tokens_mean, c->usage().kept_tokens_mean);
  EXPECT_LT(c->usage().kv_bytes_read, c->usage().kv_bytes_dense);
  Request foreign = request_of(prompt, 6);
  foreign.policy = sparse_policy("paper");
  expect_error(ErrorCode::kInvalidArgument, {"policy", "paper", "adaptive"},
               [&] { (void)scheduler.submit(foreign, std::make_shared<Recorder>()); });
}

TEST(Scheduler, LogprobsOfThePromptAndOfTokens) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  Request request = request_of(prompt_of(100), 3);
  request.prompt_logprobs = true;
  request.top_logprobs = 4;
  const auto sink = start(scheduler, request);
  EXPECT_EQ(sink->wait(), EndReason::kLength);
  ASSERT_EQ(sink->prompt().size(), request.prompt.size());
  EXPECT_EQ(sink->prompt()[0].logprob, 0);
  EXPECT_TRUE(sink->prompt()[0].top.empty());

  EngineOptions options = scheduler_options().engine;
  options.prefill_chunk = 64;
  Engine engine(cpu(), vesper(), options);
  std::vector<float> logits(static_cast<std::size_t>(vesper().info().vocab_size));
  for (const std::size_t at : {std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{99}}) {
    Sequence sequence = engine.cache().new_sequence();
    ASSERT_EQ(engine.prefill(sequence, {request.prompt.data(), at}, logits), Engine::Status::kOk);
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x));
    const auto token = static_cast<std::size_t>(request.prompt[at]);
    // Chunks that end elsewhere sum in another order, in bf16.
    EXPECT_NEAR(sink->prompt()[at].logprob, static_cast<double>(logits[token]) - std::log(sum),
                0.15);
    EXPECT_EQ(sink->prompt()[at].token, request.prompt[at]);
    ASSERT_EQ(sink->prompt()[at].top.size(), 4U);
    EXPECT_GE(sink->prompt()[at].top[0].second, sink->prompt()[at].top[3].second);
  }
  for (const auto& token : sink->shown()) {
    EXPECT_EQ(token.top[0].first, token.token);  // greedy
    EXPECT_EQ(token.top[0].second, token.logprob);
  }
  // Scoring alone.
  request.max_tokens = 0;
  const auto scored = start(scheduler, request);
  EXPECT_EQ(scored->wait(), EndReason::kLength);
  EXPECT_EQ(scored->prompt().size(), request.prompt.size());
  EXPECT_TRUE(scored->tokens().empty());
}

TEST(Scheduler, StopTokensBiasAndSinksEndARequest) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  Request request = request_of(prompt_of(50), 20);
  request.logit_bias = {{7, 1000.0F}};
  const auto biased = start(scheduler, request);
  EXPECT_EQ(biased->wait(), EndReason::kLength);
  EXPECT_EQ(biased->tokens(), std::vector<std::int32_t>(20, 7));
  request.stop_tokens = {7};
  const auto stopped = start(scheduler, request);
  EXPECT_EQ(stopped->wait(), EndReason::kStop);
  EXPECT_TRUE(stopped->tokens().empty());
  auto enough = std::make_shared<Recorder>();
  enough->keep_going = [](std::size_t count) { return count < 5; };
  ASSERT_TRUE(scheduler.submit(request_of(prompt_of(50), 20), enough).has_value());
  EXPECT_EQ(enough->wait(), EndReason::kStop);
  EXPECT_EQ(enough->tokens().size(), 5U);
  auto thrower = std::make_shared<Recorder>();
  thrower->keep_going = [](std::size_t) -> bool { throw std::runtime_error("sink broke"); };
  ASSERT_TRUE(scheduler.submit(request_of(prompt_of(50), 20), thrower).has_value());
  EXPECT_EQ(thrower->wait(), EndReason::kError);
  EXPECT_EQ(thrower->error(), "sink broke");
}

TEST(Scheduler, CancelAndDeadline) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options(1));
  const LeakCheck leaks(scheduler);
  auto running = std::make_shared<Recorder>();
  const auto id = scheduler.submit(request_of(prompt_of(60), 450), running);
  Request late = request_of(prompt_of(60, 2), 4);
  late.deadline = server::Clock::now() + std::chrono::milliseconds(1);
  const auto overdue = start(scheduler, late);  // waits behind the first
  auto waiting = std::make_shared<Recorder>();
  const auto waiting_id = scheduler.submit(request_of(prompt_of(60, 3), 4), waiting);
  running->wait_for_tokens(2);
  scheduler.cancel(*waiting_id);
  EXPECT_EQ(waiting->wait(), EndReason::kCancelled);
  EXPECT_EQ(overdue->wait(), EndReason::kDeadline);
  EXPECT_FALSE(running->ended());
  scheduler.cancel(*id);
  scheduler.cancel(12345);  // unknown
  EXPECT_EQ(running->wait(), EndReason::kCancelled);
  EXPECT_LT(running->tokens().size(), 450U);
}

TEST(Scheduler, AClientWithManyRequestsDoesNotStarveAnother) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options(1));
  const LeakCheck leaks(scheduler);
  std::vector<std::shared_ptr<Recorder>> many;
  for (std::uint64_t i = 0; i < 30; ++i) {
    Request request = request_of(prompt_of(20, i + 1), 8);
    request.client = "many";
    many.push_back(start(scheduler, request));
  }
  Request request = request_of(prompt_of(20, 99), 8);
  request.client = "single";
  const auto single = start(scheduler, request);
  single->wait();
  EXPECT_FALSE(many.back()->ended());
  for (const auto& sink : many) EXPECT_EQ(sink->wait(), EndReason::kLength);
}

TEST(Scheduler, AShortPromptOvertakesALongOne) {
  server::SchedulerOptions options = scheduler_options(4);
  options.prefill_tokens_per_step = 16;
  Scheduler scheduler(cpu(), vesper(), options);
  const LeakCheck leaks(scheduler);
  const auto slow = start(scheduler, request_of(prompt_of(500), 4));
  const auto quick = start(scheduler, request_of(prompt_of(16, 2), 4));
  EXPECT_EQ(quick->wait(), EndReason::kLength);
  EXPECT_FALSE(slow->ended());
  EXPECT_EQ(slow->wait(), EndReason::kLength);
}

TEST(Scheduler, RefusesWhatCanNeverRun) {
  server::SchedulerOptions options = scheduler_options(2, 128);
  options.max_queue = 2;
  Scheduler scheduler(cpu(), vesper(), options);
  const LeakCheck leaks(scheduler);
  const auto refused = [&](const Request& request, std::initializer_list<std::string> parts) {
    expect_error(ErrorCode::kInvalidArgument, parts,
                 [&] { (void)scheduler.submit(request, std::make_shared<Recorder>()); });
  };
  refused(request_of({}, 4), {"prompt", "no tokens"});
  refused(request_of({-1}, 4), {"prompt", "-1"});
  refused(request_of({1 << 30}, 4), {"prompt", "1073741824"});
  refused(request_of(prompt_of(10), -1), {"max_tokens", "-1"});
  refused(request_of(prompt_of(100), 400), {"prompt and max_tokens", "100 + 400", "160"});
  Request request = request_of(prompt_of(10), 4);
  request.top_logprobs = 21;
  refused(request, {"top_logprobs", "21"});
  request.top_logprobs = -1;
  request.sampling.top_p = 2;
  refused(request, {"top_p", "2"});
  request.sampling.top_p = 1;
  request.logit_bias = {{-5, 1.0F}};
  refused(request, {"logit_bias", "-5"});
  request.logit_bias = {{5, std::nanf("")}};
  refused(request, {"logit_bias", "NaN"});
}

TEST(Scheduler, AFullQueueAndAShutdownRefuse) {
  server::SchedulerOptions options = scheduler_options(1);
  options.max_queue = 3;
  Scheduler scheduler(cpu(), vesper(), options);
  std::vector<std::shared_ptr<Recorder>> sinks;
  int refused = 0;
  for (std::uint64_t i = 0; i < 12; ++i) {
    auto sink = std::make_shared<Recorder>();
    if (scheduler.submit(request_of(prompt_of(100, i + 1), 100), sink)) {
      sinks.push_back(sink);
    } else {
      ++refused;
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_EQ(scheduler.stats().requests_refused, refused);
  sinks[0]->wait_for_tokens(1);
  scheduler.shutdown(std::chrono::milliseconds(1));
  for (const auto& sink : sinks) {
    ASSERT_TRUE(sink->ended());
    EXPECT_EQ(sink->ends(), 1);
  }
  EXPECT_EQ(sinks.back()->wait(), EndReason::kShutdown);
  EXPECT_FALSE(scheduler.submit(request_of(prompt_of(10), 1), std::make_shared<Recorder>()));
  const LeakCheck leaks(scheduler);
}

TEST(Scheduler, AShutdownWithPatienceLetsRequestsEnd) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const auto sink = start(scheduler, request_of(prompt_of(100), 20));
  scheduler.shutdown(std::chrono::seconds(120));
  EXPECT_TRUE(sink->ended());
  EXPECT_EQ(sink->wait(), EndReason::kLength);
}

TEST(Scheduler, LiveViewsAreThereForWhoAsks) {
  Scheduler scheduler(cpu(), vesper(), scheduler_options());
  const LeakCheck leaks(scheduler);
  auto sink = std::make_shared<Recorder>();
  const auto id = scheduler.submit(request_of(prompt_of(300), 150), sink);
  std::optional<server::LiveKept> kept;
  while (!kept && !sink->ended()) {
    kept = scheduler.live_kept(*id);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ASSERT_TRUE(kept.has_value());
  EXPECT_EQ(kept->num_layers, vesper().info().num_layers);
  EXPECT_EQ(kept->kept_share.size(),
            static_cast<std::size_t>(kept->num_layers * kept->num_kv_heads));
  for (const float share : kept->kept_share) {
    EXPECT_GT(share, 0);
    EXPECT_LE(share, 1);
  }
  sink->wait();
}

}  // namespace
}  // namespace twilight::test
