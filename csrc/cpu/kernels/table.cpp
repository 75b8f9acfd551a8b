// The kernels of this instruction set, for dispatch.cpp.
#include "../runtime/table.h"

namespace fastlora::FASTLORA_ISA {

extern const Kernels kTable;
const Kernels kTable = {
#define FASTLORA_KERNEL(name, Params) name,
    FASTLORA_KERNELS(FASTLORA_KERNEL)
#undef FASTLORA_KERNEL
};

}  // namespace fastlora::FASTLORA_ISA
