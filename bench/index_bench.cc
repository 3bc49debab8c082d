// Index ops against what the machine can do: plain read bandwidth and the rate of the dot-product
// instruction that bounds them, both measured in the same run.
//
//   index_bench [isa [repeats [layout]]]
//
// Hq 32, Hkv 8, D 128, P 16, 8 sequences of 32,768 tokens, every sequence and head in memory of its
// own. Layout `heads` (default) is what the cache makes of a sequence that grew alone: KV head
// first, a head's pages in order. `pages` has all heads of a page together and shuffled pages. A
// row gives the bytes the op must read, the best and median time, the spread (p10 to p90), the
// median processor time of a thread, the rate in that time, its share of the plain read, and its
// share of the lower of the plain read and the instruction bound. Rates go by processor time so
// that other load on the machine, which takes turns, does not count.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/index.h"
#include "backend/cpu/kernels/select.h"
#include "core/buffer.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using twilight::Buffer;
using twilight::IndexFormat;
using twilight::SummaryKind;
using twilight::ThreadPool;

constexpr int kHeadsQ = 32;
constexpr int kHeadsKv = 8;
constexpr int kDim = 128;
constexpr int kPage = 16;
constexpr int kSeqs = 8;
constexpr int kTokens = 32768;
constexpr int kPagesPerSeq = kTokens / kPage;
constexpr std::int64_t kPages = std::int64_t{kSeqs} * kPagesPerSeq;
constexpr double kUnits = double{kSeqs} * kHeadsKv;

struct Times {
  double best, low, median, high;
  double cpu;  // median processor time, of all threads together
};

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

Times measure(int repeats, const std::function<void()>& work) {
  work();
  std::vector<double> seconds;
  std::vector<double> cpu;
  for (int i = 0; i < repeats; ++i) {
    const double cpu_begin = cpu_seconds();
    const auto begin = std::chrono::steady_clock::now();
    work();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    cpu.push_back(cpu_seconds() - cpu_begin);
  }
  std::sort(seconds.begin(), seconds.end());
  std::sort(cpu.begin(), cpu.end());
  const auto at = [&](double share) {
    return seconds[static_cast<std::size_t>(share * static_cast<double>(repeats - 1))];
  };
  return {seconds.front(), at(0.1), at(0.5), at(0.9), cpu[cpu.size() / 2]};
}

volatile std::uint64_t g_sink;

#if defined(__x86_64__)
__attribute__((target("avx2"))) std::uint64_t read_bytes(const std::byte* from, std::int64_t size) {
  __m256i sum[4] = {};
  for (std::int64_t i = 0; i < size; i += 128) {
    for (int j = 0; j < 4; ++j) {
      sum[j] = _mm256_xor_si256(
          sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i + 32 * j)));
    }
  }
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<std::uint64_t>(_mm256_extract_epi64(all, 0));
}

constexpr std::int64_t kProbeSteps = 200'000;
constexpr int kProbeChains = 16;

// kProbeChains * kProbeSteps instructions in independent chains.
__attribute__((target("avx512f,avx512vnni"))) void probe_int8() {
  __m512i acc[kProbeChains] = {};
  const __m512i a = _mm512_set1_epi32(3);
  for (std::int64_t i = 0; i < kProbeSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kProbeChains; ++j) {
      acc[j] = _mm512_dpbusd_epi32(acc[j], a, a);
      asm volatile("" : "+v"(acc[j]));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kProbeChains; ++j) asm volatile("" ::"v"(acc[j]));
}
__attribute__((target("avx512f,avx512vbmi"))) void probe_lookup() {
  __m512i acc[kProbeChains] = {};
  const __m512i a = _mm512_set1_epi32(3);
  for (std::int64_t i = 0; i < kProbeSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kProbeChains; ++j) {
      asm volatile("vpermb %1, %0, %0" : "+v"(acc[j]) : "v"(a));
    }
  }
}
__attribute__((target("avx512f,avx512bf16"))) void probe_bf16() {
  __m512 acc[kProbeChains] = {};
  const __m512i a = _mm512_set1_epi32(0x3f803f80);
  for (std::int64_t i = 0; i < kProbeSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kProbeChains; ++j) {
      acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)a, (__m512bh)a);
      asm volatile("" : "+v"(acc[j]));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kProbeChains; ++j) asm volatile("" ::"v"(acc[j]));
}
#else
std::uint64_t read_bytes(const std::byte* from, std::int64_t size) {
  std::uint64_t sum = 0;
  const auto* words = reinterpret_cast<const std::uint64_t*>(from);
  for (std::int64_t i = 0; i < size / 8; ++i) sum ^= words[i];
  return sum;
}
#endif

