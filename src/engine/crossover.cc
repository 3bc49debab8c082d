#include "engine/crossover.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <vector>

#include "core/device_memory.h"
#include "kvcache/kv_storage.h"
#include "sparse/decode_step.h"

namespace twilight {
namespace {

// Sparse must win by this much before it is used: budgets of real text vary around the synthetic
// ones.
constexpr double kMargin = 0.85;
constexpr std::int32_t kSmallest = 256;
constexpr std::int32_t kLargest = 16384;
constexpr int kRepeats = 7;
// One token in 32 is heavy for one head of each group and outweighs the rest by e^12, so that
// nearly all mass lies on such tokens: a head keeps about 1 % of N at G = 4, a group 3 %.
constexpr std::size_t kHeavyEvery = 32;
constexpr float kHeavyLogit = 12;

// Deterministic values in [-1, 1), sum of two uniforms: close enough to normal for timing.
float noise(std::uint64_t i) {
  std::uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z ^= z >> 27;
  return static_cast<float>(z & 0xffff) * 0x1p-16F + static_cast<float>(z >> 48) * 0x1p-16F - 1.0F;
}

class Trial {
 public:
  Trial(Backend& backend, StepCaps shape, DType dtype, const SparsePolicy& policy)
      : backend_(backend),
        shape_(shape),
        storage_({1, shape.num_kv_heads, shape.head_dim, shape.page_size,
                  shape.max_tokens / shape.page_size + 1, dtype,
                  index_format_of(policy, backend, shape.head_dim)},
                 backend.memory()),
        pool_(storage_.options().num_pages),
        table_(pool_, shape.page_size),
        tables_(1, storage_.options().num_pages, backend.memory()),
        q_(static_cast<std::size_t>(shape.num_q_heads * shape.head_dim)),
        device_q_(backend.memory(), q_.size() * sizeof(float)),
        out_(backend.memory(), q_.size() * sizeof(float)) {
    SparsePolicy sparse = policy;
    sparse.dense_layers = 0;
    sparse.dense_below_tokens = 0;
    sparse_ = std::make_unique<DecodeStep>(backend, sparse, shape, dtype);
    dense_ = std::make_unique<DecodeStep>(backend, make_policy("dense"), shape, dtype);
    workspace_ = DeviceBuffer(backend.memory(),
                              std::max(sparse_->workspace_bytes(), dense_->workspace_bytes()));
    for (std::size_t i = 0; i < q_.size(); ++i) q_[i] = 2 * noise(i);
    if (storage_.options().index.summary == SummaryKind::kLabels) {
      // Those of the first layer: which channels they are costs nothing.
      const auto row = static_cast<std::size_t>(shape.num_kv_heads * policy.num_labels);
      storage_.set_labels(std::span(policy.labels).first(std::min(row, policy.labels.size())));
    }
  }

