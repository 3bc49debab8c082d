#include "backend/cuda/cudnn_attention.h"

#include <limits>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cudnn_graph.h"
#include "core/check.h"

namespace twilight::cuda {
namespace {

using Tensor = CudnnGraph::Tensor;
using Shape = CudnnGraph::Shape;

/// Numbers of the tensors a run gives pointers for; -1 where the graph has none.
struct Tensors {
  Tensor q = -1;
  Tensor k = -1;
  Tensor v = -1;
  Tensor out = -1;
  Tensor scale = -1;
  Tensor lowest = -1;  ///< score of tokens past the end
  Tensor table_k = -1;
  Tensor table_v = -1;
  Tensor lengths_q = -1;
  Tensor lengths_kv = -1;
};

std::int64_t table_width(const CudnnDecodeShape& s) {
  return (s.max_tokens + s.page_size - 1) / s.page_size;
}

/// Softmax over the last dimension of `scores` [B, Hq, 1, N], as the type of the second product.
Tensor add_softmax(CudnnGraph& graph, Tensor scores, const Shape& dims, cudnnDataType_t type) {
  const Shape one = {dims[0], dims[1], dims[2], 1};
  const auto values = [&] {
    return graph.virtual_tensor(CUDNN_DATA_FLOAT, dims, CudnnGraph::dense(dims));
  };
  const auto rows = [&] {
    return graph.virtual_tensor(CUDNN_DATA_FLOAT, one, CudnnGraph::dense(one));
  };
  const Tensor top = rows();
  graph.reduce(CUDNN_REDUCE_TENSOR_MAX, scores, top);
  const Tensor shifted = values();
  graph.pointwise(CUDNN_POINTWISE_SUB, CUDNN_DATA_FLOAT, scores, top, -1, shifted);
  const Tensor weights = values();
  graph.pointwise(CUDNN_POINTWISE_EXP, CUDNN_DATA_FLOAT, shifted, -1, -1, weights);
  const Tensor sum = rows();
  graph.reduce(CUDNN_REDUCE_TENSOR_ADD, weights, sum);
  const Tensor share = graph.virtual_tensor(type, dims, CudnnGraph::dense(dims));
  graph.pointwise(CUDNN_POINTWISE_DIV, CUDNN_DATA_FLOAT, weights, sum, -1, share);
  return share;
}

/// Scores of tokens past a sequence's end become `lowest`.
Tensor add_length_mask(CudnnGraph& graph, Tensor scores, const Shape& dims, Tensors& t) {
  const auto tensor = [&](cudnnDataType_t type) {
    return graph.virtual_tensor(type, dims, CudnnGraph::dense(dims));
  };
  const Tensor row = tensor(CUDNN_DATA_INT32);
  graph.pointwise(CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, scores, -1, -1, row, 2);
  const Tensor col = tensor(CUDNN_DATA_INT32);
  graph.pointwise(CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, scores, -1, -1, col, 3);
  const Tensor row_in = tensor(CUDNN_DATA_BOOLEAN);
  graph.pointwise(CUDNN_POINTWISE_CMP_LT, CUDNN_DATA_BOOLEAN, row, t.lengths_q, -1, row_in);
  const Tensor col_in = tensor(CUDNN_DATA_BOOLEAN);
  graph.pointwise(CUDNN_POINTWISE_CMP_LT, CUDNN_DATA_BOOLEAN, col, t.lengths_kv, -1, col_in);
  const Tensor in = tensor(CUDNN_DATA_BOOLEAN);
  graph.pointwise(CUDNN_POINTWISE_LOGICAL_AND, CUDNN_DATA_BOOLEAN, row_in, col_in, -1, in);
  t.lowest = graph.host_scalar();
  const Tensor masked = tensor(CUDNN_DATA_FLOAT);
  graph.pointwise(CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, scores, t.lowest, in, masked);
  return masked;
}

void add_parts(CudnnGraph& graph, const CudnnDecodeShape& s, cudnnDataType_t type, Tensors& t) {
  const std::int64_t n = s.max_tokens;
  const Shape dims = {s.num_seqs, s.num_q_heads, 1, n};
  Tensor keys = t.k;  // [B, Hkv, D, N]
  Tensor values = t.v;
  if (s.page_size > 0) {
    const std::int64_t head = s.head_dim * n;
    keys = graph.virtual_tensor(type, {s.num_seqs, s.num_kv_heads, s.head_dim, n},
                                {head * s.num_kv_heads, head, 1, s.head_dim});
    values = graph.virtual_tensor(type, {s.num_seqs, s.num_kv_heads, n, s.head_dim},
                                  {head * s.num_kv_heads, head, s.head_dim, 1});
    graph.load_pages(t.k, t.table_k, t.lengths_kv, keys);
  }
  const Tensor product = graph.virtual_tensor(CUDNN_DATA_FLOAT, dims, CudnnGraph::dense(dims));
  graph.matmul(t.q, keys, product, t.lengths_q, t.lengths_kv, -1, s.has_lengths);
  Tensor scores = graph.virtual_tensor(CUDNN_DATA_FLOAT, dims, CudnnGraph::dense(dims));
  graph.pointwise(CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, product, t.scale, -1, scores);
  if (s.has_lengths) scores = add_length_mask(graph, scores, dims, t);
  const Tensor share = add_softmax(graph, scores, dims, type);
  if (s.page_size > 0) graph.load_pages(t.v, t.table_v, t.lengths_kv, values);
  graph.matmul(share, values, t.out, t.lengths_q, -1, t.lengths_kv);
}

Tensors add_inputs(CudnnGraph& graph, const CudnnDecodeShape& s, cudnnDataType_t type,
                   bool transposed_keys) {
  Tensors t;
  const Shape q_dims = {s.num_seqs, s.num_q_heads, 1, s.head_dim};
  const Shape q_strides = {s.num_q_heads * s.head_dim, s.head_dim, s.num_q_heads * s.head_dim, 1};
  const std::int64_t outer = s.page_size > 0 ? s.num_pages : s.num_seqs;
  const std::int64_t inner = s.page_size > 0 ? s.page_size : s.max_tokens;
  const Shape rows = {outer, s.num_kv_heads, inner, s.head_dim};
  const Shape strides = {s.outer_stride, s.head_stride, s.token_stride, 1};
  t.q = graph.input(type, q_dims, q_strides);
  if (transposed_keys && s.page_size == 0) {
    t.k = graph.input(type, {outer, s.num_kv_heads, s.head_dim, inner},
                      {s.outer_stride, s.head_stride, 1, s.token_stride});
  } else {
    t.k = graph.input(type, rows, strides);
  }
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

std::unique_ptr<CudnnDecode> CudnnDecode::make(const CudnnDecodeShape& shape, CudnnForm form,
                                               std::string* why) {
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
    t = add_inputs(graph, shape, type, form == CudnnForm::kParts);
    if (form == CudnnForm::kParts) {
      add_parts(graph, shape, type, t);
    } else {
      graph.attention(t.q, t.k, t.v, t.out, t.scale, t.table_k, t.lengths_q, t.lengths_kv);
    }
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
  const float lowest = std::numeric_limits<float>::lowest();
  const Tensors& t = impl_->tensors;
  give(t.q, args.q);
  give(t.k, args.k);
  give(t.v, args.v);
  give(t.out, args.out);
  give(t.scale, &args.scale);
  give(t.lowest, &lowest);
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
