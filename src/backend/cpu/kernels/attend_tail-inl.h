// What dropped tokens add to attention: mean values of pages, 4-bit codes, weighted by mass.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_TAIL_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_TAIL_INL_H_

#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/attend_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

constexpr int kTailBlock = 64;            // pages whose weights are held at once
constexpr std::int64_t kTailAhead = 128;  // pages whose records are fetched at once
constexpr int kTailMaxDim = 512;
constexpr float kTailLog2E = 1.44269504F;

// code - 7.5 of the low four bits of each lane.
HWY_INLINE VF decode_codes(hn::Vec<hn::RebindToSigned<DF>> codes) {
  const DF df;
  const hn::RebindToSigned<DF> di;
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  const __m512 table = _mm512_setr_ps(-7.5F, -6.5F, -5.5F, -4.5F, -3.5F, -2.5F, -1.5F, -0.5F, 0.5F,
                                      1.5F, 2.5F, 3.5F, 4.5F, 5.5F, 6.5F, 7.5F);
  (void)df;
  (void)di;
  return VF{_mm512_permutexvar_ps(codes.raw, table)};
#else
  return hn::Sub(hn::ConvertTo(df, hn::And(codes, hn::Set(di, 15))), hn::Set(df, 7.5F));
#endif
}

// Sums of H query heads over pages, as a partial state. Channels stay in the order of the codes
// until the end: of each kLanes bytes, low nibbles and then high ones.
template <int H>
class TailSums {
 public:
  TailSums(const AttendTail& tail, std::int32_t first_head)
      : tail_(tail), first_(first_head), bytes_(tail.head_dim / 2) {
    std::memset(o_, 0, sizeof(o_));
    std::fill_n(m_, H, -std::numeric_limits<float>::infinity());
    std::fill_n(l_, H, 0.0F);
  }

  void add_candidates() {
    const DF df;
    const float* rows = tail_.mass + first_ * tail_.mass_stride;
    // Weights are fractions of the largest mass; `lift` keeps 1 / largest finite.
    float lift[H];
    float inverse[H];
    for (int h = 0; h < H; ++h) {
      const float largest = largest_of(rows + h * tail_.mass_stride, tail_.page_count);
      lift[h] = largest < 0x1p-60F ? 0x1p66F : 1.0F;
      inverse[h] = largest > 0 ? 1 / (largest * lift[h]) : 0.0F;
      if (largest > 0) m_[h] = tail_.shift[first_ + h] * kTailLog2E + std::log2(largest);
    }
    std::int64_t i = 0;
    while (i < tail_.page_count) {
      if (i % kTailAhead == 0) {
        const std::int64_t end = std::min(i + kTailAhead, tail_.page_count);
        for (std::int64_t j = i; j < end; ++j) fetch(tail_.pages[j]);
      }
      VF masses[H];
      VF any = hn::Zero(df);
      const std::int64_t size = std::min<std::int64_t>(kLanes, tail_.page_count - i);
      for (int h = 0; h < H; ++h) {
        const float* row = rows + h * tail_.mass_stride + i;
        alignas(64) float lanes[kLanes] = {};
        if (size < kLanes) {
          std::memcpy(lanes, row, static_cast<std::size_t>(size) * sizeof(float));
          row = lanes;
        }
        masses[h] = hn::LoadU(df, row);
        any = hn::Max(any, masses[h]);
      }
      // Pages that keep every token are common.
      const auto dropped = hn::Gt(any, hn::Zero(df));
      std::uint8_t bytes[8] = {};
      hn::StoreMaskBits(df, dropped, bytes);
      std::uint32_t bits = bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8;
      if (count_ + kLanes > kTailBlock) flush();
      for (int h = 0; h < H; ++h) {
        const VF w = hn::Mul(hn::Mul(masses[h], hn::Set(df, lift[h])), hn::Set(df, inverse[h]));
        hn::StoreU(hn::Compress(w, dropped), df, w_[h] + count_);
      }
      for (; bits != 0; bits &= bits - 1) push(tail_.pages[i + __builtin_ctz(bits)]);
      i += kLanes;
    }
    flush();
  }