enum class Unit { kNone, kInt8, kBf16, kLookup };

// Instructions a second over all threads; 0 where the machine lacks them.
double instruction_rate(ThreadPool& pool, Unit unit) {
#if defined(__x86_64__)
  if (twilight::cpu::available_isas().back() != twilight::cpu::Isa::avx512_bf16) return 0;
  const int threads = pool.num_threads();
  const Times t = measure(9, [&] {
    pool.parallel_for(8 * threads, [&](std::int64_t, int) {
      unit == Unit::kBf16 ? probe_bf16() : unit == Unit::kInt8 ? probe_int8() : probe_lookup();
    });
  });
  return 8.0 * threads * threads * kProbeSteps * kProbeChains / t.cpu;
#else
  (void)pool;
  (void)unit;
  return 0;
#endif
}

double read_rate(ThreadPool& pool, const Buffer& memory, int repeats) {
  constexpr std::int64_t kTile = 1 << 20;
  const auto tiles = static_cast<std::int64_t>(memory.size()) / kTile;
  const Times t = measure(repeats, [&] {
    pool.parallel_for(
        tiles, [&](std::int64_t i, int) { g_sink = read_bytes(memory.data() + i * kTile, kTile); });
  });
  return static_cast<double>(tiles * kTile) * pool.num_threads() / t.cpu;
}

// One layer's keys with index pools of one format.
struct Index {
  twilight::KeyIndexView view;
  Buffer summaries;
  Buffer estimates;
  Buffer value_means;
  Buffer params;

  Index(IndexFormat format, bool heads_first) {
    view.format = format;
    const auto lay_out = [&](std::int64_t record, std::int64_t& page, std::int64_t& head,
                             std::byte*& data) {
      page = heads_first ? record : record * kHeadsKv;
      head = heads_first ? record * kPages : record;
      Buffer pool(static_cast<std::size_t>(record * kHeadsKv * kPages));
      data = pool.data();
      return pool;
    };
    summaries = lay_out(twilight::summary_record_bytes(format.summary, kDim),
                        view.summary_page_stride, view.summary_head_stride, view.summaries);
    estimates = lay_out(twilight::estimate_record_bytes(format, kPage, kDim),
                        view.estimate_page_stride, view.estimate_head_stride, view.estimates);
    if (format.value_bits != 0) {
      value_means = lay_out(twilight::nibble_bytes(kDim), view.value_page_stride,
                            view.value_head_stride, view.value_means);
    }
    if (format.has_params()) {
      params = lay_out(sizeof(twilight::PageParams), view.params_page_stride,
                       view.params_head_stride, view.params);
    }
  }
};

struct Row {
  const char* name;
  double bytes;
  double instructions;  // 512-bit dot products or look-ups it cannot do without; 0 for none
  Unit unit;
  std::function<void()> work;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string isa = argc > 1 ? argv[1] : "auto";
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 11;
  const std::string layout = argc > 3 ? argv[3] : "heads";
  const bool heads_first = layout != "pages";

