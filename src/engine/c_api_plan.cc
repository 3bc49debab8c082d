#include <vector>

#include "core/buffer.h"
#include "engine/c_api.h"
#include "engine/device_impl.h"
#include "engine/kv_cache_impl.h"
#include "sparse/decode_step.h"

/// The step and what twl_decode would otherwise have to allocate.
struct twl_plan {
  twl_plan(const twilight::Device& device_in, const twilight::SparsePolicy& policy,
           const twilight::StepCaps& caps, twilight::DType dtype_in)
      : device(device_in),
        dtype(dtype_in),
        format(twilight::index_format_of(policy)),
        layout(device.impl().backend->index_layout()),
        step(*device.impl().backend, policy, caps, dtype_in),
        stats(static_cast<std::size_t>(caps.max_seqs)) {
    format.layout = layout;
    for (twilight::LayerStats& entry : stats) {
      entry.candidates.reserve(static_cast<std::size_t>(caps.num_kv_heads));
      entry.attended.reserve(static_cast<std::size_t>(caps.num_kv_heads));
      entry.kept.reserve(static_cast<std::size_t>(caps.num_q_heads));
      entry.estimated_mass.reserve(static_cast<std::size_t>(caps.num_q_heads));
    }
  }

  twilight::Device device;
  twilight::DType dtype;
  twilight::IndexFormat format;  ///< what the policy reads, as the backend orders it
  twilight::IndexLayout layout;
  twilight::DecodeStep step;
  std::vector<twilight::LayerStats> stats;
};

