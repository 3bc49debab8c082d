#include "backend/cuda/fast/fast_step.h"

#include <algorithm>
#include <vector>

#include "core/check.h"

namespace twilight::cuda_fast {
namespace {

constexpr int kPageTokens = 16;
constexpr int kChunkTokens = 1024;
constexpr int kHistogramBytes = 4096;
constexpr int kBoundaryBytes = 1024;
constexpr int kLeastL1Bytes = 32 * 1024;

int padded_heads(int group) { return group <= 1 ? 1 : group <= 4 ? 4 : 8; }

/// Whether a shape is compiled, see step_launch.cuh.
bool compiled(int dim, int heads, StepShape shape) {
  if (shape.threads == 512 && shape.cluster == 1) return true;
  if (dim != 128) return false;
  if (shape.threads == 512 && shape.cluster == 8) return true;
  return heads <= 4 && ((shape.threads == 1024 && shape.cluster == 1) ||
                        (shape.threads == 512 && shape.cluster == 2));
}

int means_of(const SparseStepParams& params) {
  return num_centroids(params.prune.estimate.index.format.summary);
}

/// Shared memory that leaves a lone block enough of L1.
constexpr std::int64_t kApartBytes = 160 * 1024;

std::int64_t align16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

bool is_paper(const SparseStepParams& params) {
  return params.prune.prune.criterion == PruneCriterion::kPerHead;
}

/// Layout for `pages` sealed pages and `candidates` candidate pages a problem; its `bytes` may be
/// more than a block can have.
SmemLayout layout_of(std::int64_t pages, std::int64_t candidates, bool paper, int means,
                     bool by_mass, int dim, int heads, StepShape shape) {
  SmemLayout out;
  const int cluster = shape.cluster;
  const std::int64_t tiles = (pages + 15) / 16;
  const std::int64_t own_tiles = (tiles + cluster - 1) / cluster;
  const std::int64_t owned = std::min(candidates, (candidates + cluster - 1) / cluster + 1);
  out.max_pages = static_cast<std::int32_t>(tiles * 16);
  out.max_candidates = static_cast<std::int32_t>((candidates + 3) / 4 * 4);
  out.owned = static_cast<std::int32_t>((owned + 7) / 8 * 8);

  // Masses and centre products, or masses alone.
  std::int64_t at = paper ? 0 : own_tiles * 16 * heads * (means == 4 ? 2 : 4);
  const auto take = [&](std::int32_t& field, std::int64_t bytes) {
    field = static_cast<std::int32_t>(std::min<std::int64_t>(at, 1 << 30));
    at += align16(bytes);
  };
  take(out.second_centres, means == 2 ? own_tiles * 16 * heads * 2 : 0);
  take(out.tile_mass, paper ? 0 : tiles * heads * 8);
  take(out.tile_centre, paper || means == 4 ? 0 : own_tiles * heads * 4);
  take(out.keys, tiles * 16 * (paper ? 4 : 2));
  take(out.select_histogram, paper ? 3 * kHistogramBytes : kHistogramBytes + 256);
  take(out.select_mass, by_mass ? kHistogramBytes : 0);
  std::int64_t region = at;
  take(out.ring, means == 4 ? shape.threads / 32 * ring_bytes(dim) : 0);
  const std::int64_t ring_end = at;

  at = align16(std::int64_t{out.owned} * kPageTokens * heads * 2);
  const int rows = paper ? heads : 1;
  take(out.histogram, rows * kHistogramBytes);
  take(out.boundary, rows * kBoundaryBytes);
  take(out.page_sums, std::int64_t{out.max_candidates} * heads * 4);
  region = std::max(region, at);

  at = align16(std::int64_t{out.owned} * kPageTokens * 4);
  const std::int64_t chunk = std::min<std::int64_t>(kChunkTokens, out.owned * kPageTokens);
  take(out.chunk_scores, chunk * heads * 4);
  const int groups = shape.threads / 32 / (dim / 64);
  const std::int64_t inbox = cluster > 1 ? std::int64_t{heads} * dim * 4 + 64 * cluster : 0;
  take(out.partials, std::int64_t{groups} * heads * (dim + 4) * 4 + inbox);
  region = std::max(region, at);

  at = region;
  take(out.candidates, out.max_candidates * 4 +
                           out.owned * (4 + std::int64_t{heads} * kept_centres(means) * 4 + 2));
  // Over region B, or past it where other blocks write there and memory is plenty: then no copy and
  // no write of another block ever meet.
  if (cluster > 1 && at + (ring_end - out.ring) <= kApartBytes) {
    take(out.ring, ring_end - out.ring);
  } else {
    at = std::max(at, ring_end);
  }
  at = (at + 127) / 128 * 128;
  take(out.fixed, fixed_bytes(paper, dim, heads, shape.threads, cluster));
  out.bytes = static_cast<std::int32_t>(std::min<std::int64_t>(at, 1 << 30));
  return out;
}

struct Plan {
  StepShape shape;
  SmemLayout smem;
};

struct DeviceLimits {
  int block_bytes = 0;
  int sm_bytes = 0;
  int sms = 0;
  bool clusters = false;
};

DeviceLimits limits_of(int device) {
  DeviceLimits out;
  int major = 0;
  cudaDeviceGetAttribute(&out.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&out.sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&out.sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  out.clusters = major >= 9;
  return out;
}

/// Shapes to try, best first. Few problems: clusters, so that every multiprocessor works; many:
/// blocks small enough that several share one.
Plan plan_of(const SparseStepParams& params, int device, const StepOptions& options) {
  const DeviceLimits limits = limits_of(device);
  const PagedKvView& kv = params.attend.kv;
  const bool paper = is_paper(params);
  const int heads = padded_heads(params.attend.q.num_heads / std::max(kv.num_kv_heads, 1));
  const std::int64_t problems = std::int64_t{params.attend.seqs.count} * kv.num_kv_heads;
  const auto layout = [&](StepShape shape) {
    return layout_of(params.prune.score.page_stride, params.prune.prune.candidate_stride, paper,
                     std::max(means_of(params), 1), params.prune.select.mass > 0, kv.head_dim,
                     heads, shape);
  };
  std::vector<StepShape> shapes;
  if (options.shape.threads != 0) {
    shapes = {options.shape};
  } else if (limits.clusters && problems * 8 <= limits.sms + 32) {
    shapes = {{512, 8}, {512, 1}, {1024, 1}};
  } else if (limits.clusters && problems * 2 <= limits.sms) {
    shapes = {{512, 2}, {1024, 1}, {512, 1}, {512, 8}};
  } else if (problems <= limits.sms) {
    shapes = {{1024, 1}, {512, 1}, {512, 2}, {512, 8}};
  } else {
    shapes = {{512, 1}, {1024, 1}, {512, 2}, {512, 8}};
  }
  Plan best;
  for (const StepShape& shape : shapes) {
    if (shape.cluster > 1 && !limits.clusters) continue;
    if (!compiled(kv.head_dim, heads, shape)) continue;
    const SmemLayout smem = layout(shape);
    if (smem.bytes > limits.block_bytes) continue;
    if (best.shape.threads == 0) best = {shape, smem};
    // Small blocks pay where enough of them fill a multiprocessor's threads and leave it L1: 64 x
    // 32k tokens with N / 4 candidates take 259 us in one block of 1024, 292 us in two of 512 that
    // leave 28 KB (two means); 278 and 233 us where two of 512 leave 50 KB (four).
    const bool fills =
        std::int64_t{smem.bytes + 1024} * (1024 / shape.threads) <= limits.sm_bytes - kLeastL1Bytes;
    if (shape.cluster > 1 || fills || shape.threads == 1024 || problems <= limits.sms) {
      best = {shape, smem};
      break;
    }
  }
  return best;
}

Plane plane(const std::byte* data, std::int64_t page_stride, std::int64_t head_stride) {
  return {reinterpret_cast<const std::uint8_t*>(data), head_stride,
          static_cast<std::uint32_t>(page_stride)};
}

}  // namespace

Support fast_step_supports(const SparseStepParams& params, int device, const StepOptions& options) {
  const auto no = [](const auto&... parts) { return Support{false, cat(parts...)}; };
  const PagedKvView& kv = params.attend.kv;
  const SelectAndPruneParams& step = params.prune;
  const IndexFormat& format = step.estimate.index.format;
  const PruneCriterion criterion = step.prune.criterion;
  if (step.select.mode != SelectMode::kByScore) return no("selection not by score");
  const bool adaptive =
      criterion == PruneCriterion::kGroupMean && means_of(params) > 0 && format.key_bits == 2;
  const bool paper = criterion == PruneCriterion::kPerHead &&
                     format.summary == SummaryKind::kQuestBf16 && format.key_bits == 4 &&
                     params.attend.tail.mass == nullptr && step.select.mass <= 0;
  if (!adaptive && !paper) return no("criterion and index format of no preset");
  if (params.attend.tail.log_masses != nullptr) return no("far tail");
  if (step.estimate.exact_keys) return no("exact keys as estimates");
  if (format.layout != IndexLayout::kMma) return no("index layout");
  if (params.attend.tail.mass != nullptr && format.value_bits != 4) return no("value bits");
  if (kv.page_size != kPageTokens) return no("page_size ", kv.page_size, ", accepted 16");
  if (kv.head_dim != 64 && kv.head_dim != 128) {
    return no("head_dim ", kv.head_dim, ", accepted 64, 128");
  }
  if (kv.dtype != DType::kBf16 && kv.dtype != DType::kF16) return no("cache dtype");
  const int group = params.attend.q.num_heads / kv.num_kv_heads;
  if (group > 8) return no("group of ", group, ", accepted up to 8");
  const auto strided = [](const PagePlane& p) {
    return p.page_stride * 2 < (std::int64_t{1} << 32) && p.token_stride % 8 == 0 &&
           p.page_stride % 8 == 0 && p.head_stride % 8 == 0 &&
           reinterpret_cast<std::uintptr_t>(p.data) % 16 == 0;
  };
  if (!strided(kv.k) || !strided(kv.v)) return no("rows not on 16-byte boundaries");
  const Plan plan = plan_of(params, device, options);
  if (plan.shape.threads == 0) return no("lists larger than shared memory");
  return {};
}

void launch_fast_step(const SparseStepParams& params, const cuda::DeviceSubset& seqs,
                      const cuda::DeviceProbabilities& p, int device, cudaStream_t stream,
                      const StepOptions& options) {
  const Support support = fast_step_supports(params, device, options);
  require(support.ok, "fast_step", support.reason);
  if (params.attend.seqs.count == 0) return;
  const PagedKvView& kv = params.attend.kv;
  const KeyIndexView& index = params.prune.estimate.index;
  const SelectPagesParams& select = params.prune.select;
  const PruneParams& prune = params.prune.prune;
  const bool paper = is_paper(params);
  const Plan plan = plan_of(params, device, options);

  StepArgs args;
  args.q = params.attend.q.data;
  args.q_seq_stride = params.attend.q.seq_stride;
  args.planes[kSummaries] =
      plane(index.summaries, index.summary_page_stride, index.summary_head_stride);
  args.planes[kEstimates] =
      plane(index.estimates, index.estimate_page_stride, index.estimate_head_stride);
  args.planes[kValueMeans] =
      plane(index.value_means, index.value_page_stride, index.value_head_stride);
  args.planes[kParams] = plane(index.params, index.params_page_stride, index.params_head_stride);
  args.planes[kKeys] = plane(kv.k.data, kv.k.page_stride * 2, kv.k.head_stride * 2);
  args.planes[kValues] = plane(kv.v.data, kv.v.page_stride * 2, kv.v.head_stride * 2);
  args.k_token_stride = static_cast<std::int32_t>(kv.k.token_stride * 2);
  args.v_token_stride = static_cast<std::int32_t>(kv.v.token_stride * 2);
  args.block_table = kv.block_table;
  args.table_stride = kv.block_table_stride;
  args.seq_lens = kv.seq_lens;
  args.seq_ids = seqs.ids;
  args.first_seq = seqs.first;
  args.num_kv_heads = kv.num_kv_heads;
  args.group = params.attend.q.num_heads / kv.num_kv_heads;
  args.scale = params.attend.scale;
  args.sink_tokens = select.forced.sink_tokens;
  args.recent_pages = select.forced.recent_pages;
  args.fraction = select.fraction;
  args.min_candidates = select.min_tokens;
  args.max_candidates = select.max_tokens;
  args.mass = static_cast<float>(select.mass);
  args.mass_floor = select.mass_floor;
  args.p = p.values;
  args.p_of_all = p.uniform;
  args.min_tokens = prune.min_tokens;
  args.tail = params.attend.tail.mass != nullptr;
  args.out = params.attend.out;
  args.out_seq_stride = params.attend.out_seq_stride;
  args.candidate_stride = prune.candidate_stride;
  args.kept_stride = prune.kept_stride;
  if (options.write_lists) {
    args.pages = select.pages;
    args.page_counts = select.page_counts;
    args.kept = prune.kept;
    args.kept_counts = prune.kept_counts;
    args.head_counts = prune.head_counts;
    args.head_mass = prune.head_mass;
    args.tail_mass = prune.tail_mass;
    args.tail_shift = prune.tail_shift;
  }
  args.stamps = options.stamps;
  args.smem = plan.smem;

  StepLaunch launch;
  launch.dim = kv.head_dim;
  launch.heads = padded_heads(args.group);
  launch.threads = plan.shape.threads;
  launch.cluster = plan.shape.cluster;
  launch.problems = params.attend.seqs.count * kv.num_kv_heads;
  const bool f16 = kv.dtype == DType::kF16;
  const int means = means_of(params);
  const StepLauncher launcher = paper        ? (f16 ? launch_paper_f16 : launch_paper_bf16)
                                : means == 4 ? (f16 ? launch_quarters_f16 : launch_quarters_bf16)
                                : means == 2 ? (f16 ? launch_halves_f16 : launch_halves_bf16)
                                             : (f16 ? launch_adaptive_f16 : launch_adaptive_bf16);
  const cudaError_t error = launcher(launch, args, stream);
  require(error == cudaSuccess, "fast_step", "launch, got ", cudaGetErrorString(error));
}

}  // namespace twilight::cuda_fast
