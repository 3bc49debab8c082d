#include "backend/cpu/isa.h"

#include "core/check.h"

namespace twilight::cpu {
namespace {

#define TWILIGHT_ISA_ENTRY(isa) Isa::isa,
constexpr Isa kCompiled[] = {TWILIGHT_FOR_EACH_ISA(TWILIGHT_ISA_ENTRY)};
#undef TWILIGHT_ISA_ENTRY

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return machine_has(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return machine_has(Isa::avx512) && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case Isa::neon:
      return true;
#endif
  }
  return false;
}

std::string list(const std::vector<Isa>& isas) {
  std::string text = "auto";
  for (const Isa isa : isas) text += cat(", ", isa_name(isa));
  return text;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
#define TWILIGHT_ISA_NAME(name) \
  case Isa::name:               \
    return #name;
    TWILIGHT_FOR_EACH_ISA(TWILIGHT_ISA_NAME)
#undef TWILIGHT_ISA_NAME
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : kCompiled) {
    if (machine_has(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa parse_isa(const std::string& name) {
  const std::vector<Isa> available = available_isas();
  if (name == "auto") return available.back();
  for (const Isa isa : available) {
    if (name == isa_name(isa)) return isa;
  }
  for (const Isa isa : kCompiled) {
    if (name == isa_name(isa)) {
      fail(ErrorCode::kUnsupported, "isa", "this machine lacks the instruction set, got '", name,
           "', accepted ", list(available));
    }
  }
  fail(ErrorCode::kInvalidArgument, "isa", "unknown instruction set, got '", name, "', accepted ",
       list(available));
}

}  // namespace twilight::cpu
