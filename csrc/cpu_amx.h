// CLP_AMX: this build holds code for Intel AMX. For 64-bit x86 under Linux, whose kernel has to be asked for the tiles,
// by a compiler that comes with their header and so with an assembler that knows them.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define CLP_AMX
#endif
#endif