  twilight::PagedKvView kv;
  kv.num_seqs = kSeqs;
  kv.num_kv_heads = kHeadsKv;
  kv.head_dim = kDim;
  kv.page_size = kPage;
  Buffer keys(static_cast<std::size_t>(kPages * kHeadsKv * kPage * kDim * 2));
  kv.k = {keys.data(), kPage * kDim, kPages * kPage * kDim, kDim};
  if (!heads_first) kv.k = {keys.data(), std::int64_t{kHeadsKv} * kPage * kDim, kPage * kDim, kDim};
  kv.v = kv.k;
  std::mt19937_64 random(1);
  auto* element = keys.as<std::uint16_t>();
  for (std::size_t i = 0; i < keys.size() / 2; i += 4) {
    std::uint64_t bits = random();
    for (std::size_t j = 0; j < 4; ++j, bits >>= 16) {
      element[i + j] = twilight::f32_to_bf16(static_cast<float>(bits & 0xffff) * 0x1p-14F - 2.0F);
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
  const twilight::QueryView query{q.data(), std::int64_t{kHeadsQ} * kDim, kHeadsQ};
  const twilight::SeqSubset all_seqs{nullptr, kSeqs};
  const float scale = 1 / std::sqrt(static_cast<float>(kDim));

  Index four({SummaryKind::kQuestBf16, 4}, heads_first);
  Index eight({SummaryKind::kQuest4, 8}, heads_first);
  Index centroid({SummaryKind::kCentroid, 2}, heads_first);
  Index sub({SummaryKind::kSubCentroid, 2, 4}, heads_first);
  Buffer scores(std::size_t{kSeqs} * kHeadsKv * kPagesPerSeq * sizeof(float));
  Buffer token_scores(std::size_t{kSeqs} * kHeadsQ * kTokens * sizeof(float));
  // Every page, and an ascending random quarter for each sequence and head.
  std::vector<std::int32_t> every;
  std::vector<std::int32_t> quarter(std::size_t{kSeqs} * kHeadsKv * kPagesPerSeq);
  const std::vector<std::int32_t> every_count(std::size_t{kSeqs} * kHeadsKv, kPagesPerSeq);
  const std::vector<std::int32_t> quarter_count(std::size_t{kSeqs} * kHeadsKv, kPagesPerSeq / 4);
  std::vector<std::int32_t> order(kPagesPerSeq);
  std::iota(order.begin(), order.end(), 0);
  for (int unit = 0; unit < kSeqs * kHeadsKv; ++unit) {
    every.insert(every.end(), order.begin(), order.end());
    std::sample(order.begin(), order.end(), quarter.begin() + unit * kPagesPerSeq, kPagesPerSeq / 4,
                random);
  }

  constexpr std::int64_t kQueryBytes =
      twilight::cpu::prepared_query_bytes(kDim, kHeadsQ / kHeadsKv);
  Buffer unit_query(2 * kQueryBytes);
  Buffer dots(std::size_t{kHeadsQ / kHeadsKv} * kPagesPerSeq * twilight::kSubCentroids *
              sizeof(float));
  const auto estimate = [&](const Index& index, const std::vector<std::int32_t>& pages,
                            const std::vector<std::int32_t>& counts, bool exact) {
    twilight::EstimateParams params;
    params.seqs = all_seqs;
    params.q = query;
    params.kv = kv;
    params.index = index.view;
    params.exact_keys = exact;
    params.scale = scale;
    params.pages = pages.data();
    params.page_counts = counts.data();
    params.candidate_stride = kPagesPerSeq;
    params.estimates = token_scores.as<float>();
    params.estimate_stride = kTokens;
    return params;
  };
  const auto score = [&](const Index& index) {
    return twilight::ScorePagesParams{.seqs = all_seqs,
                                      .q = query,
                                      .kv = kv,
                                      .index = index.view,
                                      .scale = scale,
                                      .scores = scores.as<float>(),
                                      .page_stride = kPagesPerSeq};
  };
  const auto seal = [&](const Index& index) {
    return twilight::SealPagesParams{kv, index.view, table.data(),
                                     static_cast<std::int32_t>(kPages)};
  };
  const twilight::ExactScoresParams exact{all_seqs, query, kv, scale, token_scores.as<float>(),
                                          kTokens};

  std::printf("Hq %d Hkv %d D %d P %d, %d x %d tokens, layout %s, isa %s, %d repeats\n", kHeadsQ,
              kHeadsKv, kDim, kPage, kSeqs, kTokens, heads_first ? "heads" : "pages", isa.c_str(),
              repeats);
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    const auto backend = twilight::make_cpu_backend(pool, isa);
    const double read = read_rate(pool, keys, repeats);
    const double int8_rate = instruction_rate(pool, Unit::kInt8);
    const double bf16_rate = instruction_rate(pool, Unit::kBf16);
    const double lookup_rate = instruction_rate(pool, Unit::kLookup);
    std::printf("\n%s: read %.1f GB/s, vpdpbusd %.2f G/s, vdpbf16ps %.2f G/s, vpermb %.2f G/s\n",
                backend->description().c_str(), read * 1e-9, int8_rate * 1e-9, bf16_rate * 1e-9,
                lookup_rate * 1e-9);
    std::printf("%-30s %8s %8s %8s %17s %8s %7s %7s %7s\n", "op", "MB", "best ms", "median",
                "p10-p90", "cpu ms", "GB/s", "% read", "% bound");
    const twilight::StepCaps caps{kSeqs, kHeadsQ, kHeadsKv, kDim, kPage, kTokens, kPagesPerSeq};
    Buffer memory(backend->workspace_bytes(caps));
    const twilight::Workspace workspace{memory.data(), memory.size()};

    const double records = kUnits * kPagesPerSeq;
    const double group = kHeadsQ / kHeadsKv;
    const double key_bytes = records * kPage * kDim * 2;
    const double dots4 = group * kDim / 4;
    // A unit at a time into a row that stays in the cache, as the fused step does.
    const twilight::cpu::IndexKernels& kernels =
        twilight::cpu::index_kernels(twilight::cpu::parse_isa(isa));
    const std::int64_t row_stride = kTokens + 16;
    const auto in_step = [&](const Index& index, bool few) {
      const bool two = index.view.format.key_bits == 2;
      const auto params = few ? estimate(index, quarter, quarter_count, false)
                              : estimate(index, every, every_count, false);
      pool.parallel_for(kSeqs * kHeadsKv, [&](std::int64_t unit, int worker) {
        const auto seq = static_cast<std::int32_t>(unit / kHeadsKv);
        const auto head = static_cast<std::int32_t>(unit % kHeadsKv);
        const auto work = twilight::cpu::index_unit(params, seq, head);
        std::byte* own = unit_query.data() + worker * kQueryBytes;
        float* row = token_scores.as<float>() + worker * row_stride * kHeadsQ / kHeadsKv;
        float maxima[kHeadsQ / kHeadsKv];
        kernels.prepare_estimates(work, own);
        kernels.estimate(work, own, false, params.pages + unit * kPagesPerSeq, 0,
                         params.page_counts[unit], {two ? dots.as<float>() : nullptr, kPagesPerSeq},
                         row, row_stride, maxima);
      });
    };
    const auto masses_in_step = [&](const Index& index) {
      const auto params = score(index);
      pool.parallel_for(kSeqs * kHeadsKv, [&](std::int64_t unit, int worker) {
        const auto work =
            twilight::cpu::index_unit(params, static_cast<std::int32_t>(unit / kHeadsKv),
                                      static_cast<std::int32_t>(unit % kHeadsKv));
        std::byte* own = unit_query.data() + worker * kQueryBytes;
        float* row = token_scores.as<float>() + worker * row_stride * kHeadsQ / kHeadsKv;
        float* means = row + std::int64_t{kPagesPerSeq} * kHeadsQ / kHeadsKv;
        float norms[kHeadsQ / kHeadsKv];
        kernels.prepare_masses(work, own);
        kernels.log_masses(work, own, 0, kPagesPerSeq, row, kPagesPerSeq, means, kPagesPerSeq);
        kernels.combine_masses(row, kPagesPerSeq, kHeadsQ / kHeadsKv, kPagesPerSeq, norms,
                               params.scores + unit * kPagesPerSeq);
      });
    };
    const std::vector<Row> rows = {
        {"seal bf16 summary, 4 bits", key_bytes, 0, Unit::kNone,
         [&] { backend->seal_pages(seal(four)); }},
        {"seal 4-bit summary, 8 bits", key_bytes, 0, Unit::kNone,
         [&] { backend->seal_pages(seal(eight)); }},
        {"seal centroid, 2 bits", key_bytes, 0, Unit::kNone,
         [&] { backend->seal_pages(seal(centroid)); }},
        {"seal sub-centroids, 2, values", 2 * key_bytes, 0, Unit::kNone,
         [&] { backend->seal_pages(seal(sub)); }},
        {"score bf16 summaries", records * 512, records * group * kDim / 32 * 2, Unit::kBf16,
         [&] { backend->score_pages(score(four), workspace); }},
        {"score 4-bit summaries", records * 144, records * group * kDim / 64 * 2, Unit::kInt8,
         [&] { backend->score_pages(score(eight), workspace); }},
        {"score centroids", records * 144, records * group * kDim / 64 * 2, Unit::kInt8,
         [&] { backend->score_pages(score(centroid), workspace); }},
        {"score sub-centroids", records * 272, records * group * kDim / 64 * 4, Unit::kInt8,
         [&] { backend->score_pages(score(sub), workspace); }},
        {"score sub-centroids, in step", records * 272, records * group * kDim / 64 * 4,
         Unit::kInt8, [&] { masses_in_step(sub); }},
        {"estimate 2 bits, all", records * 816, records * dots4 / 2, Unit::kLookup,
         [&] { backend->estimate_scores(estimate(sub, every, every_count, false), workspace); }},
        {"estimate 2 bits, N/4", records / 4 * 816, records / 4 * dots4 / 2, Unit::kLookup,
         [&] {
           backend->estimate_scores(estimate(sub, quarter, quarter_count, false), workspace);
         }},
        {"estimate 2 bits, all, in step", records * 544, records * dots4 / 2, Unit::kLookup,
         [&] { in_step(sub, false); }},
        {"estimate 2 bits, N/4, in step", records / 4 * 544, records / 4 * dots4 / 2, Unit::kLookup,
         [&] { in_step(sub, true); }},
        {"estimate 4 bits, all, in step", records * 1088, records * dots4, Unit::kInt8,
         [&] { in_step(four, false); }},
        {"estimate 4 bits, N/4, in step", records / 4 * 1088, records / 4 * dots4, Unit::kInt8,
         [&] { in_step(four, true); }},
        {"estimate 4 bits, all", records * 1088, records * dots4, Unit::kInt8,
         [&] { backend->estimate_scores(estimate(four, every, every_count, false), workspace); }},
        {"estimate 4 bits, N/4", records / 4 * 1088, records / 4 * dots4, Unit::kInt8,
         [&] {
           backend->estimate_scores(estimate(four, quarter, quarter_count, false), workspace);
         }},
        {"estimate 8 bits, all", records * 2112, records * dots4 * 2, Unit::kInt8,
         [&] { backend->estimate_scores(estimate(eight, every, every_count, false), workspace); }},
        {"estimate 8 bits, N/4", records / 4 * 2112, records / 4 * dots4 * 2, Unit::kInt8,
         [&] {
           backend->estimate_scores(estimate(eight, quarter, quarter_count, false), workspace);
         }},
        {"estimate exact keys, N/4", key_bytes / 4, 0, Unit::kNone,
         [&] {
           backend->estimate_scores(estimate(four, quarter, quarter_count, true), workspace);
         }},
        {"exact scores", key_bytes, 0, Unit::kNone,
         [&] { backend->exact_scores(exact, workspace); }},
    };
    for (const Row& row : rows) {
      const Times t = measure(repeats, row.work);
      const double cpu = t.cpu / threads;
      const double rate = row.bytes / cpu;
      const double instructions = row.unit == Unit::kNone   ? 0
                                  : row.unit == Unit::kInt8 ? int8_rate
                                  : row.unit == Unit::kBf16 ? bf16_rate
                                                            : lookup_rate;
      const double seconds =
          std::max(row.bytes / read, instructions > 0 ? row.instructions / instructions : 0.0);
      std::printf("%-30s %8.1f %8.3f %8.3f %8.3f-%8.3f %8.3f %7.1f %7.0f %7.0f\n", row.name,
                  row.bytes * 1e-6, t.best * 1e3, t.median * 1e3, t.low * 1e3, t.high * 1e3,
                  cpu * 1e3, rate * 1e-9, 100 * rate / read, 100 * seconds / cpu);
    }
  }
  return 0;
}
