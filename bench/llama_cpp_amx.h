// For the peer alone, from the repository's root:
//
// CXXFLAGS="-include $PWD/bench/llama_cpp_amx.h" .venv/bin/pip install --no-cache-dir --force-reinstall --no-deps "llama-cpp-python==0.3.36"
//
// The _tile_loadconfig of some GCCs (12.2 is one) tells the compiler that it reads 8 of the 64 bytes of a tile
// configuration. The stores of the other 56 are then dropped, and llama.cpp's first product on AMX dies of SIGILL.
#pragma once
#ifdef __AMX_TILE__
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(p)))
#endif
