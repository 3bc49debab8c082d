// Compiler target of the avx512_bf16 translation units; included first, once per unit.
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_AVX3
#define TWILIGHT_ISA avx512_bf16
#define TWILIGHT_EXTRA_TARGETS ",avx512vbmi,avx512vnni,avx512bf16"
#define TWILIGHT_HAS_VBMI 1
#define TWILIGHT_HAS_VNNI 1
#define TWILIGHT_HAS_BF16_DOT 1
