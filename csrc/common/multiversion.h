// SPDX-License-Identifier: Apache-2.0
// DETR_FAST_MULTIVERSION compiles a function for AVX-512, AVX2 and the baseline; the processor
// that runs it chooses once, at load time. With -ffp-contract=off all versions compute the same
// elements; only the order of a vectorised sum depends on the width.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
#define DETR_FAST_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DETR_FAST_MULTIVERSION
#endif
