// Compiler target of the neon translation units; included first, once per unit.
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_NEON
#define TWILIGHT_ISA neon
#define TWILIGHT_EXTRA_TARGETS ""
#define TWILIGHT_HAS_VBMI 0
#define TWILIGHT_HAS_VNNI 0
#define TWILIGHT_HAS_BF16_DOT 0
