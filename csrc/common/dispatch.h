// SPDX-License-Identifier: Apache-2.0
// The one dispatch macro: runs a callable with `scalar_t` set to the element type of `tensor`.
// Keep kernel launches out of its body: the commas of <<<...>>> would split the macro's arguments.
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>

#define DETR_FAST_DISPATCH_FLOATING(tensor, op, ...) \
  THO_DISPATCH_V2((tensor).scalar_type(), op, AT_WRAP(__VA_ARGS__), AT_FLOATING_TYPES)
