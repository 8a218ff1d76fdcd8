#pragma once

namespace omnimamba {

enum class Gate { NONE, AFTER, BEFORE };  // where silu(z) stands: nowhere, on the norm's output, on its input

}  // namespace omnimamba
