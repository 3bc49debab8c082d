#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "step_world.h"

/// Times the fused CUDA decode step against cuDNN on the same memory: distinct caches for every
/// sequence and head, random page tables, cold L2 (batches walk through all sequences of the pool
/// inside one graph). Usage: step_bench OUT.json [--config heads:batch:ctx:preset:fraction[:p]]...
/// [--shape threads:cluster] [--no-baseline] [--stages]. Without --config runs the whole table.
/// Presets: adaptive (kSubCentroid, p 0.85), halves and centroid (the same with kHalfCentroid,
/// kCentroid), paper (p 0.95).
namespace twilight {
namespace {

double percentile(std::vector<std::int32_t> x, double at) {
  std::sort(x.begin(), x.end());
  return x[static_cast<std::size_t>(at * double(x.size() - 1))];
}

struct Bench {
  std::vector<cuda_fast::StepShape> shapes = {{0, 0}};
  bool baseline = true;
  bool stages = false;
  double peak = 0;
  std::vector<std::string> rows;
  std::map<std::string, Times> dense;

  void run(World& world, const Config& c) {
    const int groups = world.seqs() / c.batch;
    if (groups < 1) return;
    world.make_lists(c);
    Times dense_time;
    const std::string key = text("%d:%d:%d", c.kv_heads, c.batch, c.ctx);
    if (baseline) {
      if (dense.count(key) == 0) dense[key] = world.dense(c.batch);
      dense_time = dense[key];
    }
    for (const auto& shape : shapes) {
      for (const bool lists : {true, false}) {
        cuda_fast::StepOptions options;
        options.shape = shape;
        options.write_lists = lists;
        const SparseStepParams probe = world.step(c, 0);
        const Support support = cuda_fast::fast_step_supports(probe, 0, options);
        if (!support) {
          std::printf("%d/%d heads B %d ctx %d: %s\n", 32, c.kv_heads, c.batch, c.ctx,
                      support.reason.c_str());
          continue;
        }
        const Times t = time_graph(groups, [&](cudaStream_t stream) {
          for (int i = 0; i < groups; ++i) {
            cuda_fast::launch_fast_step(world.step(c, i * c.batch), {nullptr, 0, c.batch},
                                        {world.p(i * c.batch), 0.0F}, 0, stream, options);
          }
        });
        report(world, c, shape, lists, t, dense_time);
      }
      if (stages) report_stages(world, c, shape);
    }
    world.free_lists();
  }

  void report(const World& world, const Config& c, cuda_fast::StepShape shape, bool lists,
              const Times& t, const Times& dense_time) {
    static std::vector<std::int32_t> kept;
    static std::vector<std::int32_t> pages;
    static std::vector<std::int32_t> own;
    if (lists) {
      const int used = world.seqs() / c.batch * c.batch;
      kept = world.kept_counts(used * c.kv_heads);
      pages = world.page_counts(used * c.kv_heads);
      own = world.head_counts(used * 32);
    }
    double kept_mean = 0;
    double page_mean = 0;
    for (const auto x : kept) kept_mean += x;
    for (const auto x : pages) page_mean += x;
    kept_mean /= double(kept.size());
    page_mean /= double(pages.size());
    const double problems = double(c.batch) * c.kv_heads;
    // Summaries with their parameters; records, and what the tail reads; kept rows. Four means of
    // a candidate are read twice.
    const bool four = c.preset == Preset::kAdaptive;
    const double page_bytes = c.paper() ? 1088 : 544 + 66 + (four ? 272 : 0);
    const double bytes = problems * (c.ctx / 16 *
                                         (c.paper() ? 512.0
                                          : four    ? 272.0
                                                    : 144.0) +
                                     page_mean * page_bytes + kept_mean * 512);
    const double rate = bytes / t.median * 1e-6;
    std::printf(
        "32/%-2d B %2d ctx %6d %-8s %.3f p %.2f shape %d:%d%s | %7.1f us (%.1f-%.1f) | %6.1f MB "
        "%.2f TB/s "
        "%2.0f%% | kept %.0f (p5 %.0f p50 %.0f p95 %.0f max %.0f) | dense %.1f x%.2f\n",
        c.kv_heads, c.batch, c.ctx, c.name(), c.fraction, double{c.top_p()}, shape.threads,
        shape.cluster, lists ? "" : " no lists", t.median, t.low, t.high, bytes * 1e-6, rate,
        100 * rate / peak, kept_mean, percentile(kept, 0.05), percentile(kept, 0.5),
        percentile(kept, 0.95), percentile(kept, 1.0), dense_time.median,
        dense_time.median / t.median);
    rows.push_back(
        text("{\"q_heads\": 32, \"kv_heads\": %d, \"batch\": %d, \"ctx\": %d, \"preset\": \"%s\", "
             "\"fraction\": %.4f, \"p\": %.2f, \"threads\": %d, \"cluster\": %d, \"lists\": %s, "
             "\"us\": %.2f, "
             "\"us_low\": %.2f, \"us_high\": %.2f, ",
             c.kv_heads, c.batch, c.ctx, c.name(), c.fraction, double{c.top_p()}, shape.threads,
             shape.cluster, lists ? "true" : "false", t.median, t.low, t.high) +
        text("\"bytes\": %.0f, \"tb_s\": %.3f, \"share_of_peak\": %.3f, \"candidate_pages\": %.1f, "
             "\"kept\": %.1f, \"kept_p5\": %.0f, \"kept_p50\": %.0f, \"kept_p95\": %.0f, "
             "\"kept_max\": %.0f, ",
             bytes, rate, rate / peak, page_mean, kept_mean, percentile(kept, 0.05),
             percentile(kept, 0.5), percentile(kept, 0.95), percentile(kept, 1.0)) +
        text("\"head_kept_p50\": %.0f, \"cudnn_us\": %.2f, "
             "\"speedup\": %.3f}",
             percentile(own, 0.5), dense_time.median, dense_time.median / t.median));
    std::fflush(stdout);
  }

