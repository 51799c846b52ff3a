// The instruction sets that the CPU kernels are compiled for, and which of them this processor runs.
#pragma once

#include <string>

namespace clp {

// In order: a processor that runs one runs those before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

// The best instruction set of this processor (and operating system, which is asked for AMX's tiles at the first call).
Isa best_isa();

// The instruction set in use: the best one, unless set_isa asked for a lower one.
Isa current_isa();

// Makes every later call use `name` ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", or "best").
// Throws std::invalid_argument for an unknown name or one that the processor lacks.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace clp
