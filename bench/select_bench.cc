// Selection and pruning beside the stages they follow.
//
//   select_bench [isa [repeats [layout]]]
//
// Hq 32, Hkv 8, D 128, P 16, sequences of 32,768 tokens, each sequence and head in memory of its
// own; layouts `heads` (default) and `pages` as in index_bench. First the ops alone on 64 units,
// one thread: microseconds a unit of processor time (so that other load on the machine, which takes
// turns, does not count), and what share that is of the time to read what the stage before reads,
// at the plain read bandwidth of the same run: 512 B a page for scores, 68 B a candidate token for
// estimates. Then the fused op against its four parts for batches of 1 and 8: median processor time
// of a thread, and the best wall time of the fused op.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"

namespace {

using namespace twilight;

constexpr int kHeadsQ = 32;
constexpr int kHeadsKv = 8;
constexpr int kGroup = kHeadsQ / kHeadsKv;
constexpr int kDim = 128;
constexpr int kPage = 16;
constexpr int kSeqs = 8;
constexpr int kTokens = 32768;
constexpr int kPagesPerSeq = kTokens / kPage;
constexpr int kCandidatePages = kPagesPerSeq / 4;
constexpr int kCandidates = kCandidatePages * kPage;
constexpr std::int64_t kPages = std::int64_t{kSeqs} * kPagesPerSeq;
constexpr std::int64_t kUnits = std::int64_t{kSeqs} * kHeadsKv;
constexpr float kP = 0.95F;

double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}
double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Times {
  double best, low, median, high;
};

Times measure(int repeats, double (*clock)(), const std::function<void()>& prepare,
              const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int i = 0; i <= repeats; ++i) {
    prepare();
    const double begin = clock();
    work();
    if (i > 0) seconds.push_back(clock() - begin);
  }
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double share) {
    return seconds[static_cast<std::size_t>(share * static_cast<double>(repeats - 1))];
  };
  return {seconds.front(), at(0.1), at(0.5), at(0.9)};
}

volatile std::uint64_t g_sink;

double read_rate(const Buffer& memory, int repeats) {
  const auto* words = memory.as<std::uint64_t>();
  const std::size_t count = memory.size() / 8;
  const Times t = measure(
      repeats, processor_seconds, [] {},
      [&] {
        std::uint64_t sum[8] = {};
        for (std::size_t i = 0; i + 8 <= count; i += 8) {
          for (std::size_t j = 0; j < 8; ++j) sum[j] ^= words[i + j];
        }
        g_sink = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
      });
  return static_cast<double>(memory.size()) / t.median;
}

enum class Rows { kPlanted, kFlat, kSinks };

// Estimates of every unit: `kPlanted` has 2 % of 32k heavy among the candidates of each head.
std::vector<float> make_rows(Rows kind, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(kUnits) * kGroup * kCandidates);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = normal(random);
    const std::size_t slot = i % kCandidates;
    if (kind == Rows::kPlanted && random() % 50 == 0) rows[i] += 7;
    if (kind == Rows::kSinks && slot < 4) rows[i] = 14;
  }
  return rows;
}

// The units of the first sequence, one call each time, its rows written just before.
Times prune_in_cache(Backend& backend, PruneParams params, Workspace workspace,
                     const std::vector<float>& rows, std::vector<float>& estimates, int repeats) {
  params.seqs = {nullptr, 1};
  const auto used = static_cast<std::size_t>(kHeadsKv) * kGroup * kCandidates;
  std::vector<double> seconds;
  for (int i = 0; i < repeats * 8; ++i) {
    PruneParams one = params;
    one.kv.num_kv_heads = 1;
    one.num_q_heads = kGroup;
    std::memcpy(estimates.data(), rows.data() + static_cast<std::size_t>(i % 8) * used / kHeadsKv,
                used / kHeadsKv * sizeof(float));
    const double begin = wall_seconds();
    backend.prune_top_p(one, workspace);
    seconds.push_back(wall_seconds() - begin);
  }
  std::sort(seconds.begin(), seconds.end());
  const std::size_t n = seconds.size();
  return {seconds[0], seconds[n / 10], seconds[n / 2], seconds[n - 1 - n / 10]};
}