  void report_stages(World& world, const Config& c, cuda_fast::StepShape shape) {
    const int problems = c.batch * c.kv_heads;
    auto* stamps =
        device_array<std::int64_t>(static_cast<std::size_t>(problems * cuda_fast::kStamps));
    cuda_fast::StepOptions options;
    options.shape = shape;
    options.stamps = stamps;
    const int groups = world.seqs() / c.batch;
    for (int i = 0; i < 3; ++i) {
      cuda_fast::launch_fast_step(world.step(c, i % groups * c.batch), {nullptr, 0, c.batch},
                                  {world.p(i % groups * c.batch), 0.0F}, 0, nullptr, options);
    }
    std::vector<std::int64_t> t(static_cast<std::size_t>(problems * cuda_fast::kStamps));
    check(cudaDeviceSynchronize(), "stages");
    check(cudaMemcpy(t.data(), stamps, t.size() * 8, cudaMemcpyDeviceToHost), "stamps");
    cudaFree(stamps);
    static const char* const kNames[] = {"query", "score", "keys", "select", "estimate",
                                         "prune", "QK",    "PV",   "tail",   "output"};
    std::int64_t first = t[0];
    std::int64_t last = 0;
    double mean[10] = {};
    double worst[10] = {};
    double start[2] = {0, 0};
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* s = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      first = std::min(first, s[0]);
      last = std::max(last, s[10]);
      for (int k = 0; k < 10; ++k) {
        mean[k] += 1e-3 * double(s[k + 1] - s[k]) / problems;
        worst[k] = std::max(worst[k], 1e-3 * double(s[k + 1] - s[k]));
      }
    }
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* s = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      start[0] = std::max(start[0], 1e-3 * double(s[0] - first));
      start[1] += 1e-3 * double(last - s[10]) / problems;
    }
    std::string json = "{\"stages_of\": \"" +
                       text("%d:%d:%d:%s:%.3f:%d:%d", c.kv_heads, c.batch, c.ctx, c.name(),
                            c.fraction, shape.threads, shape.cluster) +
                       "\"";
    std::printf("    stages (mean/max us):");
    for (int k = 0; k < 10; ++k) {
      std::printf(" %s %.1f/%.1f", kNames[k], mean[k], worst[k]);
      json += text(", \"%s\": %.2f", kNames[k], mean[k]);
    }
    double inner[6] = {};
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* at = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      const std::int64_t marks[7] = {at[5], at[11], at[12], at[13], at[14], at[15], at[6]};
      for (int k = 0; k < 6; ++k) inner[k] += 1e-3 * double(marks[k + 1] - marks[k]) / problems;
    }
    std::printf(" | prune: weigh %.1f boundary %.1f list %.1f exact %.1f masks %.1f rows %.1f",
                inner[0], inner[1], inner[2], inner[3], inner[4], inner[5]);
    std::printf(" | span %.1f, last start %.1f, mean idle at the end %.1f\n",
                1e-3 * double(last - first), start[0], start[1]);
    rows.push_back(json + text(", \"span\": %.2f}", 1e-3 * double(last - first)));
  }
};

}  // namespace
}  // namespace twilight

