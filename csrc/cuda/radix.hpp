// The C-th largest of many keys, eight bits or more at a time.
#pragma once

#include "block.hpp"

namespace moe::cuda {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Where the count of a digit lies in shared memory. A warp gives each of its threads a 32nd of the
// digits; one number more for each lets the threads meet different banks.
MOE_DEVICE int place_of_digit(int digit, int digits) { return digit + digit / (digits / 32); }
MOE_HOST_DEVICE constexpr int places_of(int digits) { return digits + 32; }

// What selection compares: NaN ranks with -inf.
MOE_DEVICE float ranking_key(float affinity) { return affinity == affinity ? affinity : -INFINITY; }

// Unsigned in the order of the ranking keys; -0 and 0 are equal, and nothing is 0.
MOE_DEVICE uint32_t ordered_key(float affinity) {
  const float key = ranking_key(affinity);
  const uint32_t bits = key == 0 ? 0 : bit_cast<uint32_t>(key);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Warps of a block that work on one pool: `width` of them, a power of two.
template <class Block>
struct Gang {
  const Block& block;
  const int width;
  MOE_DEVICE int thread() const { return block.thread() & (width * 32 - 1); }
  MOE_DEVICE int threads() const { return width * 32; }
  MOE_DEVICE int warp() const { return block.warp() & (width - 1); }
  MOE_DEVICE int warps() const { return width; }
  MOE_DEVICE int index() const { return block.warp() / width; }
  MOE_DEVICE int count() const { return block.warps() / width; }
  MOE_DEVICE void sync() const { block.sync_warps(width); }
};

struct Pick {
  int digit;
  int above;  // keys with a higher digit
  int count;  // keys with this digit
};

// The digit of the `needed`-th largest key, from how many keys have each (see place_of_digit).
// Every warp that calls this finds it for itself.
template <class Block>
MOE_DEVICE Pick pick_digit(const Block& block, const int* counts, int digits, int needed) {
  const int each = digits / 32;
  const int* highest = counts + place_of_digit(digits - 1 - block.lane() * each, digits);
  int own = 0;
  for (int i = 0; i < each; ++i) own += highest[-i];
  Pick pick = {0, exclusive_lanes(block, own, 32), 0};
  const bool here = pick.above < needed && pick.above + own >= needed;
  if (here) {
    int i = 0;
    while (pick.above + highest[-i] < needed) pick.above += highest[-i++];
    pick.digit = digits - 1 - block.lane() * each - i;
    pick.count = highest[-i];
  }
  const int from = 31 - leading_zeros(block.ballot(here));
  return {block.shuffle(pick.digit, from), block.shuffle(pick.above, from),
          block.shuffle(pick.count, from)};
}

// What a pool's best keys have in common: they are above the threshold, or among the first
// `needed` that equal it.
struct Threshold {
  uint32_t key;
  int needed;
};

// The threshold of the `capacity` largest of `size` keys in shared memory, by a gang. `counts`
// (places_of(kDigits),) is shared by the gang. Digits are those of key - smallest key, below the
// highest bit that is ever set, so that the first of them already tells most keys apart; it ends as
// soon as all keys of a digit are taken.
template <class Gang>
MOE_DEVICE Threshold find_threshold(const Gang& gang, const uint32_t* keys, int size, int capacity,
                                    int* counts) {
  const auto& block = gang.block;
  uint32_t least = 0xffffffffu, most = 0;
  for (int i = gang.thread(); i < size; i += gang.threads()) {
    least = smaller(least, keys[i]);
    most = larger(most, keys[i]);
  }
  least = ~max_lanes(block, ~least, 32);
  most = max_lanes(block, most, 32);
  if (gang.warps() > 1) {
    uint32_t* of_warps = reinterpret_cast<uint32_t*>(counts);
    if (block.lane() == 0) {
      of_warps[2 * gang.warp()] = least;
      of_warps[2 * gang.warp() + 1] = most;
    }
    gang.sync();
    for (int warp = 0; warp < gang.warps(); ++warp) {
      least = smaller(least, of_warps[2 * warp]);
      most = larger(most, of_warps[2 * warp + 1]);
    }
    gang.sync();
  }
  int shift = 32 - leading_zeros(most - least);  // bits that are still open
  int needed = capacity;
  uint32_t prefix = 0;  // the bits above them
  while (shift > 0) {
    const int next = larger(shift - kDigitBits, 0);
    const uint32_t digits = (1u << (shift - next)) - 1;
    for (int i = gang.thread(); i < places_of(kDigits); i += gang.threads()) counts[i] = 0;
    gang.sync();
    constexpr int kFlight = 4;  // keys read before the first is counted
    for (int first = gang.thread(); first < size; first += kFlight * gang.threads()) {
      uint32_t distances[kFlight];
      MOE_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        const int i = first + k * gang.threads();
        distances[k] = i < size ? keys[i] - least : 0;
      }
      MOE_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        if (first + k * gang.threads() >= size) continue;
        if (static_cast<uint64_t>(distances[k]) >> shift != prefix) continue;
        const int digit = static_cast<int>(distances[k] >> next & digits);
        block.add_shared(counts + place_of_digit(digit, kDigits), 1);
      }
    }
    gang.sync();
    const Pick pick = pick_digit(block, counts, kDigits, needed);
    gang.sync();
    prefix = prefix << (shift - next) | static_cast<uint32_t>(pick.digit);
    needed -= pick.above;
    shift = next;
    if (pick.count == needed) {
      // All keys from here on, none of them "equal". No key is 0, so nothing wraps.
      return {least + (prefix << shift) - 1, 0};
    }
  }
  return {least + prefix, needed};
}

}  // namespace moe::cuda
