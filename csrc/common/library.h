// SPDX-License-Identifier: Apache-2.0
// The namespace that the ops are defined in and the dispatch key of their CUDA versions. The
// simulator's build (tests/cudasim) names its own: there the CUDA sources serve CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef DETR_FAST_NAMESPACE
#define DETR_FAST_NAMESPACE detr_fast
#define DETR_FAST_CUDA_KEY CUDA
#endif
