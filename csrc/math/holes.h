// What a position is that the mask leaves out between counted ones. In the order of HOLES in eager/gae.py.
#pragma once

#include <cstdint>

namespace lsc {

enum class Holes : int64_t { skip, zero, cut };

}  // namespace lsc
