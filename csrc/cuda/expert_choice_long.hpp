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

// Bits of a pool's threshold that the first passes have found, and how many keys are still needed
// below them.
struct Found {
  uint32_t prefix;
  int needed;
};

struct ExpertChoiceLongArgs {
  ExpertChoiceArgs common;
  int chunk;          // tokens, a multiple of 32
  int chunks;         // of a pool
  int32_t* counts;    // (passes, G·E, digits)
  Found* found;       // (passes, G·E) after each pass
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

MOE_DEVICE int64_t pools_of(const ExpertChoiceLongArgs& args) {
  return static_cast<int64_t>(args.common.groups) * args.common.shape.experts;
}

// What `passes` passes have found, from what was found before the last of them and its counts.
// Each block that has chunks of the pool finds it for itself, and the one that has the first keeps
// it for the next pass. `scratch` has places_of(kLongDigits) numbers.
template <class Block>
MOE_DEVICE Found find_prefix(const Block& block, const ExpertChoiceLongArgs& args, int64_t pool,
                             int passes, bool keeps, int* scratch) {
  const int64_t pools = pools_of(args);
  Found found = {0, args.common.capacity};
  if (passes == 0) return found;
  if (passes > 1) found = args.found[(passes - 2) * pools + pool];
  const LongKey key(args);
  const int pass = passes - 1;
  const int bits = (pass == 0 ? key.bits() : key.shift(pass - 1)) - key.shift(pass);
  const int32_t* counts = args.counts + (pass * pools + pool) * kLongDigits;
  block.sync();
  for (int digit = block.thread(); digit < 1 << bits; digit += block.threads()) {
    scratch[place_of_digit(digit, 1 << bits)] = counts[digit];
  }
  block.sync();
  const Pick pick = pick_digit(block, scratch, 1 << bits, found.needed);
  block.sync();
  found.prefix = found.prefix << bits | static_cast<uint32_t>(pick.digit);
  found.needed -= pick.above;
  if (keeps && block.thread() == 0) args.found[pass * pools + pool] = found;
  return found;
}

// Chunks of all pools that fall to this block.
template <class Block>
MOE_DEVICE Range chunks_of(const Block& block, const ExpertChoiceLongArgs& args) {
  return share(pools_of(args) * args.chunks, block.rank(), block.team_blocks());
}

// Counts the keys of tokens [first, last) of a pool into `counts`; returns how many of the thread's
// are above all of these, where that is wanted.
template <bool kAbove, class Block>
MOE_DEVICE int count_digits(const Block& block, const LongKey& key, const float* affinities,
                            int first, int last, uint32_t prefix, int open, int shift,
                            int* counts) {
  constexpr int kFlight = 8;  // keys on their way before the first is counted
  const uint32_t digits = (1u << (open - shift)) - 1;
  int above = 0;
  for (int token = first + block.thread(); token < last; token += kFlight * block.threads()) {
    float values[kFlight];
    MOE_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = token + k * block.threads();
      values[k] = at < last ? affinities[at] : 0.0f;
    }
    MOE_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      if (token + k * block.threads() >= last) continue;
      const uint32_t own = key.of(values[k]);
      const uint32_t own_prefix = static_cast<uint32_t>(static_cast<uint64_t>(own) >> open);
      if (own_prefix == prefix) block.add_shared(counts + (own >> shift & digits), 1);
      if (kAbove && own_prefix > prefix) above += 1;
    }
  }
  return above;
}

// One pass over the block's chunks: those of a pool together, but for the last pass, which keeps
// the counts of each.
template <class Block>
MOE_DEVICE void count_keys(const Block& block, const ExpertChoiceLongArgs& args, int pass) {
  const LongKey key(args);
  const int shift = key.shift(pass);
  const int open = pass == 0 ? key.bits() : key.shift(pass - 1);
  const int digits = 1 << (open - shift);
  const bool is_last = pass == kPasses - 1;
  int* counts = block.template shared<int>();
  int* above_of_block = counts + places_of(kLongDigits);
  const Range run = chunks_of(block, args);
  Found found = {0, 0};
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t pool = i / args.chunks;
    const int64_t next = is_last ? i + 1 : smaller(run.end, (pool + 1) * args.chunks);
    const bool is_first = i == pool * args.chunks;
    if (i == run.begin || is_first) {
      found = find_prefix(block, args, pool, pass, is_first, counts);
    }
    for (int digit = block.thread(); digit < digits; digit += block.threads()) counts[digit] = 0;
    if (block.thread() == 0) *above_of_block = 0;
    block.sync();
    const int64_t first = (i - pool * args.chunks) * args.chunk;
    const int64_t last = smaller<int64_t>(first + (next - i) * args.chunk, args.common.group_size);
    const float* affinities = args.common.affinities + pool * args.common.group_size;
    const int begin = static_cast<int>(first), end = static_cast<int>(last);
    int above = 0;
    if (is_last) {
      above =
          count_digits<true>(block, key, affinities, begin, end, found.prefix, open, shift, counts);
    } else {
      count_digits<false>(block, key, affinities, begin, end, found.prefix, open, shift, counts);
    }
    if (is_last && above != 0) block.add_shared(above_of_block, above);
    block.sync();
    int32_t* all = args.counts + (pass * pools_of(args) + pool) * kLongDigits;
    for (int digit = block.thread(); digit < digits; digit += block.threads()) {
      if (counts[digit] != 0) block.add_global(all + digit, counts[digit]);
      if (is_last) args.of_chunk[i * kLastDigits + digit] = counts[digit];
    }
    if (is_last && block.thread() == 0) args.above[i] = *above_of_block;
    block.sync();
    i = next;
  }
}

