// The kernels that are in use.
#pragma once

#include "formats.h"

namespace vv {

const Kernels &kernels();

}  // namespace vv
