// Times ggml's CPU flash attention alone on a decode step. Prints one JSON object per configuration.
//
// Usage: ggml_flash_attn TOKENS BATCH HEADS KV_HEADS DIM THREADS REPEATS
// K and V are [B, Hkv, N, D], one sequence apart from the other; q is f32. Variants: "heads" passes
// q as [B, Hq, 1, D], as llama.cpp does for a decode step; "grouped" passes [B, Hkv, G, D].
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ggml-cpu.h"
#include "ggml.h"

enum { kWarmup = 3, kMaxRepeats = 1000 };

static double now_ms(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

// Sum of four uniform numbers, variance 1: near enough to normal, and cheap.
static float noise(unsigned long long* state) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    *state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
    sum += (float)(*state >> 40) / 16777216.0F - 0.5F;
  }
  return sum * 1.7320508F;
}

static void fill(struct ggml_tensor* x, unsigned long long seed) {
  const long long row = x->ne[0];
  float* values = malloc(sizeof(float) * (size_t)row);
  for (long long i = 0; i < ggml_nrows(x); ++i) {
    for (long long d = 0; d < row; ++d) values[d] = noise(&seed);
    char* to = (char*)x->data + (size_t)i * x->nb[1];
    if (x->type == GGML_TYPE_F16) {
      ggml_fp32_to_fp16_row(values, (ggml_fp16_t*)to, row);
    } else if (x->type == GGML_TYPE_BF16) {
      ggml_fp32_to_bf16_row(values, (ggml_bf16_t*)to, row);
    } else {
      memcpy(to, values, sizeof(float) * (size_t)row);
    }
  }
  free(values);
}

static float element(const struct ggml_tensor* x, long long row, long long d) {
  const char* at = (const char*)x->data + (size_t)row * x->nb[1];
  if (x->type == GGML_TYPE_F16) return ggml_fp16_to_fp32(((const ggml_fp16_t*)at)[d]);
  if (x->type == GGML_TYPE_BF16) return ggml_bf16_to_fp32(((const ggml_bf16_t*)at)[d]);
  return ((const float*)at)[d];
}

// Largest error of the last query head of the last sequence; `got` and `q` are its rows.
static double error_of_last(const struct ggml_tensor* k, const struct ggml_tensor* v, const float* q,
                            const float* got) {
  const long long dim = k->ne[0], tokens = k->ne[1], first = ggml_nrows(k) - tokens;
  double* out = calloc((size_t)dim, sizeof(double));
  double total = 0, worst = 0;
  for (long long j = 0; j < tokens; ++j) {
    double score = 0;
    for (long long d = 0; d < dim; ++d) score += (double)q[d] * element(k, first + j, d);
    const double weight = exp(score / sqrt((double)dim));  // scores are a few units, no overflow
    total += weight;
    for (long long d = 0; d < dim; ++d) out[d] += weight * element(v, first + j, d);
  }
  for (long long d = 0; d < dim; ++d) worst = fmax(worst, fabs(out[d] / total - got[d]));
  free(out);
  return worst;
}

static int ascending(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

int main(int argc, char** argv) {
  if (argc != 8) {
    fprintf(stderr, "usage: %s TOKENS BATCH HEADS KV_HEADS DIM THREADS REPEATS\n", argv[0]);
    return 2;
  }
  const long long tokens = atoll(argv[1]), batch = atoll(argv[2]), heads = atoll(argv[3]);
  const long long kv_heads = atoll(argv[4]), dim = atoll(argv[5]);
  const int threads = atoi(argv[6]), repeats = atoi(argv[7]);
  if (repeats < 1 || repeats > kMaxRepeats) {
    fprintf(stderr, "REPEATS got %d, accepted 1 to %d\n", repeats, kMaxRepeats);
    return 2;
  }
  const enum ggml_type types[] = {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32};
  ggml_cpu_init();
  for (int t = 0; t < 3; ++t) {
    const size_t kv_bytes = 2 * (size_t)(batch * kv_heads * tokens * dim) * ggml_type_size(types[t]);
    struct ggml_init_params params = {kv_bytes + ((size_t)256 << 20), NULL, false};
    struct ggml_context* ctx = ggml_init(params);
    struct ggml_tensor* k = ggml_new_tensor_4d(ctx, types[t], dim, tokens, kv_heads, batch);
    struct ggml_tensor* v = ggml_new_tensor_4d(ctx, types[t], dim, tokens, kv_heads, batch);
    struct ggml_tensor* q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, dim, 1, heads, batch);
    fill(k, 1);
    fill(v, 2);
    fill(q, 3);
    const float scale = 1.0F / sqrtf((float)dim);
    for (int grouped = 0; grouped < 2; ++grouped) {
      struct ggml_tensor* rows = grouped ? ggml_reshape_4d(ctx, q, dim, heads / kv_heads, kv_heads, batch) : q;
      struct ggml_tensor* out = ggml_flash_attn_ext(ctx, rows, k, v, NULL, scale, 0.0F, 0.0F);
      struct ggml_cgraph* graph = ggml_new_graph(ctx);
      ggml_build_forward_expand(graph, out);
      // The plan is made once, so that neither allocation nor thread start is timed.
      struct ggml_threadpool_params pool_params = ggml_threadpool_params_default(threads);
      struct ggml_threadpool* pool = ggml_threadpool_new(&pool_params);
      struct ggml_cplan plan = ggml_graph_plan(graph, threads, pool);
      plan.work_data = malloc(plan.work_size);
      double ms[kMaxRepeats], cpu[kMaxRepeats];
      for (int i = -kWarmup; i < repeats; ++i) {
        const double start = now_ms(CLOCK_MONOTONIC), cpu_start = now_ms(CLOCK_PROCESS_CPUTIME_ID);
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) return 1;
        if (i < 0) continue;
        ms[i] = now_ms(CLOCK_MONOTONIC) - start;
        cpu[i] = now_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu_start;
      }
      const size_t last = (size_t)(batch * heads - 1) * (size_t)dim;  // the last head in both layouts
      const double error = error_of_last(k, v, (float*)q->data + last, (float*)out->data + last);
      qsort(ms, (size_t)repeats, sizeof(double), ascending);
      qsort(cpu, (size_t)repeats, sizeof(double), ascending);
      const double median = ms[repeats / 2];
      printf("{\"batch\": %lld, \"dtype\": \"%s\", \"variant\": \"%s\", \"best_ms\": %.3f, "
             "\"median_ms\": %.3f, \"q1_ms\": %.3f, \"q3_ms\": %.3f, \"worst_ms\": %.3f, \"runs\": %d, "
             "\"cpu_ms_per_thread\": %.3f, \"kv_bytes\": %zu, \"best_gb_s\": %.2f, \"median_gb_s\": %.2f, \"max_abs_error\": %.3g}\n",
             batch, ggml_type_name(types[t]), grouped ? "grouped" : "heads", ms[0], median,
             ms[repeats / 4], ms[3 * repeats / 4], ms[repeats - 1], repeats, cpu[repeats / 2] / threads, kv_bytes,
             (double)kv_bytes / ms[0] / 1e6, (double)kv_bytes / median / 1e6, error);
      fflush(stdout);
      free(plan.work_data);
      ggml_threadpool_free(pool);
    }
    ggml_free(ctx);
  }
  return 0;
}
