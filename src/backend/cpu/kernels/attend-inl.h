#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/attend_math-inl.h"
#include "backend/cpu/kernels/attend_tail-inl.h"
// The products, after the helpers they use.
#include "backend/cpu/kernels/attend_bf16-inl.h"
#include "backend/cpu/kernels/attend_f32-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

constexpr int kBlock = 32;  // tokens whose scores are held at once
constexpr int kAhead = 1;   // steps whose rows are prefetched before their turn
constexpr int kMaxDim = 512;
constexpr float kLog2E = 1.44269504F;

// Stands for the rows past the end of a partial block; their weights are exactly zero.
alignas(64) constexpr std::byte kZeroRow[kMaxDim * sizeof(float)] = {};

// Sums are held for whole 32 channels.
constexpr std::int64_t padded_dim(std::int64_t dim) { return (dim + 31) / 32 * 32; }

struct BlockRows {
  const std::byte* k[kBlock];
  const std::byte* v[kBlock];
  int count = 0;   // tokens
  int padded = 0;  // rows filled, a multiple of 16
  int head = 0;    // KV head of the tile
};

// The steps of a tile: for each block of tokens, each of its KV heads.
class StepWalk {
 public:
  explicit StepWalk(const AttendTile& tile) : tile_(tile), head_(tile.num_heads) {}

  // False, and rows left alone, after the last step.
  bool next(BlockRows* rows) {
    if (head_ == tile_.num_heads) {
      if (at_ == tile_.num_tokens) return false;
      find_block();
      head_ = 0;
    }
    rows->count = block_.count;
    rows->padded = block_.padded;
    rows->head = head_;
    const std::int64_t k_shift = head_ * tile_.k_head_stride;
    const std::int64_t v_shift = head_ * tile_.v_head_stride;
    for (int i = 0; i < block_.count; ++i) {
      rows->k[i] = block_.k[i] + k_shift;
      rows->v[i] = block_.v[i] + v_shift;
    }
    for (int i = block_.count; i < block_.padded; ++i) rows->k[i] = rows->v[i] = kZeroRow;
    ++head_;
    return true;
  }

 private:
  // Rows of the first head. Positions ascend, so a division is needed only on entering a page.
  void find_block() {
    block_.count = std::min(kBlock, tile_.num_tokens - at_);
    block_.padded = (block_.count + 15) & ~15;
    for (int i = 0; i < block_.count; ++i, ++at_) {
      const std::int32_t token = tile_.tokens ? tile_.tokens[at_] : tile_.first_token + at_;
      if (token >= page_end_ || token < page_end_ - tile_.page_size) {
        const std::int32_t page_idx = token / tile_.page_size;
        const std::int64_t page = tile_.block_table[page_idx];
        page_end_ = (page_idx + 1) * tile_.page_size;
        k_page_ = tile_.k + page * tile_.k_page_stride;
        v_page_ = tile_.v + page * tile_.v_page_stride;
      }
      const std::int64_t slot = token - (page_end_ - tile_.page_size);
      block_.k[i] = k_page_ + slot * tile_.k_token_stride;
      block_.v[i] = v_page_ + slot * tile_.v_token_stride;
    }
  }

  const AttendTile& tile_;
  BlockRows block_;
  int head_;
  int at_ = 0;
  std::int32_t page_end_ = 0;
  const std::byte* k_page_ = nullptr;
  const std::byte* v_page_ = nullptr;
};

// Running softmax of H query heads of one KV head. Lane i of a vector of scores belongs to head
// i / 4 % H; m holds each head's maximum in all of its lanes, l a sum per lane.
template <typename Products, int H>
class HeadState {
 public:
  // `memory`: 2 * H * padded_dim(dim) floats.
  void begin(const float* query, std::int64_t dim, float factor, float* memory) {
    dim_ = dim;
    q_ = memory;
    o_ = memory + H * padded_dim(dim);
    Products::template prepare_query<H>(query, dim, factor, q_);
    std::memset(o_, 0, sizeof(float) * static_cast<std::size_t>(H * padded_dim(dim)));
    std::fill(m_, m_ + kFloats, -std::numeric_limits<float>::infinity());
    std::fill(l_, l_ + kFloats, 0.0F);
  }

