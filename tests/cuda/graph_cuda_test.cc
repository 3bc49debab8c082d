#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_check.h"
#include "cuda/host_cuda_backend.h"
#include "sparse/decode_step.h"
#include "support/compare.h"
#include "support/paged_fixture.h"
#include "support/same_bits.h"

/// Whole decode steps on device memory: against the scalar reference, captured in a graph (where an
/// allocation or a wait is an error), replayed with other lengths, and with nothing allocated.
namespace twilight::test {
namespace {

struct StepCase {
  const char* name;
  const char* preset;
  void (*change)(SparsePolicy&);
  std::int32_t q_heads = 8;
  std::int32_t head_dim = 128;
  std::int32_t page_size = 16;
  DType dtype = DType::kBf16;
};

constexpr std::int32_t kLong[] = {1700, 800, 65, 40, 0, 1200};
constexpr std::int32_t kShort[] = {1500, 600, 33, 20, 0, 1199};
constexpr std::int32_t kSeqs = 6;

SparsePolicy policy_of(const StepCase& c) {
  SparsePolicy policy = make_policy(c.preset);
  policy.dense_layers = 0;
  policy.dense_below_tokens = 128;
  policy.min_candidates = 128;
  policy.max_candidates = 4096;
  policy.min_tokens = 16;
  if (c.change != nullptr) c.change(policy);
  return policy;
}

/// A fixture's memory on the device, with lengths of its own.
class DeviceFixture {
 public:
  DeviceFixture(const PagedFixture& fixture, DeviceMemory& memory)
      : memory_(memory), kv_(fixture.kv()), index_(fixture.index()), q_(fixture.q()) {
    const auto copy = [&](std::span<const std::byte> host) {
      DeviceBuffer& buffer = buffers_.emplace_back(memory, host.size());
      memory.upload(buffer.data(), host.data(), host.size());
      return buffer.data();
    };
    kv_.k.data = copy(fixture.k_pool());
    kv_.v.data = copy(fixture.v_pool());
    index_.summaries = copy(fixture.summary_pool());
    index_.estimates = copy(fixture.estimate_pool());
    index_.value_means = copy(fixture.value_mean_pool());
    index_.params = copy(fixture.params_pool());
    const auto row = static_cast<std::int64_t>(q_.num_heads) * kv_.head_dim;
    q_.data = reinterpret_cast<const float*>(copy(std::as_bytes(
        std::span(q_.data, static_cast<std::size_t>((kv_.num_seqs - 1) * q_.seq_stride + row)))));
    kv_.block_table = reinterpret_cast<const std::int32_t*>(copy(std::as_bytes(std::span(
        kv_.block_table, static_cast<std::size_t>(kv_.num_seqs * kv_.block_table_stride)))));
    lens_.assign(kSeqs, 0);
    lens_device_ = DeviceBuffer(memory, kSeqs * sizeof(std::int32_t));
    kv_.seq_lens = lens_device_.as<std::int32_t>();
    kv_.host_seq_lens = lens_.data();
    out_stride_ = row;
    out_ = DeviceBuffer(memory, static_cast<std::size_t>(kSeqs * row) * sizeof(float));
  }

  void set_lengths(std::span<const std::int32_t> lengths, bool on_host) {
    memory_.upload(lens_device_.data(), lengths.data(), lengths.size_bytes());
    if (on_host) lens_.assign(lengths.begin(), lengths.end());
  }
  [[nodiscard]] DecodeStepParams params() const {
    DecodeStepParams p;
    p.q = q_;
    p.kv = kv_;
    p.index = index_;
    p.out = out_.as<float>();
    p.out_seq_stride = out_stride_;
    return p;
  }
  void poison_out() { memory_.fill(out_.data(), 0xff, out_.size()); }
  [[nodiscard]] std::vector<float> out() const {
    std::vector<float> host(out_.size() / sizeof(float));
    memory_.download(host.data(), out_.data(), out_.size());
    return host;
  }

 private:
  DeviceMemory& memory_;
  PagedKvView kv_;
  KeyIndexView index_;
  QueryView q_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<std::int32_t> lens_;
  DeviceBuffer lens_device_;
  DeviceBuffer out_;
  std::int64_t out_stride_ = 0;
};

class GraphCuda : public ::testing::TestWithParam<StepCase> {
 protected:
  GraphCuda()
      : policy_(policy_of(GetParam())),
        backend_(dynamic_cast<cuda::CudaBackend&>(gpu().inner())),
        fixture_(make_fixture()),
        device_(fixture_, backend_.memory()),
        step_(backend_, policy_, caps(), GetParam().dtype),
        workspace_(backend_.memory(), step_.workspace_bytes()) {
    backend_.memory().fill(workspace_.data(), 0xff, workspace_.size());
  }

