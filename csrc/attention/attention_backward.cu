// SPDX-License-Identifier: Apache-2.0
// Stands in until branch att-backward is merged, whose file takes its place (keep that one whole).
#include "attention/attention_kernels.h"

namespace detr_fast {

void launch_attention_backward(const AttentionInputs&, const AttentionGradients&, void*) {}

}  // namespace detr_fast
