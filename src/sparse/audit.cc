#include "sparse/audit.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace twilight {

void audit_true_mass(Backend& backend, const QueryView& q, const PagedKvView& kv, float scale,
                     std::int32_t seq, const std::int32_t* kept, const std::int32_t* counts,
                     std::int64_t kept_stride, Workspace workspace, std::span<float> mass) {
  const std::int64_t n = kv.host_len(seq);
  const std::int32_t group = q.num_heads / kv.num_kv_heads;
  std::vector<float> scores(static_cast<std::size_t>(q.num_heads * n));
  // The one sequence, as a batch of its own.
  ExactScoresParams params;
  params.seqs.count = 1;
  params.q = q;
  params.q.data += seq * q.seq_stride;
  params.kv = kv;
  params.kv.num_seqs = 1;
  params.kv.block_table += seq * kv.block_table_stride;
  params.kv.seq_lens += seq;
  if (params.kv.host_seq_lens != nullptr) params.kv.host_seq_lens += seq;
  params.scale = scale;
  params.token_stride = n;
  DeviceMemory& memory = backend.memory();
  DeviceBuffer device;
  if (!memory.is_host()) device = DeviceBuffer(memory, scores.size() * sizeof(float));
  params.scores = memory.is_host() ? scores.data() : device.as<float>();
  backend.exact_scores(params, workspace);
  memory.download(scores.data(), device.data(), device.size());
  for (std::int32_t head = 0; head < q.num_heads; ++head) {
    const float* row = scores.data() + head * n;
    const float top = *std::max_element(row, row + n);
    double total = 0;
    for (std::int64_t t = 0; t < n; ++t) total += std::exp(static_cast<double>(row[t] - top));
    const std::int32_t kv_head = head / group;
    double on_kept = 0;
    for (std::int32_t i = 0; i < counts[kv_head]; ++i) {
      on_kept += std::exp(static_cast<double>(row[kept[kv_head * kept_stride + i]] - top));
    }
    mass[static_cast<std::size_t>(head)] = static_cast<float>(on_kept / total);
  }
}

}  // namespace twilight