  // Pages outside the candidates. Their masses come as logs, so the maximum may still rise.
  void add_far_pages() {
    if (tail_.log_masses == nullptr) return;
    const float* rows = tail_.log_masses + first_ * tail_.far_stride;
    std::int64_t at = 0;
    for (std::int64_t page = 0; page < tail_.sealed_pages; ++page) {
      if (at < tail_.page_count && tail_.pages[at] == page) {
        ++at;
        continue;
      }
      if (!(tail_.scores[page] >= tail_.lowest_far_score)) continue;
      fetch(page);
      for (int h = 0; h < H; ++h) {
        w_[h][count_] = rows[h * tail_.far_stride + page] * kTailLog2E;
      }
      push(page);
      if (count_ == kTailBlock) flush_logs();
    }
    flush_logs();
  }

  void end(float* out, float* out_m, float* out_l) const {
    for (int h = 0; h < H; ++h) {
      const float* o = o_ + h * kTailMaxDim;
      for (std::int64_t j = 0; j < bytes_; ++j) {
        const std::int64_t from = j / kLanes * 2 * kLanes + j % kLanes;
        float* to = out + h * tail_.head_dim + j / 4 * 8 + j % 4;
        to[0] = o[from];
        to[4] = o[from + kLanes];
      }
      out_m[h] = m_[h];
      out_l[h] = l_[h];
    }
  }

 private:
  using DI = hn::RebindToSigned<DF>;
  using DB = hn::Rebind<std::uint8_t, DF>;
  // Vectors of codes whose sums fit the registers.
  static constexpr int kChunks = kLanes == 16 ? 8 / H : (4 / H > 0 ? 4 / H : 1);

