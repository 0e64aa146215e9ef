// Expert choice from pools too long for one block: the whole grid selects from all of them.
//
// The pools are cut into chunks, and every block has a run of them. In three passes, from the
// highest bits of the keys to the lowest, each block counts the keys of its chunks by their next
// bits, all add their counts up, and each finds the bits of the C-th largest key for itself. The
// counts of the last pass are kept for each chunk: they tell what is taken before it.
#pragma once

#include "expert_choice_short.hpp"

namespace moe::cuda {

constexpr int kLongDigitBits = 11, kLongDigits = 1 << kLongDigitBits;
constexpr int kLastDigits = 1 << 10;
constexpr int kPasses = 3;

struct ExpertChoiceLongArgs {
  ExpertChoiceArgs common;
  int chunk;          // tokens, a multiple of 32
  int chunks;         // of a pool
  int32_t* counts;    // (passes, G·E, digits)
  int32_t* of_chunk;  // (G·E·chunks, last digits)
  int32_t* above;     // (G·E·chunks): keys above all that the last pass counts
  int32_t* taken;     // (G·E·chunks, 2): keys above the threshold, and equal to it
};

// Keys of as few bits as will do: affinities other than logits are NaN or in 0 ... 1.
struct LongKey {
  bool is_unit;
  MOE_DEVICE explicit LongKey(const ExpertChoiceLongArgs& args)
      : is_unit(args.common.shape.affinity != Affinity::identity) {}
  MOE_DEVICE int bits() const { return is_unit ? 30 : 32; }
  MOE_DEVICE int shift(int pass) const {
    return pass == kPasses - 1 ? 0 : bits() - (pass + 1) * kLongDigitBits;
  }
  MOE_DEVICE uint32_t of(float affinity) const {
    const uint32_t key = ordered_key(affinity);
    if (!is_unit) return key;
    return key < 0x80000000u ? 0 : key - 0x80000000u + 1;
  }
};

// Bits of a pool's threshold that the first passes have found, and how many keys are still needed
// below them.
struct Found {
  uint32_t prefix;
  int needed;
};

template <class Block>
MOE_DEVICE Found find_prefix(const Block& block, const ExpertChoiceLongArgs& args, int64_t pool,
                             int passes) {
  const int64_t pools = static_cast<int64_t>(args.common.groups) * args.common.shape.experts;
  const LongKey key(args);
  Found found = {0, args.common.capacity};
  for (int pass = 0; pass < passes; ++pass) {
    const int bits = (pass == 0 ? key.bits() : key.shift(pass - 1)) - key.shift(pass);
    const Pick pick = pick_digit(block, args.counts + (pass * pools + pool) * kLongDigits,
                                 1 << bits, found.needed);
    found.prefix = found.prefix << bits | static_cast<uint32_t>(pick.digit);
    found.needed -= pick.above;
  }
  return found;
}

// Chunks of all pools that fall to this block.
template <class Block>
MOE_DEVICE Range chunks_of(const Block& block, const ExpertChoiceLongArgs& args) {
  const int64_t pools = static_cast<int64_t>(args.common.groups) * args.common.shape.experts;
  return share(pools * args.chunks, block.rank(), block.team_blocks());
}

template <class Block>
MOE_DEVICE void count_keys(const Block& block, const ExpertChoiceLongArgs& args, int pass) {
  const int64_t pools = static_cast<int64_t>(args.common.groups) * args.common.shape.experts;
  const LongKey key(args);
  const int shift = key.shift(pass);
  const int open = pass == 0 ? key.bits() : key.shift(pass - 1);
  const uint32_t digits = (1u << (open - shift)) - 1;
  const bool is_last = pass == kPasses - 1;
  int* counts = block.template shared<int>();
  int* above_of_block = counts + kLongDigits;
  const Range run = chunks_of(block, args);
  Found found = {0, 0};
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t pool = i / args.chunks;
    if (i == run.begin || i % args.chunks == 0) found = find_prefix(block, args, pool, pass);
    for (int digit = block.thread(); digit < kLongDigits; digit += block.threads()) {
      counts[digit] = 0;
    }
    if (block.thread() == 0) *above_of_block = 0;
    block.sync();
    const int first = static_cast<int>(i % args.chunks) * args.chunk;
    const int last = smaller(first + args.chunk, args.common.group_size);
    const float* affinities = args.common.affinities + pool * args.common.group_size;
    int above = 0;
    for (int token = first + block.thread(); token < last; token += block.threads()) {
      const uint32_t own = key.of(affinities[token]);
      const uint32_t prefix = static_cast<uint32_t>(static_cast<uint64_t>(own) >> open);
      if (prefix == found.prefix) block.add_shared(counts + (own >> shift & digits), 1);
      if (prefix > found.prefix) above += 1;
    }
    if (is_last) block.add_shared(above_of_block, above);
    block.sync();
    int32_t* all = args.counts + (pass * pools + pool) * kLongDigits;
    for (int digit = block.thread(); digit <= static_cast<int>(digits); digit += block.threads()) {
      if (counts[digit] != 0) block.add_global(all + digit, counts[digit]);
      if (is_last) args.of_chunk[i * kLastDigits + digit] = counts[digit];
    }
    if (is_last && block.thread() == 0) args.above[i] = *above_of_block;
    block.sync();
  }
}

