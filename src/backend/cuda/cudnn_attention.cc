#include "backend/cuda/cudnn_attention.h"

#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cudnn_graph.h"
#include "core/check.h"

namespace twilight::cuda {
namespace {

using Tensor = CudnnGraph::Tensor;
using Shape = CudnnGraph::Shape;
using Tensors = CudnnGraph::Attention;

std::int64_t table_width(const CudnnDecodeShape& s) {
  return (s.max_tokens + s.page_size - 1) / s.page_size;
}

Tensors add_inputs(CudnnGraph& graph, const CudnnDecodeShape& s, cudnnDataType_t type) {
  Tensors t;
  const Shape q_dims = {s.num_seqs, s.num_q_heads, 1, s.head_dim};
  const Shape q_strides = {s.num_q_heads * s.head_dim, s.head_dim, s.num_q_heads * s.head_dim, 1};
  const std::int64_t outer = s.page_size > 0 ? s.num_pages : s.num_seqs;
  const std::int64_t inner = s.page_size > 0 ? s.page_size : s.max_tokens;
  const Shape rows = {outer, s.num_kv_heads, inner, s.head_dim};
  const Shape strides = {s.outer_stride, s.head_stride, s.token_stride, 1};
  t.q = graph.input(type, q_dims, q_strides);
  t.k = graph.input(type, rows, strides);
  t.v = graph.input(type, rows, strides);
  t.out = graph.input(type, q_dims, q_strides);
  t.scale = graph.host_scalar();
  if (s.has_lengths) {
    const Shape lengths = {s.num_seqs, 1, 1, 1};
    t.lengths_q = graph.input(CUDNN_DATA_INT32, lengths, {1, 1, 1, 1});
    t.lengths_kv = graph.input(CUDNN_DATA_INT32, lengths, {1, 1, 1, 1});
  }
  if (s.page_size > 0) {
    const Shape table = {s.num_seqs, 1, table_width(s), 1};
    const Shape table_strides = {table_width(s), table_width(s), 1, 1};
    t.table_k = graph.input(CUDNN_DATA_INT32, table, table_strides);
    t.table_v = graph.input(CUDNN_DATA_INT32, table, table_strides);
  }
  return t;
}

}  // namespace

struct CudnnDecode::Impl {
  const CudnnApi& api;
  cudnnHandle_t handle = nullptr;
  Tensors tensors;
  std::vector<CudnnDescriptor> plan;  // one, once built
  std::int64_t workspace_bytes = 0;
  std::int32_t* ones = nullptr;  ///< lengths of the queries, device memory

  explicit Impl(const CudnnApi& functions) : api(functions) {
    const cudnnStatus_t status = api.create(&handle);
    if (status != CUDNN_STATUS_SUCCESS) {
      fail(ErrorCode::kUnsupported, "cudnn", "cudnnCreate: ", api.error_string(status));
    }
  }
  ~Impl() {
    plan.clear();
    if (ones != nullptr) cudaFree(ones);
    api.destroy(handle);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
};

CudnnDecode::CudnnDecode(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CudnnDecode::~CudnnDecode() = default;

Support CudnnDecode::available(std::string* version) {
  std::string why;
  const CudnnApi* const api = cudnn_api(&why);
  if (api == nullptr) return {false, why};
  if (version != nullptr) *version = cat("cuDNN ", api->version());
  return {};
}

std::unique_ptr<CudnnDecode> CudnnDecode::make(const CudnnDecodeShape& shape, std::string* why) {
  const auto refuse = [&](const std::string& reason) {
    if (why != nullptr) *why = reason;
    return nullptr;
  };
  if (shape.dtype == DType::kF32) return refuse("dtype f32, accepted bf16 or f16");
  if (shape.page_size > 0 && !shape.has_lengths) return refuse("pages without lengths");
  std::string missing;
  const CudnnApi* const api = cudnn_api(&missing);
  if (api == nullptr) return refuse(missing);
  const cudnnDataType_t type = shape.dtype == DType::kBf16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
  try {
    auto impl = std::make_unique<Impl>(*api);
    CudnnGraph graph(*api, impl->handle);
    Tensors& t = impl->tensors;
    t = add_inputs(graph, shape, type);
    graph.attention(t);
    impl->plan.push_back(graph.build_plan(&impl->workspace_bytes));
    if (shape.has_lengths) {
      const std::vector<std::int32_t> ones(static_cast<std::size_t>(shape.num_seqs), 1);
      TWILIGHT_CUDA(cudaMalloc(reinterpret_cast<void**>(&impl->ones), ones.size() * 4));
      TWILIGHT_CUDA(cudaMemcpy(impl->ones, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
    }
    return std::unique_ptr<CudnnDecode>(new CudnnDecode(std::move(impl)));
  } catch (const Error& error) {
    return refuse(error.what());
  }
}

std::size_t CudnnDecode::workspace_bytes() const {
  return static_cast<std::size_t>(impl_->workspace_bytes);
}

void CudnnDecode::run(const CudnnDecodeArgs& args, cudaStream_t stream) {
  std::vector<std::int64_t> ids;
  std::vector<void*> pointers;
  const auto give = [&](Tensor tensor, const void* pointer) {
    if (tensor < 0) return;
    ids.push_back(tensor);
    pointers.push_back(const_cast<void*>(pointer));
  };
  const Tensors& t = impl_->tensors;
  give(t.q, args.q);
  give(t.k, args.k);
  give(t.v, args.v);
  give(t.out, args.out);
  give(t.scale, &args.scale);
  give(t.table_k, args.table);
  give(t.table_v, args.table);
  give(t.lengths_q, impl_->ones);
  give(t.lengths_kv, args.seq_lens);
  CudnnDescriptor pack(impl_->api, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, std::ssize(ids), ids.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, std::ssize(pointers),
           pointers.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &args.workspace);
  pack.finalize();
  const auto check = [&](cudnnStatus_t status, const char* call) {
    if (status == CUDNN_STATUS_SUCCESS) return;
    fail(ErrorCode::kInternal, "cudnn", call, ": ", impl_->api.error_string(status));
  };
  check(impl_->api.set_stream(impl_->handle, stream), "cudnnSetStream");
  check(impl_->api.execute(impl_->handle, impl_->plan.front().get(), pack.get()),
        "cudnnBackendExecute");
}

}  // namespace twilight::cuda