  // Rows of `ahead` (or null) are prefetched on the way.
  void add_block(const BlockRows& rows, const BlockRows* ahead) {
    const bool prefetch = ahead != nullptr && ahead->padded >= rows.padded;
    alignas(64) float scores[kBlock * H];
    alignas(64) typename Products::Weight weights[kBlock * H];
    alignas(64) float decay[kFloats];
    Products::template scores<H>(rows.k, prefetch ? ahead->k : nullptr, rows.padded, q_, dim_,
                                 scores);
    for (int t = rows.count; t < rows.padded; ++t) {
      for (int h = 0; h < H; ++h) {
        scores[(t / 4 * H + h) * 4 + t % 4] = -std::numeric_limits<float>::infinity();
      }
    }
    to_weights(scores, rows.padded * H / kLanes, weights, decay);
    Products::template accumulate<H>(rows.v, prefetch ? ahead->v : nullptr, rows.padded, weights,
                                     decay, dim_, padded_dim(dim_), o_);
  }

  void end(float* out, float* out_m, float* out_l) const {
    for (int h = 0; h < H; ++h) {
      Products::store_output(o_ + h * padded_dim(dim_), dim_, out + h * dim_);
      out_m[h] = m_[h * 4];
      float sum = 0;
      for (int i = 0; i < kFloats; ++i) {
        if (i / 4 % H == h) sum += l_[i];
      }
      out_l[h] = sum;
    }
  }

 private:
  static constexpr int kVecs = H > kBlocksPerVec ? H / kBlocksPerVec : 1;
  static constexpr int kFloats = kVecs * kLanes;

  void to_weights(const float* scores, int num_vecs, typename Products::Weight* weights,
                  float* decay) {
    const DF df;
    const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
    for (int p = 0; p < kVecs; ++p) {
      const VF before = hn::Load(df, m_ + p * kLanes);
      VF top = before;
      for (int i = p; i < num_vecs; i += kVecs) {
        top = hn::Max(top, hn::Load(df, scores + i * kLanes));
      }
      top = max_within_head<H>(top);
      // While every score is -inf all weights are 0, rather than exp(-inf + inf).
      const VF shift = hn::IfThenElse(hn::Eq(top, lowest), hn::Zero(df), top);
      const VF keep = exp2_nonpositive(hn::Sub(before, shift));
      VF sum = hn::Mul(hn::Load(df, l_ + p * kLanes), keep);
      for (int i = p; i < num_vecs; i += kVecs) {
        const VF w = exp2_nonpositive(hn::Sub(hn::Load(df, scores + i * kLanes), shift));
        sum = hn::Add(sum, Products::store_weight(w, weights + i * kLanes));
      }
      hn::Store(top, df, m_ + p * kLanes);
      hn::Store(sum, df, l_ + p * kLanes);
      hn::Store(keep, df, decay + p * kLanes);
    }
  }

  std::int64_t dim_ = 0;
  float* q_ = nullptr;
  float* o_ = nullptr;
  alignas(64) float m_[kFloats];
  alignas(64) float l_[kFloats];
};