// How many keys of each chunk are above the threshold, and how many equal it; a warp a chunk.
template <class Block>
MOE_DEVICE void count_taken(const Block& block, const ExpertChoiceLongArgs& args) {
  const int digits = 1 << LongKey(args).shift(kPasses - 2);
  int* scratch = block.template shared<int>();
  const Range run = chunks_of(block, args);
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t pool = i / args.chunks;
    const int64_t next = smaller(run.end, (pool + 1) * args.chunks);
    const Found found = find_prefix(block, args, pool, kPasses, i == pool * args.chunks, scratch);
    const int digit = static_cast<int>(found.prefix & static_cast<uint32_t>(digits - 1));
    for (int64_t chunk = i + block.warp(); chunk < next; chunk += block.warps()) {
      const int32_t* counts = args.of_chunk + chunk * kLastDigits;
      int above = sum_strided(counts, digit + 1 + block.lane(), digits, 32, 1);
      above = sum_lanes(block, above, 32);
      if (block.lane() != 0) continue;
      args.taken[2 * chunk] = args.above[chunk] + above;
      args.taken[2 * chunk + 1] = counts[digit];
    }
    i = next;
  }
}

// What the chunks of a pool before one of them have taken. `scratch` has two numbers.
template <class Block>
MOE_DEVICE Taken taken_before(const Block& block, const ExpertChoiceLongArgs& args, int64_t pool,
                              int64_t chunk, int* scratch) {
  block.sync();
  if (block.thread() < 2) scratch[block.thread()] = 0;
  block.sync();
  int above = 0, equal = 0;
  for (int64_t i = pool * args.chunks + block.thread(); i < chunk; i += block.threads()) {
    above += args.taken[2 * i];
    equal += args.taken[2 * i + 1];
  }
  if (above != 0) block.add_shared(scratch, above);
  if (equal != 0) block.add_shared(scratch + 1, equal);
  block.sync();
  const Taken taken = {scratch[0], scratch[1]};
  block.sync();
  return taken;
}

template <class Block>
MOE_DEVICE void place_chunks(const Block& block, const ExpertChoiceLongArgs& args) {
  const Gang<Block> gang = {block, block.warps()};
  const LongKey key(args);
  int* scratch = block.template shared<int>();
  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch + 2 * block.warps());
  const Range run = chunks_of(block, args);
  Taken start = {0, 0};
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t pool = i / args.chunks;
    if (i == run.begin || i == pool * args.chunks) {
      start = taken_before(block, args, pool, i, scratch);
    }
    const Found found = args.found[(kPasses - 1) * pools_of(args) + pool];
    const int64_t group = pool / args.common.shape.experts;
    const int expert = static_cast<int>(pool - group * args.common.shape.experts);
    const int first = static_cast<int>((i - pool * args.chunks) * args.chunk);
    const int size = smaller(args.chunk, args.common.group_size - first);
    const float* affinities = args.common.affinities + pool * args.common.group_size + first;
    load_keys(gang, affinities, size, keys, [&](float affinity) { return key.of(affinity); });
    block.sync();
    take_tokens(gang, args.common, group, expert, first, first + size,
                Threshold{found.prefix, found.needed}, start, scratch,
                [&](int token) { return keys[token - first]; });
    start.above += args.taken[2 * i];
    start.equal += args.taken[2 * i + 1];
    block.sync();
  }
}

template <int V>
struct ExpertChoiceLong {
  using Args = ExpertChoiceLongArgs;
  static constexpr const char* name = "expert_choice_fwd (long pools)";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = V == 4 ? 3 : 2;

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

  static int64_t shared_bytes(const Args& args, int threads) {
    const int64_t placing = threads / 16 + args.chunk;
    const int64_t counting = places_of(kLongDigits) + 1;
    return (placing < counting ? counting : placing) * static_cast<int64_t>(sizeof(int));
  }
};

}  // namespace moe::cuda