namespace twilight::c_api {
namespace {

static_assert(TWL_PATH_SPARSE == static_cast<int>(StepPath::kSparse) &&
              TWL_PATH_DENSE_POLICY == static_cast<int>(StepPath::kDensePolicy) &&
              TWL_PATH_DENSE_LAYER == static_cast<int>(StepPath::kDenseLayer) &&
              TWL_PATH_DENSE_SHORT == static_cast<int>(StepPath::kDenseShort) &&
              TWL_PATH_DENSE_ALL_FORCED == static_cast<int>(StepPath::kDenseAllForced) &&
              TWL_PATH_DENSE_FULL_MASS == static_cast<int>(StepPath::kDenseFullMass));

// Keep every product of a plan's sizes well inside 63 bits.
constexpr std::int32_t kMaxSeqs = 1 << 16;
constexpr std::int32_t kMaxHeads = 1 << 10;
constexpr std::int32_t kMaxTokens = 1 << 30;

StepCaps read_shape(const twl_plan_shape& in, const char* where) {
  const auto in_range = [&](const char* name, std::int32_t value, std::int32_t max) {
    require(value >= 1 && value <= max, where, "shape.", name, ", got ", value, ", accepted 1 to ",
            max);
    return value;
  };
  StepCaps caps;
  caps.max_seqs = in_range("max_seqs", in.max_seqs, kMaxSeqs);
  caps.num_q_heads = in_range("num_q_heads", in.num_q_heads, kMaxHeads);
  caps.num_kv_heads = in_range("num_kv_heads", in.num_kv_heads, kMaxHeads);
  caps.head_dim = in_range("head_dim", in.head_dim, 512);
  caps.page_size = in_range("page_size", in.page_size, 256);
  caps.max_tokens = in_range("max_tokens", in.max_tokens, kMaxTokens);
  return caps;
}

void create(twl_context* context, const twl_policy* policy, const twl_plan_shape* shape,
            twl_plan** plan) {
  constexpr const char* kWhere = "twl_plan_create";
  require_pointer(plan, kWhere, "plan");
  *plan = nullptr;
  require_pointer(context, kWhere, "context");
  const SparsePolicy sparse = read_policy(policy, kWhere);
  const twl_plan_shape in = read_struct(shape, kWhere, "shape");
  const StepCaps caps = read_shape(in, kWhere);
  const DType dtype = read_dtype(in.kv_dtype, kWhere, "shape.kv_dtype");
  *plan = new twl_plan(context->device, sparse, caps, dtype);
}

template <typename T>
double mean(const std::vector<T>& values) {
  double sum = 0;
  for (const T value : values) sum += static_cast<double>(value);
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

void write_stats(const LayerStats& from, std::size_t struct_size, void* to) {
  twl_seq_stats out{};
  out.struct_size = struct_size;
  out.path = static_cast<std::int32_t>(from.path);
  out.num_tokens = from.num_tokens;
  out.candidates_mean = mean(from.candidates);
  out.attended_mean = mean(from.attended);
  out.kept_mean = mean(from.kept);
  out.estimated_mass_mean = mean(from.estimated_mass);
  out.bytes_read = from.bytes_read;
  out.bytes_dense = from.bytes_dense;
  std::memcpy(to, &out, std::min(struct_size, sizeof(out)));
}

// The shape a view must have to be run under a plan.
void check_shape(const PagedKvView& kv, const twl_plan& plan, const char* where) {
  const StepCaps& caps = plan.step.caps();
  const auto same = [&](const char* name, std::int32_t value, std::int32_t planned) {
    require(value == planned, where, name, ", got ", value, ", accepted ", planned,
            " as the plan has it");
  };
  same("kv.dtype", static_cast<std::int32_t>(kv.dtype), static_cast<std::int32_t>(plan.dtype));
  same("kv.num_kv_heads", kv.num_kv_heads, caps.num_kv_heads);
  same("kv.head_dim", kv.head_dim, caps.head_dim);
  same("kv.page_size", kv.page_size, caps.page_size);
  require(kv.num_seqs <= caps.max_seqs, where, "kv.num_seqs, got ", kv.num_seqs,
          ", accepted up to ", caps.max_seqs);
}

void decode(twl_plan* plan, const twl_decode_args* args, void* workspace,
            std::size_t workspace_bytes, twl_seq_stats* stats) {
  constexpr const char* kWhere = "twl_decode";
  require_pointer(plan, kWhere, "plan");
  const twl_decode_args in = read_struct(args, kWhere, "args");
  DecodeStepParams params;
  std::int32_t num_pages = 0;
  params.kv = read_kv(in.kv, kWhere, &num_pages);
  check_shape(params.kv, *plan, kWhere);
  check_tables(params.kv, num_pages, plan->step.caps().max_tokens, kWhere);
  const IndexFormat& format = plan->format;
  if (format.summary != SummaryKind::kNone || format.key_bits != 0 || format.value_bits != 0) {
    params.index = read_index(in.index, plan->layout, kWhere);
    const IndexFormat& given = params.index.format;
    require(covers(given, format), kWhere,
            "index.summary, index.key_bits and index.value_bits, got ",
            static_cast<int>(given.summary), ", ", given.key_bits, " and ", given.value_bits,
            ", accepted ", static_cast<int>(format.summary), ", ", format.key_bits, " and ",
            format.value_bits);
  }
  require(in.layer >= 0, kWhere, "layer, got ", in.layer, ", accepted 0 or more");
  require(workspace_bytes >= plan->step.workspace_bytes(), kWhere, "workspace_bytes, got ",
          workspace_bytes, ", accepted ", plan->step.workspace_bytes(), " or more");
  require(
      workspace != nullptr && reinterpret_cast<std::uintptr_t>(workspace) % kBufferAlignment == 0,
      kWhere, "workspace, got ", workspace, ", accepted ", kBufferAlignment,
      "-byte aligned pointers");
  std::size_t stats_size = 0;
  std::span<LayerStats> collected;
  if (stats != nullptr && params.kv.num_seqs > 0) {
    require_size(stats, kWhere, "stats");
    stats_size = stats->struct_size;
    require(stats_size % alignof(twl_seq_stats) == 0, kWhere, "stats.struct_size, got ", stats_size,
            ", accepted multiples of ", alignof(twl_seq_stats));
    collected = std::span(plan->stats).first(static_cast<std::size_t>(params.kv.num_seqs));
  }
  if (params.kv.num_seqs == 0) return;
  for (std::int32_t seq = 0; in.p != nullptr && seq < params.kv.num_seqs; ++seq) {
    require(in.p[seq] > 0 && in.p[seq] <= 1, kWhere, "p[", seq, "], got ", in.p[seq],
            ", accepted numbers above 0 up to 1");
  }
  require_pointer(in.queries, kWhere, "queries");
  require_pointer(in.out, kWhere, "out");
  params.layer = in.layer;
  params.q = {in.queries, in.query_seq_stride, plan->step.caps().num_q_heads};
  params.p = in.p;
  params.out = in.out;
  params.out_seq_stride = in.out_seq_stride;
  plan->step.run(params, {static_cast<std::byte*>(workspace), workspace_bytes}, collected);
  for (std::size_t seq = 0; seq < collected.size(); ++seq) {
    write_stats(collected[seq], stats_size, reinterpret_cast<std::byte*>(stats) + seq * stats_size);
  }
}

}  // namespace
}  // namespace twilight::c_api

twl_status twl_plan_create(twl_context* context, const twl_policy* policy,
                           const twl_plan_shape* shape, twl_plan** plan) {
  return twilight::c_api::guarded([&] { twilight::c_api::create(context, policy, shape, plan); });
}

void twl_plan_destroy(twl_plan* plan) { delete plan; }

size_t twl_plan_workspace_bytes(const twl_plan* plan) {
  return plan == nullptr ? 0 : plan->step.workspace_bytes();
}

twl_status twl_decode(twl_plan* plan, const twl_decode_args* args, void* workspace,
                      size_t workspace_bytes, twl_seq_stats* stats) {
  return twilight::c_api::guarded(
      [&] { twilight::c_api::decode(plan, args, workspace, workspace_bytes, stats); });
}
