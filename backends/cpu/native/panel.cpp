// The width of a panel of packed weights in each instruction set.
#include "gemm.hpp"

namespace porthal {
PORTHAL_LOOPS(PanelLoops, panel_loops) = {kPanel};
}
