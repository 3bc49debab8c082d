#include <algorithm>
#include <initializer_list>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/fast/layer_products.h"
#include "backend/cuda/fast/rows_linear.h"
#include "backend/cuda/fast/sample.h"
#include "backend/cuda/host_words.h"

// The forward pass around attention. A decode step's products read the weights once with up to 64
// rows of x, those between two layers' attentions in one launch where their shapes allow
// (fast/layer_products.cu), else one by one (fast/rows_linear.cu); prefill's go to cuBLASLt. In all
// of them x is rounded to the weights' dtype where it is made, so that no f32 copy of it is
// written.
namespace twilight::cuda {
namespace {

using cuda_fast::kMaxLinearRows;
using cuda_fast::LayerArgs;
using cuda_fast::LayerStep;
using cuda_fast::RowsArgs;
using cuda_fast::RowsMatrix;

constexpr std::int64_t kMaxCols = 65536;
constexpr std::size_t kManyBytes = std::size_t{64} << 20;

bool aligned16(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

/// Whether a product's weights can be read 16 bytes a lane and x may be rounded.
bool fits(const LinearParams& p) {
  const WeightView& w = p.weight;
  return !w.quantised() && w.dtype != DType::kF32 && !p.full_precision && w.cols % 8 == 0 &&
         w.cols <= kMaxCols && w.rows < (std::int64_t{1} << 31) && aligned16(w.data);
}

bool fits_few(const LinearParams& p) { return p.row_invariant && fits(p); }

/// Rows that norm_rows can read.
bool norm_fits(const RmsNormParams& p) {
  return p.hidden % 4 == 0 && aligned16(p.x) && aligned16(p.weight);
}

bool same_dtype(std::initializer_list<const LinearParams*> products) {
  const DType dtype = (*products.begin())->weight.dtype;
  return std::all_of(products.begin(), products.end(), [&](const LinearParams* p) {
    return fits_few(*p) && p->weight.dtype == dtype;
  });
}

bool project_fits(const ProjectParams& p) {
  return same_dtype({&p.q, &p.k, &p.v}) && !p.q.accumulate && !p.k.accumulate && !p.v.accumulate &&
         norm_fits(p.norm);
}

/// Whether q and k are rotated by the product that makes them: heads that are normed first are
/// rotated afterwards.
bool rotates(const ProjectParams& p) {
  return p.q_norm.weight == nullptr && p.k_norm.weight == nullptr && p.q_rope.head_dim % 16 == 0 &&
         p.q_rope.cos == p.k_rope.cos && p.q_rope.sin == p.k_rope.sin &&
         p.q_rope.head_dim == p.k_rope.head_dim;
}

RowsMatrix matrix_of(const LinearParams& p, std::int64_t first_row) {
  RowsMatrix out;
  out.w = p.weight.data;
  out.bias = p.bias;
  out.rows = static_cast<std::int32_t>(p.weight.rows);
  out.accumulate = p.accumulate;
  out.y = p.y + first_row * p.y_stride;
  out.y_stride = p.y_stride;
  return out;
}

/// A product with rows [first, first + 64) of a matrix of rounded x.
RowsArgs product_of(const LinearParams& p, std::int32_t first, const void* x) {
  RowsArgs args;
  args.matrix[0] = matrix_of(p, first);
  args.num_matrices = 1;
  args.m = std::min(kMaxLinearRows, p.num_rows - first);
  args.cols = static_cast<std::int32_t>(p.weight.cols);
  args.x = x;
  args.x_stride = args.cols;
  return args;
}

RowsArgs gate_of(const FeedForwardParams& p, std::int32_t first, const void* x, void* act) {
  RowsArgs args = product_of(p.gate, first, x);
  args.matrix[0].use = RowsMatrix::Use::kGate;
  args.matrix[0].up = p.up.weight.data;
  args.matrix[0].up_bias = p.up.bias;
  args.matrix[0].act = act;
  return args;
}

RowsArgs inputs_of(const ProjectParams& p, std::int32_t first, const void* x) {
  RowsArgs args = product_of(p.q, first, x);
  args.matrix[1] = matrix_of(p.k, first);
  args.matrix[2] = matrix_of(p.v, first);
  args.num_matrices = 3;
  if (rotates(p)) args.matrix[0].use = args.matrix[1].use = RowsMatrix::Use::kRotate;
  args.half = p.q_rope.head_dim / 2;
  args.cos = p.q_rope.cos + std::int64_t{first} * args.half;
  args.sin = p.q_rope.sin + std::int64_t{first} * args.half;
  return args;
}

/// Where the layer kernel appends a plane's rows; its elements have 16 bits.
cuda_fast::CacheRows cache_rows(const PagedKvView& kv, const PagePlane& plane) {
  return {.data = plane.data,
          .page_stride = plane.page_stride,
          .head_stride = plane.head_stride,
          .token_stride = plane.token_stride,
          .page_size = kv.page_size,
          .head_dim = kv.head_dim,
          .bf16 = kv.dtype == DType::kBf16};
}

}  // namespace

void CudaBackend::reserve_rows() {
  if (rows_.size() > 0) return;
  constexpr std::size_t kBytes = kMaxLinearRows * kMaxCols * 2;
  rows_ = DeviceBuffer(memory_, kBytes);
  gated_rows_ = DeviceBuffer(memory_, kBytes);
}

// Rounds up to 64 normed rows.
void CudaBackend::norm_block(const RmsNormParams& norm, std::int32_t first, DType dtype) {
  cuda_fast::norm_rows(norm.x + first * norm.hidden, norm.weight, norm.eps,
                       std::min(kMaxLinearRows, norm.num_rows - first), norm.hidden, dtype,
                       rows_.data(), dependent_, stream_.get());
}

bool CudaBackend::linear_of_few(const LinearParams& params) {
  if (!fits_few(params)) return false;
  reserve_rows();
  const WeightView& w = params.weight;
  for (std::int32_t first = 0; first < params.num_rows; first += kMaxLinearRows) {
    const RowsArgs args = product_of(params, first, rows_.data());
    const float* x = params.x + first * params.x_stride;
    cuda_fast::round_rows(x, params.x_stride, args.m, w.cols, w.dtype, rows_.data(), dependent_,
                          stream_.get());
    cuda_fast::rows_linear(args, w.dtype, dependent_, stream_.get());
  }
  return true;
}

bool CudaBackend::project_few(const ProjectParams& params) {
  if (!project_fits(params)) return false;
  const DType dtype = params.q.weight.dtype;
  reserve_rows();
  const RmsNormParams& norm = params.norm;
  for (std::int32_t first = 0; first < norm.num_rows; first += kMaxLinearRows) {
    norm_block(norm, first, dtype);
    cuda_fast::rows_linear(inputs_of(params, first, rows_.data()), dtype, dependent_,
                           stream_.get());
  }
  if (!rotates(params)) norm_and_rotate(params);
  return true;
}

bool CudaBackend::project_many(const ProjectParams& params) {
  const LinearParams* const products[] = {&params.q, &params.k, &params.v};
  const DType dtype = params.q.weight.dtype;
  for (const LinearParams* p : products) {
    if (!fits(*p) || p->row_invariant || p->weight.dtype != dtype) return false;
  }
  const RmsNormParams& norm = params.norm;
  const auto bytes = static_cast<std::size_t>(norm.num_rows * norm.hidden * 2);
  if (!norm_fits(norm) || bytes > kManyBytes) return false;
  if (many_rows_.size() == 0) many_rows_ = DeviceBuffer(memory_, kManyBytes);
  cuda_fast::norm_rows(norm.x, norm.weight, norm.eps, norm.num_rows, norm.hidden, dtype,
                       many_rows_.data(), dependent_, stream_.get());
  for (const LinearParams* p : products) {
    if (!linear_.run_rounded(*p, many_rows_.data(), stream_.get())) return false;
  }
  norm_and_rotate(params);
  return true;
}

void CudaBackend::norm_and_rotate(const ProjectParams& params) {
  if (params.q_norm.weight != nullptr) do_rms_norm(params.q_norm);
  if (params.k_norm.weight != nullptr) do_rms_norm(params.k_norm);
  do_rope(params.q_rope);
  do_rope(params.k_rope);
}

bool CudaBackend::feed_few(const FeedForwardParams& params) {
  const RmsNormParams& norm = params.norm;
  if (!same_dtype({&params.gate, &params.up, &params.down}) || !norm_fits(norm)) return false;
  const DType dtype = params.gate.weight.dtype;
  reserve_rows();
  for (std::int32_t first = 0; first < norm.num_rows; first += kMaxLinearRows) {
    norm_block(norm, first, dtype);
    cuda_fast::rows_linear(gate_of(params, first, rows_.data(), gated_rows_.data()), dtype,
                           dependent_, stream_.get());
    cuda_fast::rows_linear(product_of(params.down, first, gated_rows_.data()), dtype, dependent_,
                           stream_.get());
  }
  return true;
}

bool CudaBackend::feed_many(const FeedForwardParams& params) {
  const DType dtype = params.gate.weight.dtype;
  for (const LinearParams* p : {&params.gate, &params.up, &params.down}) {
    if (!fits(*p) || p->row_invariant || p->weight.dtype != dtype) return false;
  }
  const RmsNormParams& norm = params.norm;
  const std::int64_t inner = params.gate.weight.rows;
  const auto bytes = static_cast<std::size_t>(norm.num_rows * std::max(norm.hidden, inner) * 2);
  if (!norm_fits(norm) || bytes > kManyBytes || inner % 4 != 0 || !aligned16(params.gate.y) ||
      !aligned16(params.up.y)) {
    return false;
  }
  if (many_rows_.size() == 0) many_rows_ = DeviceBuffer(memory_, kManyBytes);
  std::byte* const rows = many_rows_.data();
  cuda_fast::norm_rows(norm.x, norm.weight, norm.eps, norm.num_rows, norm.hidden, dtype, rows,
                       dependent_, stream_.get());
  if (!linear_.run_rounded(params.gate, rows, stream_.get())) return false;
  if (!linear_.run_rounded(params.up, rows, stream_.get())) return false;
  cuda_fast::gate_rows(params.gate.y, params.up.y, norm.num_rows * inner, dtype, rows, dependent_,
                       stream_.get());
  if (linear_.run_rounded(params.down, rows, stream_.get())) return true;
  // The library lacks the last product alone: its f32 input is still there, not yet gated.
  do_silu_mul({params.gate.y, params.up.y, params.gate.y, norm.num_rows * inner});
  do_linear(params.down);
  return true;
}

void CudaBackend::do_project(const ProjectParams& params) {
  if (params.norm.num_rows == 0) return;
  if (!project_few(params) && !project_many(params)) Backend::do_project(params);
}

void CudaBackend::do_feed_forward(const FeedForwardParams& params) {
  if (params.norm.num_rows == 0) return;
  if (!feed_few(params) && !feed_many(params)) Backend::do_feed_forward(params);
}

bool CudaBackend::advance_together(const AdvanceLayerParams& params) {
  const FeedForwardParams& feed = params.feed;
  const LinearParams& out = params.out;
  if (!same_dtype({&out, &feed.gate, &feed.up, &feed.down}) || !norm_fits(feed.norm) ||
      !aligned16(out.x) || out.x_stride % 4 != 0) {
    return false;
  }
  reserve_rows();
  const DType dtype = out.weight.dtype;
  const ProjectParams* const next = params.next;
  bool takes_next = next != nullptr && project_fits(*next) && next->q.weight.dtype == dtype;
  bool appends = false;  // in the kernel; known once the steps are
  const auto steps_of = [&](std::int32_t first) {
    void* const x = rows_.data();
    const auto normed = [&](const RowsArgs& rows, const RmsNormParams& norm) {
      LayerStep step;
      step.rows = rows;
      step.before = LayerStep::Before::kNorm;
      step.source = norm.x + first * norm.hidden;
      step.source_stride = norm.hidden;
      step.norm_weight = norm.weight;
      step.eps = norm.eps;
      return step;
    };
    LayerArgs args;
    LayerStep& round = args.step[args.num_steps++];
    round.rows = product_of(out, first, x);
    round.before = LayerStep::Before::kRound;
    round.source = out.x + first * out.x_stride;
    round.source_stride = out.x_stride;
    args.step[args.num_steps++] = normed(gate_of(feed, first, x, gated_rows_.data()), feed.norm);
    args.step[args.num_steps++].rows = product_of(feed.down, first, gated_rows_.data());
    if (takes_next) args.step[args.num_steps++] = normed(inputs_of(*next, first, x), next->norm);
    if (appends) {
      const AppendKvParams& append = *params.append;
      args.cache[1] = cache_rows(append.kv, append.kv.k);
      args.cache[2] = cache_rows(append.kv, append.kv.v);
      args.slots = append.slots + first;
    }
    return args;
  };
  const LayerArgs all = steps_of(0);
  for (std::int32_t i = 0; i < all.num_steps; ++i) {
    if (cuda_fast::layer_step_fits(all.step[i], layer_device_)) continue;
    if (i < 3) return false;
    takes_next = false;
  }
  if (layer_memory_.size() == 0) {
    layer_memory_ = DeviceBuffer(memory_, cuda_fast::layer_bytes(layer_device_));
  }
  // Keys that are normed after their product are rotated after it as well.
  appends = params.append != nullptr && takes_next && rotates(*next) &&
            params.append->kv.dtype != DType::kF32;
  for (std::int32_t first = 0; first < out.num_rows; first += kMaxLinearRows) {
    cuda_fast::layer_products(steps_of(first), dtype, layer_device_, layer_memory_.data(),
                              stream_.get());
  }
  if (takes_next && !rotates(*next)) norm_and_rotate(*next);
  if (next != nullptr && !takes_next) do_project(*next);
  if (params.append != nullptr && !appends) do_append_kv(*params.append);
  return true;
}

void CudaBackend::do_advance_layer(const AdvanceLayerParams& params) {
  if (params.out.num_rows == 0) return;
  if (!advance_together(params)) Backend::do_advance_layer(params);
}

void CudaBackend::do_embed(const EmbedParams& params) { base::embed(params, stream_.get()); }

void CudaBackend::do_rotation(const RotationParams& params) {
  base::rotation(params, stream_.get());
}

void CudaBackend::do_argmax(const ArgmaxParams& params) {
  cuda_fast::sample_rows({params.x, params.num_rows, params.cols, nullptr, params.out}, dependent_,
                         stream_.get());
}

void CudaBackend::do_sample_rows(const SampleRowsParams& params) {
  cuda_fast::sample_rows(params, dependent_, stream_.get());
}

void CudaBackend::do_count_tail(const CountTailParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  base::count_tail(params, device_subset(params.seqs, arena, stream_.get()), stream_.get());
}

}  // namespace twilight::cuda
