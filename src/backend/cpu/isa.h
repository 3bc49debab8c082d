#ifndef TWILIGHT_BACKEND_CPU_ISA_H_
#define TWILIGHT_BACKEND_CPU_ISA_H_

#include <string>
#include <string_view>
#include <vector>

/// Instruction sets the kernels are compiled for, worst first. Each has a header in isa/ that sets
/// the compiler target of one translation unit per kernel group.
#if defined(__x86_64__)
#define TWILIGHT_FOR_EACH_ISA(X) X(scalar) X(avx2) X(avx512) X(avx512_bf16)
#elif defined(__aarch64__)
#define TWILIGHT_FOR_EACH_ISA(X) X(scalar) X(neon)
#else
#define TWILIGHT_FOR_EACH_ISA(X) X(scalar)
#endif

namespace twilight::cpu {

#define TWILIGHT_ISA_ENUMERATOR(isa) isa,
/// The enumerators are the names of the command line: scalar, avx2, avx512 (F, BW, DQ, VL),
/// avx512_bf16 (those with VBMI, VNNI and BF16), neon.
enum class Isa { TWILIGHT_FOR_EACH_ISA(TWILIGHT_ISA_ENUMERATOR) };
#undef TWILIGHT_ISA_ENUMERATOR

[[nodiscard]] std::string_view isa_name(Isa isa);

/// The instruction sets this machine can run, worst first; always holds scalar.
[[nodiscard]] std::vector<Isa> available_isas();

/// "auto" gives the best one. Throws Error(kInvalidArgument) for an unknown name and
/// Error(kUnsupported) for one this machine lacks; both list what is accepted.
[[nodiscard]] Isa parse_isa(const std::string& name);

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_ISA_H_
