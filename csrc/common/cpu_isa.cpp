// What a module was compiled for.
#include "isa.h"

#include "amx.h"
#include "simd.h"
#if defined(OM_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace omnimamba {

int vector_width() { return W; }

bool may_use_tiles() {
#if defined(OM_AMX)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = cpu_features().amx_bf16 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace omnimamba