// How many keys of each chunk are above the threshold, and how many equal it.
template <class Block>
MOE_DEVICE void count_taken(const Block& block, const ExpertChoiceLongArgs& args) {
  const LongKey key(args);
  const int digits = 1 << key.shift(kPasses - 2);
  int* above_of_block = block.template shared<int>();
  const Range run = chunks_of(block, args);
  int digit = 0;
  for (int64_t i = run.begin; i < run.end; ++i) {
    if (i == run.begin || i % args.chunks == 0) {
      const Found found = find_prefix(block, args, i / args.chunks, kPasses);
      digit = static_cast<int>(found.prefix & static_cast<uint32_t>(digits - 1));
    }
    if (block.thread() == 0) *above_of_block = args.above[i];
    block.sync();
    const int32_t* counts = args.of_chunk + i * kLastDigits;
    int above = 0;
    for (int other = digit + 1 + block.thread(); other < digits; other += block.threads()) {
      above += counts[other];
    }
    if (above != 0) block.add_shared(above_of_block, above);
    block.sync();
    if (block.thread() == 0) {
      args.taken[2 * i] = *above_of_block;
      args.taken[2 * i + 1] = counts[digit];
    }
    block.sync();
  }
}

template <class Block>
MOE_DEVICE void place_chunks(const Block& block, const ExpertChoiceLongArgs& args) {
  const Gang<Block> gang = {block, block.warps()};
  const LongKey key(args);
  int* before = block.template shared<int>();
  int* scratch = before + 2;
  const Range run = chunks_of(block, args);
  Found found = {0, 0};
  Taken start = {0, 0};
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t pool = i / args.chunks;
    if (i == run.begin || i % args.chunks == 0) {
      found = find_prefix(block, args, pool, kPasses);
      if (block.thread() < 2) before[block.thread()] = 0;
      block.sync();
      for (int64_t earlier = pool * args.chunks + block.thread(); earlier < i;
           earlier += block.threads()) {
        block.add_shared(before, args.taken[2 * earlier]);
        block.add_shared(before + 1, args.taken[2 * earlier + 1]);
      }
      block.sync();
      start = {before[0], before[1]};
      block.sync();
    }
    const int64_t group = pool / args.common.shape.experts;
    const int first = static_cast<int>(i % args.chunks) * args.chunk;
    const int last = smaller(first + args.chunk, args.common.group_size);
    const float* affinities = args.common.affinities + pool * args.common.group_size;
    take_tokens(gang, args.common, group,
                static_cast<int>(pool - group * args.common.shape.experts), first, last,
                Threshold{found.prefix, found.needed}, start, scratch,
                [&](int token) { return key.of(affinities[token]); });
    start.above += args.taken[2 * i];
    start.equal += args.taken[2 * i + 1];
  }
}

template <int V>
struct ExpertChoiceLong {
  using Args = ExpertChoiceLongArgs;
  static constexpr const char* name = "expert_choice_fwd (long pools)";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = V == 4 ? 3 : 1;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const int64_t counts = static_cast<int64_t>(args.common.groups) * args.common.shape.experts *
                           kPasses * kLongDigits;
    for (int64_t i = block.rank() * block.threads() + block.thread(); i < counts;
         i += block.team_blocks() * block.threads()) {
      args.counts[i] = 0;
    }
    compute_affinities<V>(block, args.common);
    block.sync_team();
    for (int pass = 0; pass < kPasses; ++pass) {
      count_keys(block, args, pass);
      block.sync_team();
    }
    count_taken(block, args);
    block.sync_team();
    place_chunks(block, args);
    sum_team(block, args.common);
    block.sync_team();
    list_rows<V>(block, args.common);
    finish(block, args.common);
  }

  static int64_t shared_bytes() { return (kLongDigits + 1) * static_cast<int64_t>(sizeof(int)); }
};

}  // namespace moe::cuda