// Query heads [first, first + kFours * 4 + H) of each group in one pass over the tokens: a block of
// rows is used by all of them while it is in the first-level cache.
template <typename Products, int kFours, int H>
void attend_heads(const AttendTile& tile, std::int32_t first) {
  const std::int64_t dim = tile.head_dim;
  const std::int64_t group = tile.group;
  const float factor = tile.scale * kLog2E;
  HeadState<Products, 4> fours[kFours > 0 ? kFours * kAttendMaxHeads : 1];
  HeadState<Products, H> rest[kAttendMaxHeads];
  alignas(64) float memory[2 * (kFours * 4 + H) * kAttendMaxChannels];
  float* free = memory;
  for (int head = 0; head < tile.num_heads; ++head) {
    const float* q = tile.q + (head * group + first) * dim;
    for (int i = 0; i < kFours; ++i) {
      fours[head * kFours + i].begin(q + i * 4 * dim, dim, factor, free);
      free += 2 * 4 * padded_dim(dim);
    }
    rest[head].begin(q + kFours * 4 * dim, dim, factor, free);
    free += 2 * H * padded_dim(dim);
  }

  // A ring of steps: one being attended to and the next kAhead, whose rows are on their way.
  const std::int64_t row_bytes = dim * dtype_bytes(tile.dtype);
  StepWalk walk(tile);
  BlockRows ring[kAhead + 1];
  int filled = 0;
  for (; filled < kAhead && walk.next(&ring[filled]); ++filled) {
    const BlockRows& rows = ring[filled];
    for (int i = 0; i < rows.padded; ++i) prefetch_rows<1>(rows.k + i, 0, row_bytes);
    for (int i = 0; i < rows.padded; ++i) prefetch_rows<1>(rows.v + i, 0, row_bytes);
  }
  for (int current = 0; current < filled; ++current) {
    const BlockRows* ahead = nullptr;
    if (walk.next(&ring[filled % (kAhead + 1)])) ahead = &ring[filled++ % (kAhead + 1)];
    const BlockRows& rows = ring[current % (kAhead + 1)];
    for (int i = 0; i < kFours; ++i) {
      fours[rows.head * kFours + i].add_block(rows, i == 0 ? ahead : nullptr);
    }
    rest[rows.head].add_block(rows, kFours == 0 ? ahead : nullptr);
  }

  for (int head = 0; head < tile.num_heads; ++head) {
    float* const out = tile.partial + head * tile.partial_head_stride;
    float* const out_m = out + group * dim;
    float* const out_l = out_m + group;
    for (int i = 0; i < kFours; ++i) {
      const std::int64_t h = first + i * 4;
      fours[head * kFours + i].end(out + h * dim, out_m + h, out_l + h);
    }
    const std::int64_t h = first + kFours * 4;
    rest[head].end(out + h * dim, out_m + h, out_l + h);
  }
}

template <typename Products>
void attend_group(const AttendTile& tile) {
  std::int32_t first = 0;
  for (; tile.group - first >= 8; first += 8) attend_heads<Products, 1, 4>(tile, first);
  if (tile.group - first >= 4) {
    attend_heads<Products, 0, 4>(tile, first);
    first += 4;
  }
  if (tile.group - first >= 2) {
    attend_heads<Products, 0, 2>(tile, first);
    first += 2;
  }
  if (tile.group - first >= 1) attend_heads<Products, 0, 1>(tile, first);
}

void attend_tile(const AttendTile& tile) {
  switch (tile.dtype) {
    case DType::kBf16:
#if TWILIGHT_HAS_BF16_DOT
      return attend_group<Bf16Products>(tile);
#else
      return attend_group<F32Products<ElemBf16>>(tile);
#endif
    case DType::kF16:
      return attend_group<F32Products<ElemF16>>(tile);
    case DType::kF32:
      return attend_group<F32Products<ElemF32>>(tile);
  }
}

void merge_partials(float* partials, std::int64_t count, std::int64_t group, std::int64_t dim,
                    float* out) {
  const DF df;
  const std::int64_t stride = attend_partial_floats(group, dim);
  for (std::int64_t h = 0; h < group; ++h) {
    const float* m = partials + group * dim + h;
    float top = m[0];
    for (std::int64_t i = 1; i < count; ++i) top = std::max(top, m[i * stride]);
    float* const sum = partials + h * dim;
    float total = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const VF share = exp2_nonpositive(hn::Set(df, m[i * stride] - top));
      const float* part = sum + i * stride;
      total += m[i * stride + group] * hn::GetLane(share);
      for (std::int64_t d = 0; d < dim; d += kLanes) {
        const VF scaled = hn::Mul(hn::LoadU(df, part + d), share);
        hn::StoreU(i == 0 ? scaled : hn::Add(hn::LoadU(df, sum + d), scaled), df, sum + d);
      }
    }
    const VF divisor = hn::Set(df, total);
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      hn::StoreU(hn::Div(hn::LoadU(df, sum + d), divisor), df, out + h * dim + d);
    }
  }
}

}  // namespace

const AttendKernels& attend_kernels() {
  static constexpr AttendKernels kTable = {attend_tile, attend_tail, merge_partials};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
