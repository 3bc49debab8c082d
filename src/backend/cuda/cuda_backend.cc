#include "backend/cuda/cuda_backend.h"

#include <algorithm>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/dense_decode.h"
#include "backend/cuda/fast/fast_step.h"
#include "backend/cuda/fast/prefill.h"
#include "backend/cuda/host_words.h"
#include "backend/cuda/read_through.h"
#include "core/check.h"

namespace twilight {

std::unique_ptr<Backend> make_cuda_backend(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    fail(ErrorCode::kUnsupported, "backend", "no CUDA device: ", cudaGetErrorString(status),
         ", got cuda:", device, ", accepted cpu, ref");
  }
  require(device >= 0 && device < count, "backend", "cuda:N, got cuda:", device,
          ", accepted cuda:0 to cuda:", count - 1);
  return std::make_unique<cuda::CudaBackend>(device);
}

std::vector<std::string> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<std::string> lines;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    TWILIGHT_CUDA(cudaGetDeviceProperties(&properties, i));
    lines.push_back(cat(properties.name, " (sm_", properties.major, properties.minor, ", ",
                        properties.totalGlobalMem >> 30, " GiB)"));
  }
  return lines;
}

bool has_cuda_backend() { return true; }

namespace cuda {
namespace {

/// Most query heads of a group times D: shared memory of the queries.
constexpr std::int32_t kMaxGroupChannels = 8192;

class CudaGraph final : public RecordedOps {
 public:
  /// Takes `graph` over.
  CudaGraph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    TWILIGHT_CUDA(status);
  }
  ~CudaGraph() override { cudaGraphExecDestroy(exec_); }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  void replay() override { TWILIGHT_CUDA(cudaGraphLaunch(exec_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t exec_ = nullptr;
};

std::int64_t max_pages(const StepCaps& caps) {
  return (std::int64_t{caps.max_tokens} + caps.page_size - 1) / caps.page_size;
}

/// Row of estimates for that many candidate pages.
std::int64_t slot_stride(std::int64_t candidate_pages, std::int32_t page_size) {
  return (candidate_pages * page_size + 15) / 16 * 16;
}

}  // namespace

Stream::Stream(int device) {
  TWILIGHT_CUDA(cudaSetDevice(device));
  TWILIGHT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

Stream::~Stream() { cudaStreamDestroy(stream_); }

CudaBackend::CudaBackend(int device)
    : device_(device), stream_(device), memory_(device, stream_.get()), linear_(memory_) {
  cudaDeviceProp properties{};
  TWILIGHT_CUDA(cudaGetDeviceProperties(&properties, device));
  require(properties.major >= 8, "backend", "compute capability of cuda:", device, ", got ",
          properties.major, ".", properties.minor, ", accepted 8.0 or later");
  dependent_ = properties.major >= 9;
  layer_device_ = {properties.multiProcessorCount,
                   static_cast<std::int32_t>(properties.sharedMemPerBlockOptin)};
  description_ = cat("cuda:", device, " (", properties.name, ", sm_", properties.major,
                     properties.minor, ", ", properties.totalGlobalMem >> 30, " GiB)");
}

CudaBackend::~CudaBackend() { cudaStreamSynchronize(stream_.get()); }

Support CudaBackend::supports(const StepCaps& caps, DType /*cache_dtype*/,
                              const IndexFormat& format) const {
  const auto no = [](const auto&... parts) { return Support{false, cat(parts...)}; };
  if (caps.head_dim < 8 || caps.head_dim > base::kMaxHeadDim || caps.head_dim % 8 != 0) {
    return no("head_dim ", caps.head_dim, ", accepted multiples of 8 from 8 to ",
              base::kMaxHeadDim);
  }
  if (caps.page_size < 1 || caps.page_size > 256) {
    return no("page_size ", caps.page_size, ", accepted 1 to 256");
  }
  if (caps.num_kv_heads < 1 || caps.num_q_heads < 1 || caps.num_q_heads % caps.num_kv_heads != 0) {
    return no("query heads ", caps.num_q_heads, ", accepted positive multiples of the ",
              caps.num_kv_heads, " KV heads");
  }
  const std::int32_t group = caps.num_q_heads / caps.num_kv_heads;
  if (group * caps.head_dim > kMaxGroupChannels) {
    return no("query heads of a KV head times head_dim ", group * caps.head_dim,
              ", accepted up to ", kMaxGroupChannels);
  }
  if (format.summary == SummaryKind::kLabels) {
    return no("selector double_sparsity, accepted the others (cpu and ref have it)");
  }
  const int unit = head_dim_unit(format);
  if (caps.head_dim % unit != 0) {
    return no("head_dim ", caps.head_dim, ", accepted multiples of ", unit,
              " with this index format");
  }
  return {};
}

std::size_t CudaBackend::workspace_bytes(const StepCaps& caps) const {
  Arena arena;
  const std::int64_t q_units = std::int64_t{caps.max_seqs} * caps.num_q_heads;
  const std::int64_t kv_units = std::int64_t{caps.max_seqs} * caps.num_kv_heads;
  // Some for each of score, select, estimate, prune and attend.
  for (int op = 0; op < 5; ++op) {
    static_cast<void>(arena.take<std::int32_t>("host words", subset_words(caps)));
  }
  static_cast<void>(arena.take<float>("scores", kv_units * max_pages(caps)));
  static_cast<void>(arena.take<float>(
      "estimates", q_units * slot_stride(caps.max_candidate_pages, caps.page_size)));
  static_cast<void>(arena.take<float>(
      "op", std::max({q_units * max_pages(caps),
                      base::attend_floats(caps.max_seqs, caps.num_q_heads, caps.head_dim),
                      cuda_fast::dense_decode_floats(caps.max_seqs, caps.num_q_heads,
                                                     caps.num_kv_heads, caps.head_dim)})));
  return align_up(arena.used_bytes());
}

std::unique_ptr<RecordedOps> CudaBackend::record(const std::function<void()>& ops) {
  TWILIGHT_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    ops();
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  TWILIGHT_CUDA(cudaStreamEndCapture(stream_.get(), &graph));
  return std::make_unique<CudaGraph>(graph, stream_.get());
}

void CudaBackend::read_through(const std::byte* data, std::size_t bytes) {
  cuda::read_through(data, bytes, stream_.get());
}

void CudaBackend::do_append_kv(const AppendKvParams& params) {
  base::append_kv(params, stream_.get());
}

void CudaBackend::do_seal_pages(const SealPagesParams& params) {
  base::seal_pages(params, stream_.get());
}

void CudaBackend::do_copy_pages(const CopyPagesParams& params) {
  base::copy_pages(params, stream_.get());
}

void CudaBackend::do_score_pages(const ScorePagesParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const DeviceSubset seqs = device_subset(params.seqs, arena, stream_.get());
  base::score_pages(params, seqs, arena, stream_.get());
}

void CudaBackend::do_exact_scores(const ExactScoresParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  base::exact_scores(params, device_subset(params.seqs, arena, stream_.get()), stream_.get());
}

void CudaBackend::do_select_pages(const SelectPagesParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  base::select_pages(params, device_subset(params.seqs, arena, stream_.get()), stream_.get());
}

void CudaBackend::do_estimate_scores(const EstimateParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  base::estimate_scores(params, device_subset(params.seqs, arena, stream_.get()), stream_.get());
}

void CudaBackend::do_prune_top_p(const PruneParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const DeviceSubset seqs = device_subset(params.seqs, arena, stream_.get());
  const DeviceProbabilities p = device_probabilities(params.p, params.seqs, params.kv.num_seqs,
                                                     params.num_q_heads, arena, stream_.get());
  base::prune_top_p(params, seqs, p, stream_.get());
}

// The parts one after the other, with their own buffers for what the caller left null.
void CudaBackend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  SelectAndPruneParams step = params;
  Arena arena(workspace.data, workspace.bytes);
  const bool by_score = step.select.mode == SelectMode::kByScore;
  const bool prunes = step.prune.criterion != PruneCriterion::kNone;
  const PagedKvView& kv = step.select.kv;
  if (by_score && step.select.scores == nullptr) {
    std::int64_t pages = 0;
    for (std::int32_t i = 0; i < step.select.seqs.count; ++i) {
      pages = std::max<std::int64_t>(pages, kv.host_len(step.select.seqs.at(i)) / kv.page_size);
    }
    require(step.score.page_stride >= pages, "select_and_prune", "page_stride, got ",
            step.score.page_stride, ", accepted ", pages, " or more");
    step.score.scores = arena.take<float>(
        "scores", std::int64_t{kv.num_seqs} * kv.num_kv_heads * step.score.page_stride);
    step.select.scores = step.score.scores;
    step.select.page_stride = step.score.page_stride;
  }
  if (prunes && step.prune.estimates == nullptr) {
    const std::int64_t stride = slot_stride(step.prune.candidate_stride, kv.page_size);
    step.estimate.estimates =
        arena.take<float>("estimates", std::int64_t{kv.num_seqs} * step.prune.num_q_heads * stride);
    step.estimate.estimate_stride = stride;
    step.prune.estimates = step.estimate.estimates;
    step.prune.estimate_stride = stride;
  }
  const std::size_t used = align_up(arena.used_bytes());
  require(used <= workspace.bytes, "select_and_prune", "workspace, got ", workspace.bytes,
          " bytes, accepted more than ", used);
  const Workspace rest{workspace.data + used, workspace.bytes - used};
  if (by_score) do_score_pages(step.score, rest);
  do_select_pages(step.select, rest);
  if (prunes) do_estimate_scores(step.estimate, rest);
  do_prune_top_p(step.prune, rest);
}

// One kernel where the shape has one. Its sets differ from those of the parts only where scores or
// weights are equal up to rounding.
void CudaBackend::do_sparse_step(const SparseStepParams& params, Workspace workspace) {
  if (!cuda_fast::fast_step_supports(params, device_)) {
    do_select_and_prune(params.prune, workspace);
    do_attend_sparse(params.attend, workspace);
    return;
  }
  Arena arena(workspace.data, workspace.bytes);
  const PruneParams& prune = params.prune.prune;
  const DeviceSubset seqs = device_subset(params.attend.seqs, arena, stream_.get());
  const DeviceProbabilities p = device_probabilities(prune.p, prune.seqs, prune.kv.num_seqs,
                                                     prune.num_q_heads, arena, stream_.get());
  cuda_fast::StepOptions options;
  options.write_lists = params.wants_lists;
  cuda_fast::launch_fast_step(params, seqs, p, device_, stream_.get(), options);
}

void CudaBackend::do_attend_dense(const AttendDenseParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const DeviceSubset seqs = device_subset(params.seqs, arena, stream_.get());
  if (cuda_fast::dense_decode_supports(params)) {
    cuda_fast::dense_decode(params, seqs, arena, dependent_, stream_.get());
  } else {
    base::attend_dense(params, seqs, arena, stream_.get());
  }
}

void CudaBackend::do_attend_sparse(const AttendSparseParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const DeviceSubset seqs = device_subset(params.seqs, arena, stream_.get());
  base::attend_sparse(params, seqs, arena, stream_.get());
}

void CudaBackend::do_attend_prefill(const AttendPrefillParams& params) {
  if (cuda_fast::prefill_supports(params)) {
    cuda_fast::prefill(params, stream_.get());
  } else {
    base::attend_prefill(params, stream_.get());
  }
}

void CudaBackend::do_linear(const LinearParams& params) {
  if (params.weight.quantised()) {
    fail(ErrorCode::kUnsupported, "cuda linear", "weight type, got ",
         weight_type_name(params.weight.blocks), ", accepted F32, F16, BF16");
  }
  if (params.num_rows == 0) return;
  if (linear_of_few(params) || linear_.run(params, stream_.get())) return;
  base::linear(params, stream_.get());
}

void CudaBackend::do_rms_norm(const RmsNormParams& params) {
  base::rms_norm(params, stream_.get());
}

void CudaBackend::do_rope(const RopeParams& params) { base::rope(params, stream_.get()); }

void CudaBackend::do_silu_mul(const SiluMulParams& params) {
  base::silu_mul(params, stream_.get());
}

}  // namespace cuda
}  // namespace twilight
