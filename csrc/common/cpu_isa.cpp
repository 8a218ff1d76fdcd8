// What a module was compiled for.
#include "isa.h"

#include "simd.h"

namespace omnimamba {

int vector_width() { return W; }

}  // namespace omnimamba
