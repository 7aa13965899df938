// SPDX-License-Identifier: Apache-2.0
// Dropout of attention: which weights are kept, 32 keys a word, from a counter-based generator.
//
// Word `word` of query `query` (both counted among real rows) depends on nothing but the seed,
// image * heads + head and these two numbers; the backward reads what the forward has stored.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace detr_fast {

constexpr int kKeysInWord = 32;
constexpr int kKeepLevels = 256;  // a probability is a multiple of 1 / 256
constexpr int kPhiloxRounds = 7;  // as many as pass BigCrush (Salmon et al., SC 2011, table 2)

// Words of a row are stored in fours: 16 bytes, 128 keys.
DETR_FAST_HOST_DEVICE int keep_words(int keys) { return (keys + 127) / 128 * 4; }

// Where the bit of a key is in its word: each eight keys have a byte, the first one its sign. Thus
// a shift by what a lane's place in a fragment is brings the bits that it asks for to such signs.
DETR_FAST_HOST_DEVICE int keep_bit(int key) { return key % kKeysInWord ^ 7; }

struct RandomWords {
  uint32_t word[4];
};

DETR_FAST_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
  return uint32_t(uint64_t(a) * b >> 32);
}

// Philox 4x32 (Salmon et al., SC 2011, section 3.2).
DETR_FAST_HOST_DEVICE RandomWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                         uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = high_product(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bits that are set with probability kept / kKeepLevels: bit i of eight random words is a number,
// compared with `kept` from its lowest bit on.
DETR_FAST_HOST_DEVICE uint32_t keep_word(uint64_t seed, int problem, int query, int word,
                                         int kept) {
  uint32_t less = 0;
  for (int half = 0; half < 2; ++half) {
    const RandomWords random =
        philox(uint32_t(query), uint32_t(2 * word + half), uint32_t(problem), 0, seed);
    for (int i = 0; i < 4; ++i) {
      const uint32_t bit = kept >> (4 * half + i) & 1 ? ~0u : 0u;
      less = (less & ~random.word[i]) | (bit & (less | ~random.word[i]));
    }
  }
  return less;
}

}  // namespace detr_fast
