#include <algorithm>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/fast/rows_linear.h"
#include "backend/cuda/fast/sample.h"
#include "backend/cuda/host_words.h"

// The forward pass around attention. A decode step's products read the weights once with up to 64
// rows of x (fast/rows_linear.cu); prefill's go to cuBLASLt. In both x is rounded to the weights'
// dtype where it is made, so that no f32 copy of it is written.
namespace twilight::cuda {
namespace {

using cuda_fast::kMaxLinearRows;
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

}  // namespace

void CudaBackend::reserve_rows() {
  if (rows_.size() > 0) return;
  constexpr std::size_t kBytes = kMaxLinearRows * kMaxCols * 2;
  rows_ = DeviceBuffer(memory_, kBytes);
  gated_rows_ = DeviceBuffer(memory_, kBytes);
}

// Rounds up to 64 normed rows; what a product of them takes but its matrices.
cuda_fast::RowsArgs CudaBackend::norm_block(const RmsNormParams& norm, std::int32_t first,
                                            DType dtype) {
  RowsArgs args;
  args.m = std::min(kMaxLinearRows, norm.num_rows - first);
  args.cols = static_cast<std::int32_t>(norm.hidden);
  args.x = rows_.data();
  args.x_stride = norm.hidden;
  cuda_fast::norm_rows(norm.x + first * norm.hidden, norm.weight, norm.eps, args.m, norm.hidden,
                       dtype, rows_.data(), dependent_, stream_.get());
  return args;
}

bool CudaBackend::linear_of_few(const LinearParams& params) {
  if (!fits_few(params)) return false;
  reserve_rows();
  const WeightView& w = params.weight;
  for (std::int32_t first = 0; first < params.num_rows; first += kMaxLinearRows) {
    RowsArgs args;
    args.matrix[0] = matrix_of(params, first);
    args.num_matrices = 1;
    args.m = std::min(kMaxLinearRows, params.num_rows - first);
    args.cols = static_cast<std::int32_t>(w.cols);
    const float* x = params.x + first * params.x_stride;
    cuda_fast::round_rows(x, params.x_stride, args.m, w.cols, w.dtype, rows_.data(), dependent_,
                          stream_.get());
    args.x = rows_.data();
    args.x_stride = w.cols;
    cuda_fast::rows_linear(args, w.dtype, dependent_, stream_.get());
  }
  return true;
}

bool CudaBackend::project_few(const ProjectParams& params) {
  const LinearParams* const products[] = {&params.q, &params.k, &params.v};
  const DType dtype = params.q.weight.dtype;
  for (const LinearParams* p : products) {
    if (!fits_few(*p) || p->weight.dtype != dtype || p->accumulate) return false;
  }
  if (!norm_fits(params.norm)) return false;
  reserve_rows();
  const RmsNormParams& norm = params.norm;
  const RopeParams& rope = params.q_rope;
  const std::int32_t half = rope.head_dim / 2;
  // Heads that are normed first are rotated afterwards.
  const bool rotates = params.q_norm.weight == nullptr && params.k_norm.weight == nullptr &&
                       half % 8 == 0 && rope.cos == params.k_rope.cos &&
                       rope.sin == params.k_rope.sin && rope.head_dim == params.k_rope.head_dim;
  for (std::int32_t first = 0; first < norm.num_rows; first += kMaxLinearRows) {
    RowsArgs args = norm_block(norm, first, dtype);
    for (int i = 0; i < 3; ++i) args.matrix[i] = matrix_of(*products[i], first);
    if (rotates) args.matrix[0].use = args.matrix[1].use = RowsMatrix::Use::kRotate;
    args.num_matrices = 3;
    args.cos = rope.cos + std::int64_t{first} * half;
    args.sin = rope.sin + std::int64_t{first} * half;
    args.half = half;
    cuda_fast::rows_linear(args, dtype, dependent_, stream_.get());
  }
  if (!rotates) norm_and_rotate(params);
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
  const DType dtype = params.gate.weight.dtype;
  for (const LinearParams* p : {&params.gate, &params.up, &params.down}) {
    if (!fits_few(*p) || p->weight.dtype != dtype) return false;
  }
  const RmsNormParams& norm = params.norm;
  if (!norm_fits(norm)) return false;
  reserve_rows();
  for (std::int32_t first = 0; first < norm.num_rows; first += kMaxLinearRows) {
    RowsArgs args = norm_block(norm, first, dtype);
    args.matrix[0] = matrix_of(params.gate, first);
    args.matrix[0].use = RowsMatrix::Use::kGate;
    args.matrix[0].up = params.up.weight.data;
    args.matrix[0].up_bias = params.up.bias;
    args.matrix[0].act = gated_rows_.data();
    args.num_matrices = 1;
    cuda_fast::rows_linear(args, dtype, dependent_, stream_.get());
    RowsArgs down;
    down.matrix[0] = matrix_of(params.down, first);
    down.num_matrices = 1;
    down.m = args.m;
    down.cols = static_cast<std::int32_t>(params.down.weight.cols);
    down.x = gated_rows_.data();
    down.x_stride = down.cols;
    cuda_fast::rows_linear(down, dtype, dependent_, stream_.get());
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