void print(const char* name, const Times& t, double bound, const char* more) {
  const double unit = 1e6 / static_cast<double>(kUnits);
  std::printf("%-18s %8.2f %8.2f %8.2f-%-8.2f %6.1f %% of %.2f us%s\n", name, t.best * unit,
              t.median * unit, t.low * unit, t.high * unit,
              100 * t.median / (bound * static_cast<double>(kUnits)), bound * 1e6, more);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string isa = argc > 1 ? argv[1] : "auto";
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 15;
  const bool heads_first = argc <= 3 || std::strcmp(argv[3], "pages") != 0;
  std::mt19937_64 random(1);

  PagedKvView kv;
  kv.num_seqs = kSeqs;
  kv.num_kv_heads = kHeadsKv;
  kv.head_dim = kDim;
  kv.page_size = kPage;
  Buffer keys(static_cast<std::size_t>(kPages * kHeadsKv * kPage * kDim * 2));
  kv.k = {keys.data(), kPage * kDim, kPages * kPage * kDim, kDim};
  if (!heads_first) kv.k = {keys.data(), std::int64_t{kHeadsKv} * kPage * kDim, kPage * kDim, kDim};
  kv.v = kv.k;
  auto* element = keys.as<std::uint16_t>();
  for (std::size_t i = 0; i < keys.size() / 2; i += 4) {
    std::uint64_t bits = random();
    for (std::size_t j = 0; j < 4; ++j, bits >>= 16) {
      element[i + j] = f32_to_bf16(static_cast<float>(bits & 0xffff) * 0x1p-14F - 2.0F);
    }
  }
  std::vector<std::int32_t> table(kPages);
  std::iota(table.begin(), table.end(), 0);
  if (!heads_first) std::shuffle(table.begin(), table.end(), random);
  const std::vector<std::int32_t> lengths(kSeqs, kTokens);
  kv.block_table = table.data();
  kv.block_table_stride = kPagesPerSeq;
  kv.seq_lens = lengths.data();
  std::vector<float> q(std::size_t{kSeqs} * kHeadsQ * kDim);
  for (float& x : q) x = static_cast<float>(random() & 0xffff) * 0x1p-15F - 1.0F;
  // 160 tokens that each query head looks at, with scores near 7.
  for (std::int64_t row = 0; row < kSeqs * kHeadsQ; ++row) {
    const std::int64_t seq = row / kHeadsQ;
    for (int i = 0; i < 160; ++i) {
      const auto token = static_cast<std::int64_t>(random() % kTokens);
      std::int64_t at = table[static_cast<std::size_t>(seq * kPagesPerSeq + token / kPage)];
      at = at * kv.k.page_stride + row % kHeadsQ / kGroup * kv.k.head_stride + token % kPage * kDim;
      for (std::int64_t d = 0; d < kDim; ++d) {
        element[at + d] = f32_to_bf16(1.8F * q[static_cast<std::size_t>(row * kDim + d)]);
      }
    }
  }

  KeyIndexView index;
  index.format = {.summary = SummaryKind::kQuestBf16, .key_bits = 4};
  const auto lay_out = [&](std::int64_t record, std::int64_t& page, std::int64_t& head) {
    page = heads_first ? record : record * kHeadsKv;
    head = heads_first ? record * kPages : record;
    return Buffer(static_cast<std::size_t>(record * kHeadsKv * kPages));
  };
  Buffer summaries = lay_out(summary_record_bytes(index.format.summary, kDim),
                             index.summary_page_stride, index.summary_head_stride);
  Buffer codes = lay_out(estimate_record_bytes(index.format, kPage, kDim),
                         index.estimate_page_stride, index.estimate_head_stride);
  index.summaries = summaries.data();
  index.estimates = codes.data();

  std::vector<float> scores(static_cast<std::size_t>(kUnits) * kPagesPerSeq);
  std::vector<float> estimates(static_cast<std::size_t>(kUnits) * kGroup * kCandidates);
  std::vector<std::int32_t> pages(static_cast<std::size_t>(kUnits) * kCandidatePages);
  std::vector<std::int32_t> page_counts(static_cast<std::size_t>(kUnits));
  std::vector<std::int32_t> kept(static_cast<std::size_t>(kUnits) * kCandidates);
  std::vector<std::int32_t> kept_counts(static_cast<std::size_t>(kUnits));
  std::vector<std::int32_t> head_counts(static_cast<std::size_t>(kUnits) * kGroup);
  std::vector<float> head_mass(head_counts.size());
  const std::vector<float> p(head_counts.size(), kP);

  const auto step = [&](std::int32_t batch) {
    SelectAndPruneParams s;
    s.score.seqs = {nullptr, batch};
    s.score.q = {q.data(), std::int64_t{kHeadsQ} * kDim, kHeadsQ};
    s.score.kv = kv;
    s.score.index = index;
    s.score.scale = 1 / std::sqrt(static_cast<float>(kDim));
    s.score.scores = scores.data();
    s.score.page_stride = kPagesPerSeq;
    s.select.seqs = s.score.seqs;
    s.select.kv = kv;
    s.select.mode = SelectMode::kByScore;
    s.select.forced = {.sink_tokens = 4, .recent_pages = 4};
    s.select.fraction = 0.25;
    s.select.min_tokens = 1024;
    s.select.max_tokens = kCandidates;
    s.select.scores = scores.data();
    s.select.page_stride = kPagesPerSeq;
    s.select.pages = pages.data();
    s.select.page_counts = page_counts.data();
    s.select.candidate_stride = kCandidatePages;
    s.estimate = {s.score.seqs,    s.score.q,        kv,           index,
                  false,           s.score.scale,    pages.data(), page_counts.data(),
                  kCandidatePages, estimates.data(), kCandidates};
    s.prune.seqs = s.score.seqs;
    s.prune.kv = kv;
    s.prune.num_q_heads = kHeadsQ;
    s.prune.forced = s.select.forced;
    s.prune.min_tokens = 16;
    s.prune.p = p.data();
    s.prune.pages = pages.data();
    s.prune.page_counts = page_counts.data();
    s.prune.candidate_stride = kCandidatePages;
    s.prune.estimates = estimates.data();
    s.prune.estimate_stride = kCandidates;
    s.prune.kept = kept.data();
    s.prune.kept_counts = kept_counts.data();
    s.prune.kept_stride = kCandidates;
    s.prune.head_counts = head_counts.data();
    s.prune.head_mass = head_mass.data();
    return s;
  };
  const StepCaps caps{kSeqs, kHeadsQ, kHeadsKv, kDim, kPage, kTokens, kCandidatePages};

  {
    ThreadPool pool(1);
    const auto backend = make_cpu_backend(pool, isa);
    Buffer memory(backend->workspace_bytes(caps));
    const Workspace workspace{memory.data(), memory.size()};
    backend->seal_pages({kv, index, table.data(), static_cast<std::int32_t>(kPages)});
    const double read = read_rate(codes, repeats);
    std::printf("%s, plain read %.1f GB/s, %d repeats\n", backend->description().c_str(),
                read * 1e-9, repeats);
    std::printf("%-18s %8s %8s %17s %s\n", "us a unit", "best", "median", "p10-p90",
                "of the bytes of the stage before");
    SelectAndPruneParams s = step(kSeqs);
    backend->score_pages(s.score, workspace);
    print(
        "select 2048 pages",
        measure(
            repeats, processor_seconds, [] {}, [&] { backend->select_pages(s.select, workspace); }),
        kPagesPerSeq * 512 / read, "");
    SelectPagesParams by_mass = s.select;
    by_mass.mass = 0.9;
    std::vector<float> log_masses(scores.size());
    for (float& x : log_masses) x = std::normal_distribution<float>(0, 2)(random);
    by_mass.scores = log_masses.data();
    const Times select_mass = measure(
        repeats, processor_seconds, [] {}, [&] { backend->select_pages(by_mass, workspace); });
    char taken[64];
    std::snprintf(taken, sizeof(taken), ", %d pages", page_counts[0]);
    print("select mass .9", select_mass, kPagesPerSeq * 128 / read, taken);
    backend->select_pages(s.select, workspace);
    const struct {
      const char* name;
      Rows kind;
      PruneCriterion criterion;
      bool tail;
    } kinds[] = {{"head planted", Rows::kPlanted, PruneCriterion::kPerHead, false},
                 {"head planted tail", Rows::kPlanted, PruneCriterion::kPerHead, true},
                 {"head flat", Rows::kFlat, PruneCriterion::kPerHead, false},
                 {"head sinks", Rows::kSinks, PruneCriterion::kPerHead, false},
                 {"mean planted", Rows::kPlanted, PruneCriterion::kGroupMean, false},
                 {"mean planted tail", Rows::kPlanted, PruneCriterion::kGroupMean, true},
                 {"mean flat tail", Rows::kFlat, PruneCriterion::kGroupMean, true},
                 {"mean sinks tail", Rows::kSinks, PruneCriterion::kGroupMean, true}};
    std::vector<float> tail_mass(static_cast<std::size_t>(kUnits) * kGroup * kCandidatePages);
    std::vector<float> tail_shift(static_cast<std::size_t>(kUnits) * kGroup);
    for (const auto& kind : kinds) {
      const std::vector<float> rows = make_rows(kind.kind, random);
      s.prune.criterion = kind.criterion;
      s.prune.tail_mass = kind.tail ? tail_mass.data() : nullptr;
      s.prune.tail_shift = kind.tail ? tail_shift.data() : nullptr;
      const Times t = measure(
          repeats, processor_seconds,
          [&] { std::memcpy(estimates.data(), rows.data(), rows.size() * sizeof(float)); },
          [&] { backend->prune_top_p(s.prune, workspace); });
      // Rows in the second-level cache, as the fused step has them.
      const Times hot = prune_in_cache(*backend, s.prune, workspace, rows, estimates, repeats);
      const double kept_tokens = std::accumulate(kept_counts.begin(), kept_counts.end(), 0.0);
      char more[96];
      std::snprintf(more, sizeof(more), ", in cache %.2f, kept %.0f of %d", hot.median * 1e6,
                    kept_tokens / static_cast<double>(kUnits), kCandidates);
      print(kind.name, t, kCandidates * 68 / read, more);
    }
  }

  std::printf("\n%-8s %-8s %10s %10s %10s %10s %10s %10s %10s  (ms)\n", "threads", "batch", "score",
              "select", "estimate", "prune", "sum", "fused", "best wall");
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    const auto backend = make_cpu_backend(pool, isa);
    Buffer memory(backend->workspace_bytes(caps));
    const Workspace workspace{memory.data(), memory.size()};
    for (const std::int32_t batch : {1, kSeqs}) {
      const SelectAndPruneParams s = step(batch);
      SelectAndPruneParams fused = s;
      fused.score.scores = nullptr;
      fused.select.scores = nullptr;
      fused.estimate.estimates = nullptr;
      fused.prune.estimates = nullptr;
      const auto nothing = [] {};
      const auto time = [&](const std::function<void()>& prepare,
                            const std::function<void()>& work) {
        return measure(repeats, processor_seconds, prepare, work);
      };
      const Times score = time(nothing, [&] { backend->score_pages(s.score, workspace); });
      const Times select = time(nothing, [&] { backend->select_pages(s.select, workspace); });
      const Times estimate =
          time(nothing, [&] { backend->estimate_scores(s.estimate, workspace); });
      const Times prune = time([&] { backend->estimate_scores(s.estimate, workspace); },
                               [&] { backend->prune_top_p(s.prune, workspace); });
      const Times all = time(nothing, [&] { backend->select_and_prune(fused, workspace); });
      const Times wall = measure(repeats, wall_seconds, nothing,
                                 [&] { backend->select_and_prune(fused, workspace); });
      const double ms = 1e3 / threads;
      std::printf("%-8d %-8d %10.3f %10.3f %10.3f %10.3f %10.3f %10.3f %10.3f\n", threads, batch,
                  score.median * ms, select.median * ms, estimate.median * ms, prune.median * ms,
                  (score.median + select.median + estimate.median + prune.median) * ms,
                  all.median * ms, wall.best * 1e3);
    }
  }
  return 0;
}
