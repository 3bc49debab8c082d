#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cudnn_attention.h"
#include "cuda/host_cuda_backend.h"
#include "support/compare.h"
#include "support/elements.h"
#include "support/random.h"
#include "support/step_buffers.h"

/// cuDNN's decode attention in every layout against the scalar reference
/// on the same 16-bit queries: weights and output are rounded to 16 bits.
namespace twilight::test {
namespace {

using cuda::CudnnDecode;
using cuda::CudnnDecodeShape;

struct LayoutCase {
  const char* name;
  bool has_lengths;
  std::int32_t page_size;  ///< 0: contiguous
  std::int32_t group;
  DType dtype;
};

class CudnnCuda : public ::testing::TestWithParam<LayoutCase> {};

TEST_P(CudnnCuda, MatchesReference) {
  const LayoutCase& c = GetParam();
  std::string version;
  const Support support = CudnnDecode::available(&version);
  if (!support) GTEST_SKIP() << support.reason;
  constexpr std::int32_t kTokens = 1024;
  OpCase op_case;
  op_case.name = c.name;
  op_case.shape = {.lengths = c.has_lengths ? std::vector<std::int32_t>{kTokens, 3, 700}
                                            : std::vector<std::int32_t>{kTokens, kTokens, kTokens},
                   .num_q_heads = 2 * c.group,
                   .num_kv_heads = 2,
                   .head_dim = 128,
                   .page_size = c.page_size == 0 ? kTokens : c.page_size,
                   .dtype = c.dtype,
                   .format = {.summary = SummaryKind::kNone, .key_bits = 0}};
  if (c.page_size == 0) op_case.shape.page_size = 16;
  op_case.options.poison = false;
  op_case.options.distribution = Distribution::kPlanted;
  PagedFixture fixture = op_case.make_fixture();
  const FixtureShape& shape = fixture.shape();
  const std::int64_t dim = shape.head_dim;
  std::vector<std::byte> q(static_cast<std::size_t>(3 * shape.num_q_heads * dim * 2));
  for (std::int64_t seq = 0; seq < 3; ++seq) {
    for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
      std::vector<float> row(fixture.q_row(seq, head).begin(), fixture.q_row(seq, head).end());
      for (std::int64_t d = 0; d < dim; ++d) {
        const std::int64_t at = (seq * shape.num_q_heads + head) * dim + d;
        store_element(c.dtype, q.data(), at, row[static_cast<std::size_t>(d)]);
        row[static_cast<std::size_t>(d)] = load_element(c.dtype, q.data(), at);
      }
      fixture.set_q(seq, head, row);
    }
  }
  StepBuffers expected(op_case, fixture);
  TestWorkspace none(*make_ref_backend(), expected.caps());
  make_ref_backend()->attend_dense(expected.attend_dense_params(), none.get());

  const PagedKvView kv = fixture.kv();
  CudnnDecodeShape plan;
  plan.dtype = c.dtype;
  plan.num_seqs = 3;
  plan.num_q_heads = shape.num_q_heads;
  plan.num_kv_heads = 2;
  plan.head_dim = dim;
  plan.max_tokens = kTokens;
  plan.has_lengths = c.has_lengths;
  std::vector<std::byte> k(fixture.k_pool().begin(), fixture.k_pool().end());
  std::vector<std::byte> v(fixture.v_pool().begin(), fixture.v_pool().end());
  std::vector<std::int32_t> table;
  if (c.page_size > 0) {
    plan.page_size = c.page_size;
    plan.num_pages = fixture.num_physical_pages();
    plan.outer_stride = kv.k.page_stride;
    plan.head_stride = kv.k.head_stride;
    plan.token_stride = kv.k.token_stride;
    const std::int32_t width = kTokens / c.page_size;
    for (std::int64_t seq = 0; seq < 3; ++seq) {
      for (std::int32_t i = 0; i < width; ++i) {
        table.push_back(i < kv.total_pages(seq) ? kv.page_of(seq, i) : 0);
      }
    }
  } else {
    plan.outer_stride = 2 * kTokens * dim;
    plan.head_stride = kTokens * dim;
    plan.token_stride = dim;
    for (std::vector<std::byte>* plane : {&k, &v}) {
      plane->assign(static_cast<std::size_t>(3 * plan.outer_stride * 2), std::byte{0});
    }
    for (std::int64_t seq = 0; seq < 3; ++seq) {
      for (std::int64_t head = 0; head < 2; ++head) {
        for (std::int64_t t = 0; t < kv.seq_lens[seq]; ++t) {
          const auto k_row = fixture.k_row(seq, t, head);
          const auto v_row = fixture.v_row(seq, t, head);
          for (std::int64_t d = 0; d < dim; ++d) {
            const std::int64_t at = seq * plan.outer_stride + head * plan.head_stride + t * dim + d;
            store_element(c.dtype, k.data(), at, k_row[static_cast<std::size_t>(d)]);
            store_element(c.dtype, v.data(), at, v_row[static_cast<std::size_t>(d)]);
          }
        }
      }
    }
  }
  auto& backend = dynamic_cast<cuda::CudaBackend&>(gpu().inner());
  DeviceMemory& memory = backend.memory();
  const auto upload = [&](const auto& host) {
    DeviceBuffer buffer(memory, host.size() * sizeof(host[0]));
    memory.upload(buffer.data(), host.data(), buffer.size());
    return buffer;
  };
  const DeviceBuffer q_device = upload(q);
  const DeviceBuffer k_device = upload(k);
  const DeviceBuffer v_device = upload(v);
  const DeviceBuffer table_device = upload(table);
  const DeviceBuffer lens_device = upload(shape.lengths);
  std::string why;
  const std::unique_ptr<CudnnDecode> decode = CudnnDecode::make(plan, &why);
  std::cout << version << ", " << c.name << ": " << (decode == nullptr ? why : "runs") << '\n';
  ASSERT_NE(decode, nullptr);
  const DeviceBuffer out_device(memory, q.size());
  const DeviceBuffer workspace(memory, decode->workspace_bytes());
  decode->run({.q = q_device.data(),
               .k = k_device.data(),
               .v = v_device.data(),
               .out = out_device.data(),
               .table = table_device.as<std::int32_t>(),
               .seq_lens = lens_device.as<std::int32_t>(),
               .scale = fixture.scale(),
               .workspace = workspace.data()},
              backend.stream());
  std::vector<std::byte> raw(q.size());
  memory.download(raw.data(), out_device.data(), raw.size());
  std::vector<float> got;
  std::vector<float> want;
  for (std::int64_t seq = 0; seq < 3; ++seq) {
    for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
      for (std::int64_t d = 0; d < dim; ++d) {
        got.push_back(
            load_element(c.dtype, raw.data(), (seq * shape.num_q_heads + head) * dim + d));
        want.push_back(expected.out_row(seq, head)[static_cast<std::size_t>(d)]);
      }
    }
  }
  EXPECT_TRUE(close(got, want, {.abs = 2e-2, .rel = 2e-2, .cosine = 1e-4}));
}

INSTANTIATE_TEST_SUITE_P(Layouts, CudnnCuda,
                         ::testing::Values(LayoutCase{"contiguous", false, 0, 4, DType::kBf16},
                                           LayoutCase{"contiguous_mha_f16", false, 0, 1,
                                                      DType::kF16},
                                           LayoutCase{"lengths", true, 0, 4, DType::kBf16},
                                           LayoutCase{"pages_16", true, 16, 4, DType::kBf16},
                                           LayoutCase{"pages_64", true, 64, 4, DType::kBf16}),
                         [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace twilight::test
