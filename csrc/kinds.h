// What a member of a Params struct takes, as told to who fills it by name.
#pragma once
#include <type_traits>

#include "common/types.h"

namespace omnimamba {

enum class Kind { VIEW, FLAG, INT, LONG, UNSIGNED_LONG, FLOAT };

template <class Member>
constexpr Kind kind_of() {
  if constexpr (std::is_same_v<Member, View>) return Kind::VIEW;
  if constexpr (std::is_same_v<Member, bool>) return Kind::FLAG;
  if constexpr (std::is_same_v<Member, int32_t> || std::is_same_v<Member, uint32_t>) return Kind::INT;
  if constexpr (std::is_same_v<Member, int64_t>) return Kind::LONG;
  if constexpr (std::is_same_v<Member, uint64_t>) return Kind::UNSIGNED_LONG;
  if constexpr (std::is_same_v<Member, float>) return Kind::FLOAT;
}

}  // namespace omnimamba