  PagedFixture make_fixture() const {
    const StepCase& c = GetParam();
    FixtureShape shape{.lengths = {std::begin(kLong), std::end(kLong)},
                       .num_q_heads = c.q_heads,
                       .num_kv_heads = 2,
                       .head_dim = c.head_dim,
                       .page_size = c.page_size,
                       .dtype = c.dtype,
                       .format = index_format_of(policy_)};
    if (c.head_dim % 32 == 0) shape.format.layout = backend_.index_layout();
    return {shape, {.distribution = Distribution::kPlanted}};
  }
  StepCaps caps() const {
    const StepCase& c = GetParam();
    return {.max_seqs = kSeqs,
            .num_q_heads = c.q_heads,
            .num_kv_heads = 2,
            .head_dim = c.head_dim,
            .page_size = c.page_size,
            .max_tokens = 2048};
  }
  void run() {
    device_.poison_out();
    step_.run(device_.params(), {workspace_.data(), workspace_.size()});
  }
  SparsePolicy policy_;
  cuda::CudaBackend& backend_;
  PagedFixture fixture_;
  DeviceFixture device_;
  DecodeStep step_;
  DeviceBuffer workspace_;
};

TEST_P(GraphCuda, MatchesReferenceWithStatistics) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  DecodeStep ref_step(*ref, policy_, caps(), GetParam().dtype);
  Buffer ref_workspace(ref_step.workspace_bytes());
  std::vector<float> want(
      static_cast<std::size_t>(kSeqs * GetParam().q_heads * GetParam().head_dim));
  DecodeStepParams params;
  params.q = fixture_.q();
  params.kv = fixture_.kv();
  params.index = fixture_.index();
  params.out = want.data();
  params.out_seq_stride = std::int64_t{GetParam().q_heads} * GetParam().head_dim;
  std::vector<LayerStats> want_stats(kSeqs);
  ref_step.run(params, {ref_workspace.data(), ref_workspace.size()}, want_stats, true);