  void grow_to(std::int32_t tokens) {
    const std::int32_t first = table_.num_tokens();
    AppendPlan plan;
    (void)table_.append(tokens - first, plan);
    const PageTable* const list[] = {&table_};
    tables_.set(list);
    const std::int64_t row = std::int64_t{shape_.num_kv_heads} * shape_.head_dim;
    std::vector<float> keys(plan.slots.size() * static_cast<std::size_t>(row));
    const std::int32_t group = shape_.num_q_heads / shape_.num_kv_heads;
    for (std::size_t t = 0; t < plan.slots.size(); ++t) {
      for (std::int64_t i = 0; i < row; ++i) {
        const std::size_t at = t * static_cast<std::size_t>(row) + static_cast<std::size_t>(i);
        keys[at] = noise(static_cast<std::uint64_t>(first) * 1000003 + at);
      }
      const std::size_t token = static_cast<std::size_t>(first) + t;
      if (token % kHeavyEvery != kHeavyEvery / 2) continue;
      for (std::int32_t h = 0; h < shape_.num_kv_heads; ++h) {
        const auto head = static_cast<std::int64_t>(token / kHeavyEvery) % group + h * group;
        add_heavy(q_.data() + head * shape_.head_dim,
                  keys.data() + static_cast<std::int64_t>(t) * row + h * shape_.head_dim);
      }
    }
    const auto sent = [&](const auto& values) {
      DeviceBuffer buffer(backend_.memory(), values.size() * sizeof(values[0]));
      backend_.memory().upload(buffer.data(), values.data(), buffer.size());
      return buffer;
    };
    backend_.memory().upload(device_q_.data(), q_.data(), device_q_.size());
    const DeviceBuffer device_keys = sent(keys);
    const DeviceBuffer slots = sent(plan.slots);
    const DeviceBuffer pages = sent(plan.sealed_pages);
    PagedKvView kv = view();
    backend_.append_kv({kv, device_keys.as<float>(), device_keys.as<float>(), row, row,
                        slots.as<std::int64_t>(), static_cast<std::int32_t>(plan.slots.size())});
    if (!plan.sealed_pages.empty()) {
      backend_.seal_pages({kv, storage_.index(0), pages.as<std::int32_t>(),
                           static_cast<std::int32_t>(plan.sealed_pages.size())});
    }
    backend_.memory().synchronize();
  }

  [[nodiscard]] bool sparse_wins() {
    double sparse = time(*sparse_);
    double dense = time(*dense_);
    for (int i = 1; i < kRepeats; ++i) {
      sparse = std::min(sparse, time(*sparse_));
      dense = std::min(dense, time(*dense_));
    }
    return sparse < kMargin * dense;
  }

 private:
  // Moves a key along a query until their score is kHeavyLogit higher.
  void add_heavy(const float* q, float* key) const {
    float norm = 0;
    for (std::int32_t d = 0; d < shape_.head_dim; ++d) norm += q[d] * q[d];
    const float step = kHeavyLogit * std::sqrt(static_cast<float>(shape_.head_dim)) / norm;
    for (std::int32_t d = 0; d < shape_.head_dim; ++d) key[d] += step * q[d];
  }

  [[nodiscard]] PagedKvView view() const {
    PagedKvView kv = storage_.view(0);
    tables_.apply(kv);
    return kv;
  }

  double time(DecodeStep& step) {
    DecodeStepParams params;
    const std::int64_t stride = static_cast<std::int64_t>(q_.size());
    params.q = {device_q_.as<float>(), stride, shape_.num_q_heads};
    params.kv = view();
    params.index = storage_.index(0);
    params.out = out_.as<float>();
    params.out_seq_stride = stride;
    const auto start = std::chrono::steady_clock::now();
    step.run(params, {workspace_.data(), workspace_.size()});
    backend_.memory().synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  Backend& backend_;
  StepCaps shape_;
  KvStorage storage_;
  PagePool pool_;
  PageTable table_;
  BatchTables tables_;
  std::vector<float> q_;
  DeviceBuffer device_q_, out_;
  std::unique_ptr<DecodeStep> sparse_, dense_;
  DeviceBuffer workspace_;
};

}  // namespace

std::int32_t measure_crossover(Backend& backend, StepCaps shape, DType cache_dtype,
                               const SparsePolicy& policy) {
  if (backend.name() == "ref") return 0;  // a reference has no speed worth choosing by
  const std::int32_t longest = shape.max_tokens;
  const std::int32_t group = shape.num_q_heads / shape.num_kv_heads;
  shape.max_seqs = 1;
  shape.num_kv_heads = std::min(shape.num_kv_heads, 4);
  shape.num_q_heads = shape.num_kv_heads * group;
  shape.max_tokens = std::min(longest, kLargest);
  Trial trial(backend, shape, cache_dtype, policy);
  std::int32_t dense_up_to = 0;
  for (std::int32_t n = kSmallest; n <= shape.max_tokens; n *= 2) {
    trial.grow_to(n);
    if (trial.sparse_wins()) return dense_up_to;
    dense_up_to = n;
  }
  return longest;
}

}  // namespace twilight