  static float largest_of(const float* row, std::int64_t count) {
    const DF df;
    VF best = hn::Zero(df);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) best = hn::Max(best, hn::LoadU(df, row + i));
    float largest = hn::GetLane(hn::MaxOfLanes(df, best));
    for (; i < count; ++i) largest = std::max(largest, row[i]);
    return largest;
  }

  void push(std::int64_t page_idx) {
    const std::int64_t page = tail_.block_table[page_idx];
    codes_[count_] = tail_.codes + page * tail_.codes_stride;
    params_[count_] = tail_.params + page * tail_.params_stride;
    ++count_;
  }

  // Loads from a page's records, whose results nothing waits for, so that the misses of many pages
  // are under way at once. Prefetches of single lines, issued as fast as here, are dropped: with
  // them 512 scattered pages took 25 us, with these 15 (Zen 4).
  void fetch(std::int64_t page_idx) const {
    const std::int64_t page = tail_.block_table[page_idx];
    const auto touch = [](const std::byte* line) {
      static_cast<void>(*static_cast<const volatile std::byte*>(line));
    };
    const std::byte* codes = tail_.codes + page * tail_.codes_stride;
    for (std::int64_t at = 0; at < bytes_; at += 64) touch(codes + at);
    touch(tail_.params + page * tail_.params_stride);
  }

  // Makes log weights weights under the new maximum.
  void flush_logs() {
    if (count_ == 0) return;
    const DF df;
    for (int h = 0; h < H; ++h) {
      float top = m_[h];
      for (int t = 0; t < count_; ++t) top = std::max(top, w_[h][t]);
      const float shift = top == -std::numeric_limits<float>::infinity() ? 0.0F : top;
      const float keep = hn::GetLane(exp2_nonpositive(hn::Set(df, m_[h] - shift)));
      m_[h] = top;
      l_[h] *= keep;
      if (keep != 1.0F) {
        for (std::int64_t j = 0; j < kTailMaxDim; ++j) o_[h * kTailMaxDim + j] *= keep;
      }
      for (int t = 0; t < count_; t += kLanes) {
        const VF x = hn::Sub(hn::Load(df, w_[h] + t), hn::Set(df, shift));
        hn::Store(exp2_nonpositive(x), df, w_[h] + t);
      }
    }
    flush();
  }

  void flush() {
    if (count_ == 0) return;
    const DF df;
    alignas(64) std::uint16_t scales[kTailBlock];
    for (int t = 0; t < count_; ++t) {
      std::memcpy(scales + t, params_[t] + offsetof(PageParams, value_scale), 2);
    }
    for (int t = count_; t % kLanes != 0; ++t) {
      scales[t] = 0;
      for (int h = 0; h < H; ++h) w_[h][t] = 0;
    }
    for (int h = 0; h < H; ++h) {
      VF sum = hn::Zero(df);
      for (int t = 0; t < count_; t += kLanes) {
        const VF w = hn::Load(df, w_[h] + t);
        sum = hn::Add(sum, w);
        const VF scale = ElemF16::load(reinterpret_cast<const std::byte*>(scales), t);
        hn::Store(hn::Mul(w, scale), df, w_[h] + t);
      }
      l_[h] += hn::GetLane(hn::SumOfLanes(df, sum));
    }
    std::int64_t at = 0;
    for (; at + kChunks * kLanes <= bytes_; at += kChunks * kLanes) {
      accumulate<kChunks, true>(at);
    }
    for (; at + kLanes <= bytes_; at += kLanes) accumulate<1, true>(at);
    if (at < bytes_) accumulate<1, false>(at);
    count_ = 0;
  }

  // Bytes [at, at + kVectors * kLanes) of the codes; past the record, zeros unless kWhole.
  template <int kVectors, bool kWhole>
  HWY_INLINE void accumulate(std::int64_t at) {
    const DF df;
    VF acc[H * kVectors * 2];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
      for (int c = 0; c < kVectors * 2; ++c) {
        acc[h * kVectors * 2 + c] = hn::Load(df, o_ + h * kTailMaxDim + at * 2 + c * kLanes);
      }
    }
    for (int t = 0; t < count_; ++t) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(codes_[t]) + at;
      alignas(16) std::uint8_t part[kVectors * kLanes];
      if constexpr (!kWhole) {
        std::memset(part, 0, sizeof(part));
        std::memcpy(part, from, static_cast<std::size_t>(bytes_ - at));
        from = part;
      }
      VF w[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) w[h] = hn::Set(df, w_[h][t]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        const auto codes = hn::PromoteTo(DI(), hn::LoadU(DB(), from + c * kLanes));
        const VF low = decode_codes(codes);
        const VF high = decode_codes(hn::ShiftRight<4>(codes));
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          VF* sum = acc + (h * kVectors + c) * 2;
          sum[0] = hn::MulAdd(low, w[h], sum[0]);
          sum[1] = hn::MulAdd(high, w[h], sum[1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
      for (int c = 0; c < kVectors * 2; ++c) {
        hn::Store(acc[h * kVectors * 2 + c], df, o_ + h * kTailMaxDim + at * 2 + c * kLanes);
      }
    }
  }

  const AttendTail& tail_;
  std::int32_t first_;
  std::int64_t bytes_;
  int count_ = 0;
  const std::byte* codes_[kTailBlock];
  const std::byte* params_[kTailBlock];
  alignas(64) float w_[H][kTailBlock];
  alignas(64) float o_[H * kTailMaxDim];
  float m_[H];
  float l_[H];
};

template <int H>
void attend_tail_heads(const AttendTail& tail, std::int32_t first) {
  TailSums<H> sums(tail, first);
  sums.add_candidates();
  sums.add_far_pages();
  const std::int64_t dim = tail.head_dim;
  float* const out_m = tail.partial + tail.group * dim;
  sums.end(tail.partial + first * dim, out_m + first, out_m + tail.group + first);
}

void attend_tail(const AttendTail& tail) {
  std::int32_t first = 0;
  for (; tail.group - first >= 4; first += 4) attend_tail_heads<4>(tail, first);
  if (tail.group - first >= 2) {
    attend_tail_heads<2>(tail, first);
    first += 2;
  }
  if (tail.group - first >= 1) attend_tail_heads<1>(tail, first);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_TAIL_INL_H_