  device_.set_lengths(kLong, true);
  device_.poison_out();
  std::vector<LayerStats> stats(kSeqs);
  step_.run(device_.params(), {workspace_.data(), workspace_.size()}, stats, true);
  // A token more or less in a kept set moves the output by its weight at the threshold.
  EXPECT_TRUE(close(device_.out(), want, {.abs = 2e-2, .rel = 2e-2, .cosine = 1e-4}));
  for (std::size_t seq = 0; seq < kSeqs; ++seq) {
    EXPECT_EQ(stats[seq].path, want_stats[seq].path);
    EXPECT_EQ(stats[seq].num_tokens, want_stats[seq].num_tokens);
    if (policy_.candidate_mass == 0) {
      EXPECT_EQ(stats[seq].candidates, want_stats[seq].candidates);
    }
    ASSERT_EQ(stats[seq].true_mass.size(), want_stats[seq].true_mass.size());
    for (std::size_t head = 0; head < stats[seq].kept.size(); ++head) {
      EXPECT_NEAR(stats[seq].kept[head], want_stats[seq].kept[head],
                  3 + want_stats[seq].kept[head] / 50);
      EXPECT_NEAR(stats[seq].true_mass[head], want_stats[seq].true_mass[head], 5e-3);
      EXPECT_NEAR(stats[seq].estimated_mass[head], want_stats[seq].estimated_mass[head], 5e-3);
    }
  }
}

TEST_P(GraphCuda, ReplaysWithOtherLengths) {
  device_.set_lengths(kLong, true);
  run();
  const std::vector<float> want_long = device_.out();
  run();
  EXPECT_TRUE(same_bits(device_.out(), want_long)) << "two runs differ";
  device_.set_lengths(kShort, true);
  run();
  const std::vector<float> want_short = device_.out();

  std::size_t free_before = 0;
  std::size_t free_after = 0;
  std::size_t total = 0;
  TWILIGHT_CUDA(cudaMemGetInfo(&free_before, &total));
  cudaGraph_t graph = nullptr;
  TWILIGHT_CUDA(cudaStreamBeginCapture(backend_.stream(), cudaStreamCaptureModeGlobal));
  step_.run(device_.params(), {workspace_.data(), workspace_.size()});
  TWILIGHT_CUDA(cudaStreamEndCapture(backend_.stream(), &graph));
  TWILIGHT_CUDA(cudaMemGetInfo(&free_after, &total));
  EXPECT_EQ(free_before, free_after);
  std::size_t nodes = 0;
  TWILIGHT_CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
  std::vector<cudaGraphNode_t> list(nodes);
  TWILIGHT_CUDA(cudaGraphGetNodes(graph, list.data(), &nodes));
  for (const cudaGraphNode_t node : list) {
    cudaGraphNodeType type{};
    TWILIGHT_CUDA(cudaGraphNodeGetType(node, &type));
    EXPECT_TRUE(type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemset)
        << "node of type " << static_cast<int>(type);
  }
  RecordProperty("nodes", static_cast<int>(nodes));
  cudaGraphExec_t exec = nullptr;
  TWILIGHT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const auto replay = [&] {
    device_.poison_out();
    TWILIGHT_CUDA(cudaGraphLaunch(exec, backend_.stream()));
    return device_.out();
  };
  EXPECT_TRUE(same_bits(replay(), want_short));
  device_.set_lengths(kLong, false);
  EXPECT_TRUE(same_bits(replay(), want_long)) << "a replay with longer sequences differs";
  device_.set_lengths(kShort, false);
  EXPECT_TRUE(same_bits(replay(), want_short));
  TWILIGHT_CUDA(cudaGraphExecDestroy(exec));
  TWILIGHT_CUDA(cudaGraphDestroy(graph));
}

void adaptive(SparsePolicy& policy) {
  policy.selector = "centroid";
  policy.criterion = "group_mean";
  policy.key_bits = 2;
  policy.p = 0.9F;
  policy.tail = true;
}

INSTANTIATE_TEST_SUITE_P(
    Policies, GraphCuda,
    ::testing::Values(
        StepCase{"dense", "dense", nullptr}, StepCase{"paper", "paper", nullptr},
        StepCase{"paper_f16_p32", "paper", nullptr, 16, 64, 32, DType::kF16},
        StepCase{"paper_quest4", "paper", [](SparsePolicy& p) { p.summary_bits = 4; }, 2},
        StepCase{"full", "paper-full", nullptr, 6, 80}, StepCase{"quest_k", "quest:256", nullptr},
        StepCase{"streaming", "streaming", nullptr}, StepCase{"adaptive", "paper", adaptive},
        StepCase{"adaptive_f16", "paper", adaptive, 16, 64, 16, DType::kF16},
        StepCase{"adaptive_mass", "paper",
                 [](SparsePolicy& p) {
                   adaptive(p);
                   p.candidate_mass = 0.9;
                   p.far_tail = true;
                 },
                 8},
        StepCase{"sub_centroid", "paper",
                 [](SparsePolicy& p) {
                   adaptive(p);
                   p.selector = "sub_centroid";
                   p.criterion = "per_head";
                 },
                 14, 96, 64},
        // The fused step's summaries with two and four means; the preset has four.
        StepCase{"half_centroid_fused", "adaptive",
                 [](SparsePolicy& p) { p.selector = "half_centroid"; }},
        StepCase{"half_centroid_fused_f16", "adaptive",
                 [](SparsePolicy& p) { p.selector = "half_centroid"; }, 16, 64, 16, DType::kF16},
        StepCase{"sub_centroid_fused", "adaptive", nullptr},
        StepCase{"sub_centroid_fused_f16", "adaptive", nullptr, 16, 64, 16, DType::kF16},
        StepCase{"sub_centroid_fused_mass", "adaptive",
                 [](SparsePolicy& p) { p.candidate_mass = 0.9; }, 2}),
    [](const auto& param) { return std::string(param.param.name); });

TEST(OracleCuda, SelectsLikeTheReference) {
  SparsePolicy policy = make_policy("paper");
  policy.selector = "oracle";
  policy.dense_layers = 0;
  policy.dense_below_tokens = 0;
  policy.min_candidates = 64;
  policy.key_bits = 16;
  FixtureShape shape{.lengths = {std::begin(kLong), std::end(kLong)},
                     .num_q_heads = 4,
                     .num_kv_heads = 2,
                     .head_dim = 64,
                     .page_size = 16,
                     .dtype = DType::kBf16,
                     .format = index_format_of(policy)};
  const PagedFixture fixture(shape, {.distribution = Distribution::kPlanted});
  const StepCaps caps{.max_seqs = kSeqs,
                      .num_q_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 64,
                      .page_size = 16,
                      .max_tokens = 2048};
  auto& backend = dynamic_cast<cuda::CudaBackend&>(gpu().inner());
  const std::unique_ptr<Backend> ref = make_ref_backend();
  DecodeStep ref_step(*ref, policy, caps, DType::kBf16);
  Buffer ref_workspace(ref_step.workspace_bytes());
  std::vector<float> want(kSeqs * 4 * 64);
  DecodeStepParams params;
  params.q = fixture.q();
  params.kv = fixture.kv();
  params.index = fixture.index();
  params.out = want.data();
  params.out_seq_stride = 4 * 64;
  ref_step.run(params, {ref_workspace.data(), ref_workspace.size()});
  DeviceFixture device(fixture, backend.memory());
  DecodeStep step(backend, policy, caps, DType::kBf16);
  const DeviceBuffer workspace(backend.memory(), step.workspace_bytes());
  device.set_lengths(kLong, true);
  step.run(device.params(), {workspace.data(), workspace.size()});
  EXPECT_TRUE(close(device.out(), want, {.abs = 2e-2, .rel = 2e-2, .cosine = 1e-4}));
}

}  // namespace
}  // namespace twilight::test
