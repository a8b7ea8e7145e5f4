// Everything that is compiled once per instruction set; see simd.h for the macros.
#include "simd.h"
#include "multiply.h"
#include "forward.h"
#include "backward.h"
#include "layer_norm.h"
#include "run.h"
#undef INLINE
#undef NOINLINE