int main(int argc, char** argv) {
  using namespace twilight;
  if (argc < 2) {
    std::fprintf(stderr, "usage: step_bench OUT.json [options]\n");
    return 2;
  }
  Bench bench;
  std::vector<Config> configs;
  for (int i = 2; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (arg == "--no-baseline")
      bench.baseline = false;
    else if (arg == "--stages")
      bench.stages = true;
    else if (arg == "--shape") {
      cuda_fast::StepShape shape;
      std::sscanf(value(), "%d:%d", &shape.threads, &shape.cluster);
      bench.shapes.push_back(shape);
    } else if (arg == "--config") {
      Config c;
      char preset[32] = "";
      std::sscanf(value(), "%d:%d:%d:%31[a-z]:%lf:%lf", &c.kv_heads, &c.batch, &c.ctx, preset,
                  &c.fraction, &c.p);
      const auto* const at = std::ranges::find(kPresetNames, std::string_view(preset));
      if (at == std::end(kPresetNames)) {
        std::fprintf(stderr, "preset, got %s, accepted adaptive, halves, centroid, paper\n",
                     preset);
        return 2;
      }
      c.preset = static_cast<Preset>(at - kPresetNames);
      configs.push_back(c);
    }
  }
  if (configs.empty()) {
    for (const int heads : {8, 32}) {
      for (const Preset preset : {Preset::kAdaptive, Preset::kPaper}) {
        for (const int ctx : {4096, 10240, 32768, 131072}) {
          for (const int batch : {1, 4, 16, 64}) {
            if (std::int64_t{batch} * ctx * heads > std::int64_t{64} * 32768 * 8) continue;
            configs.push_back({heads, batch, ctx, preset, 0.25});
            if (preset == Preset::kAdaptive) {
              configs.push_back({heads, batch, ctx, preset, 0.125});
            }
          }
        }
      }
    }
  }
  cudaDeviceProp prop{};
  check(cudaGetDeviceProperties(&prop, 0), "device");
  std::string cudnn;
  const Support has_cudnn = cuda::CudnnDecode::available(&cudnn);
  std::printf("%s, cuDNN %s\n", prop.name, has_cudnn ? cudnn.c_str() : has_cudnn.reason.c_str());
  std::stable_sort(configs.begin(), configs.end(), [](const Config& a, const Config& b) {
    return std::tie(a.kv_heads, a.ctx, a.preset) < std::tie(b.kv_heads, b.ctx, b.preset);
  });
  std::unique_ptr<World> world;
  const Config* last = nullptr;
  double short_peak = 0;
  for (const Config& c : configs) {
    if (last == nullptr || last->kv_heads != c.kv_heads || last->ctx != c.ctx ||
        last->preset != c.preset) {
      world.reset();
      world = std::make_unique<World>(c.kv_heads, c.ctx, c.preset);
    }
    last = &c;
    if (bench.peak == 0) {
      auto* sink = device_array<std::byte>(256);
      const std::size_t bytes = std::size_t{2} << 30;
      for (const int blocks : {132 * 2, 132 * 4, 132 * 8, 132 * 16}) {
        const Times t = time_graph(1, [&](cudaStream_t stream) {
          bench::read_memory(world->keys(), bytes, sink, blocks, stream);
        });
        bench.peak = std::max(bench.peak, double(bytes) / t.median * 1e-6);
      }
      const std::size_t small = std::size_t{140} << 20;
      const Times t = time_graph(14, [&](cudaStream_t stream) {
        for (int i = 0; i < 14; ++i) {
          bench::read_memory(static_cast<const std::byte*>(world->keys()) + i * small, small, sink,
                             132 * 4, stream);
        }
      });
      short_peak = double(small) / t.median * 1e-6;
      std::printf("read peak %.3f TB/s (2 GiB), %.3f TB/s (launches of 140 MiB)\n", bench.peak,
                  short_peak);
      cudaFree(sink);
    }
    bench.run(*world, c);
  }
  std::ofstream out(argv[1]);
  out << "{\"device\": \"" << prop.name << "\", \"cudnn\": \"" << cudnn
      << "\", \"read_peak_tb_s\": " << bench.peak << ", \"read_peak_140mb_tb_s\": " << short_peak
      << ", \"rows\": [\n";
  for (std::size_t i = 0; i < bench.rows.size(); ++i) {
    out << bench.rows[i] << (i + 1 < bench.rows.size() ? ",\n" : "\n");
  }
  out << "]}\n";
  return 0;
}
