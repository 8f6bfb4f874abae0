// Products with binarized and int8 matrices on a CPU, for few tokens at a time. Built on demand by build.py.
//
// A dot product of signs with x is a sum of table entries. Four neighbouring columns have 16 sign patterns; a table of
// 16 floats holds ±x0 ±x1 ±x2 ±x3 for each. It is made once per token and then serves every row. A tile of rows
// (16 with AVX-512, 8 elsewhere) is looked up by one instruction (with AVX2 by two and a blend), so that a weight costs
// about 1/20 of an instruction and no multiplication.
//
//     stored bits of a tile, 32 columns of each row   after `transpose`: word d holds columns 32d..32d+31, lane = row
//     word >> 4n, lowest four bits                    index into the table of columns 32d+4n .. 32d+4n+3
//
// All sums are float32, their order depends on the shape alone: results are equal for every number of threads.
// The vectors are GCC's and Clang's own (`vector_size`), so the same code runs, slower, on any CPU.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;        // rows of a tile: as many floats as a register holds
#else
constexpr int LANES = 8;
#endif
constexpr int TILES = 4;         // tiles that share one load of a table
constexpr int WORDS = 16;        // 32-bit words of a row that are transposed together
constexpr int ROW_BYTES = 4 * WORDS;
constexpr int CHUNK = 8 * WORDS; // tables (of four columns) that they index
constexpr int TOKENS = 16;       // tokens whose tables are kept at once
constexpr int GROUP = 128;       // columns of one int8 activation scale

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// ±x0 ±x1 ±x2 ±x3 for the 16 patterns of four signs; a pattern's bit j is that of column j.
struct alignas(64) Table {
  float entries[16];
};

// 16 bytes of each row of a tile, `stride` apart → four words, lane = row.
inline void transpose(const uint8_t* from, int64_t stride, Words* words) {
#ifdef __AVX512F__
  __m512i quad[4];  // rows j, j + 4, j + 8, j + 12
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)); };
    quad[j] = _mm512_castsi128_si512(row(j));
    quad[j] = _mm512_inserti32x4(quad[j], row(j + 4), 1);
    quad[j] = _mm512_inserti32x4(quad[j], row(j + 8), 2);
    quad[j] = _mm512_inserti32x4(quad[j], row(j + 12), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quad[0], quad[1]), high01 = _mm512_unpackhi_epi32(quad[0], quad[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quad[2], quad[3]), high23 = _mm512_unpackhi_epi32(quad[2], quad[3]);
  words[0] = (Words)_mm512_unpacklo_epi64(low01, low23);
  words[1] = (Words)_mm512_unpackhi_epi64(low01, low23);
  words[2] = (Words)_mm512_unpacklo_epi64(high01, high23);
  words[3] = (Words)_mm512_unpackhi_epi64(high01, high23);
#elif defined(__AVX2__)
  __m256i quad[4];  // rows j, j + 4
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)); };
    quad[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(j)), row(j + 4), 1);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(quad[0], quad[1]), high01 = _mm256_unpackhi_epi32(quad[0], quad[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(quad[2], quad[3]), high23 = _mm256_unpackhi_epi32(quad[2], quad[3]);
  words[0] = (Words)_mm256_unpacklo_epi64(low01, low23);
  words[1] = (Words)_mm256_unpackhi_epi64(low01, low23);
  words[2] = (Words)_mm256_unpacklo_epi64(high01, high23);
  words[3] = (Words)_mm256_unpackhi_epi64(high01, high23);
#else
  for (int lane = 0; lane < LANES; ++lane) {
    uint32_t own[4];
    std::memcpy(own, from + lane * stride, sizeof(own));
    for (int word = 0; word < 4; ++word) words[word][lane] = own[word];
  }
#endif
}

// Bytes of a matrix `(rows, stride)`: `count` words from byte `offset` of the rows of a tile, lane = row.
// Rows beyond the last are 0, as is what lies beyond the matrix; beyond a row's end stands the next row's beginning.
void load_words(const uint8_t* matrix, int64_t stride, int64_t rows, int64_t row, int64_t offset, int64_t count,
                Words* words) {
  const int64_t size = rows * stride;
  for (int64_t word = 0; word < count; word += 4, offset += 16) {
    if ((row + LANES - 1) * stride + offset + 16 <= size) {
      transpose(matrix + row * stride + offset, stride, words + word);
    } else {
      uint8_t copy[LANES][16] = {};
      for (int64_t lane = 0; lane < std::min<int64_t>(LANES, rows - row); ++lane) {
        const int64_t at = (row + lane) * stride + offset;
        std::memcpy(copy[lane], matrix + at, std::min<int64_t>(16, size - at));
      }
      transpose(copy[0], 16, words + word);
    }
  }
}

// The entry `index % 16` in every lane.
inline Floats lookup(const Table& table, Words index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table.entries));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.entries), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.entries + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by the fourth bit
#else
  Floats found;
  for (int lane = 0; lane < LANES; ++lane) found[lane] = table.entries[index[lane] & 15];
  return found;
#endif
}

void half_to_float(const at::Half* from, float* to, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
#endif
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Lower half of every word, a float16, as float.
inline Floats low_halves(Words words) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m256i halves = (__m256i)(words & 0xffff);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  return (Floats)_mm256_cvtph_ps(packed);
#else
  Floats values;
  for (int lane = 0; lane < LANES; ++lane) {
    values[lane] = static_cast<float>(at::Half(static_cast<uint16_t>(words[lane]), at::Half::from_bits()));
  }
  return values;
#endif
}

// Symmetric int8 with one scale per 128 values, and back: what the int8 activation path multiplies.
void round_to_int8(float* values, int64_t count) {
  for (int64_t start = 0; start < count; start += GROUP) {
    const int64_t stop = std::min<int64_t>(start + GROUP, count);
    float largest = 0;
    for (int64_t i = start; i < stop; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float scale = largest / 127, inverse = largest > 1e-30f ? 127 / largest : 0;
    for (int64_t i = start; i < stop; ++i) values[i] = std::nearbyint(values[i] * inverse) * scale;
  }
}

// float16 numbers; all 1 where there are none.
struct Scales {
  const at::Half* values = nullptr;

  Scales() = default;
  Scales(const at::Tensor& tensor, int64_t offset) : values(tensor.const_data_ptr<at::Half>() + offset) {}

  void read(int64_t count, float* to) const {
    if (values) half_to_float(values, to, count);
    else std::fill(to, to + count, 1.0f);
  }

  // Adds factor times a tile of rows of a matrix `(rows, columns)`, lane = row; `to` has room for 7 more.
  void add_lanes(float factor, int64_t rows, int64_t columns, int64_t row, Floats* to) const {
    for (int64_t first = 0; first < columns; first += 8) {
      Words words[4];
      load_words(reinterpret_cast<const uint8_t*>(values), columns * 2, rows, row, first * 2, 4, words);
      for (int word = 0; word < 4; ++word) {
        *to++ += factor * low_halves(words[word]);
        *to++ += factor * low_halves(words[word] >> 16);
      }
    }
  }
};

// One summand of a row scale.
struct Part {
  Scales scales;
  float factor;
};

// Columns `first .. last` of a segment, which share a block of the matrix and so a row scale.
struct Span {
  int64_t block, first, last;
};

// The part of a span that lies in one chunk of 512 columns: tables `first .. last` of the chunk.
struct Run {
  int64_t block, first, last, table;  // `table`: where the run's tables begin
};

// Signs of some columns of a matrix with their scales: value[i, j] = row_scale[i, block(j)] · column_scale[j] · ±1.
struct Segment {
  const uint8_t* signs;         // (rows, bytes); null: every sign is +
  const uint8_t* flip;          // (rows, bytes), 1 where the sign is reversed; may be null
  std::vector<Part> row_scale;  // parts (rows, blocks), summed
  Scales column_scale;          // (columns)
  const int32_t* at;            // (columns), where they lie in x; null for all, in order
  int64_t columns, bytes, blocks;
  bool int8;                    // whether column_scale · x is rounded to int8 first
  int64_t tables = 0;
  std::vector<Span> spans;
  std::vector<std::vector<Run>> chunks;

  void add_span(int64_t block, int64_t first, int64_t last) {
    spans.push_back({block, first, last});
    if (!signs) return void(++tables);
    for (int64_t table = first / 4; table < (last + 3) / 4;) {
      const int64_t chunk = table / CHUNK, stop = std::min((last + 3) / 4, (chunk + 1) * CHUNK);
      if (static_cast<int64_t>(chunks.size()) <= chunk) chunks.resize(chunk + 1);
      chunks[chunk].push_back({block, table - chunk * CHUNK, stop - chunk * CHUNK, tables});
      tables += stop - table;
      table = stop;
    }
  }

  // Spans of equal blocks, for matrices whose row scales change every `block_size` columns.
  void split(int64_t block_size) {
    for (int64_t first = 0, last = 0; first < columns; first = last) {
      const int64_t block = (at ? at[first] : first) / block_size, begin = block * block_size, end = begin + block_size;
      if (at) {
        while (last < columns && at[last] >= begin && at[last] < end) ++last;
      } else {
        last = std::min(end, columns);
      }
      add_span(block, first, last);
    }
  }
};

alignas(64) constexpr float SIGNS[4][16] = {
    {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
    {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};

// Tables of the columns `first .. last` of x; other columns count as 0 in the first and last table.
void fill_tables(const float* x, int64_t first, int64_t last, Table* table) {
  for (int64_t start = first / 4 * 4; start < last; start += 4, ++table) {
    float four[4];
    for (int j = 0; j < 4; ++j) four[j] = start + j >= first && start + j < last ? x[start + j] : 0;
    for (int i = 0; i < 16; ++i) {
      table->entries[i] = four[0] * SIGNS[0][i] + four[1] * SIGNS[1][i] + four[2] * SIGNS[2][i] + four[3] * SIGNS[3][i];
    }
  }
}

// Σ table[index] over the tables `first .. last` of a chunk, for each tile and row.
inline void sum_run(const Words (*words)[WORDS], const Table* table, int64_t first, int64_t last, Floats* sums) {
  Floats sum[TILES] = {};
  for (int64_t n = first; n < last;) {
    const int64_t word = n / 8, from = n % 8, to = std::min<int64_t>(8, last - word * 8);
    Words index[TILES];
#pragma GCC unroll 4
    for (int tile = 0; tile < TILES; ++tile) index[tile] = words[tile][word] >> static_cast<uint32_t>(4 * from);
    if (to - from == 8) {
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step, ++table) {
#pragma GCC unroll 4
        for (int tile = 0; tile < TILES; ++tile) {
          sum[tile] += lookup(*table, index[tile]);
          index[tile] >>= 4;
        }
      }
    } else {
      for (int64_t step = from; step < to; ++step, ++table) {
#pragma GCC unroll 4
        for (int tile = 0; tile < TILES; ++tile) {
          sum[tile] += lookup(*table, index[tile]);
          index[tile] >>= 4;
        }
      }
    }
    n = word * 8 + to;
  }
  std::copy(sum, sum + TILES, sums);
}

// Adds a segment's product with some tokens to `result (tokens, TILES)`.
void multiply(const Segment& segment, const Table* tables, int64_t stride, int64_t tokens, int64_t row, int64_t rows,
              Floats* scales, Floats* result) {
  const int64_t stride_of_scales = segment.blocks + 7;
  for (int tile = 0; tile < TILES; ++tile) {
    Floats* own = scales + tile * stride_of_scales;
    std::fill(own, own + stride_of_scales, Floats{});
    for (const Part& part : segment.row_scale) {
      part.scales.add_lanes(part.factor, rows, segment.blocks, row + tile * LANES, own);
    }
  }
  if (!segment.signs) {
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t i = 0; i < segment.tables; ++i) {
        const float sum = tables[token * stride + i].entries[0];
        const int64_t block = segment.spans[i].block;
        for (int tile = 0; tile < TILES; ++tile) {
          result[token * TILES + tile] += scales[tile * stride_of_scales + block] * sum;
        }
      }
    }
    return;
  }
  Words words[TILES][WORDS];
  int64_t runs = 0, ahead = (row + TILES * LANES) * segment.bytes;
  for (const auto& chunk : segment.chunks) runs += chunk.size();
  if (runs == 0) return;  // a segment without columns
  const int64_t lines = (segment.bytes + runs - 1) / runs;
  for (size_t chunk = 0; chunk < segment.chunks.size(); ++chunk) {
    if (segment.chunks[chunk].empty()) continue;
    const int64_t offset = chunk * ROW_BYTES, count = (segment.chunks[chunk].back().last + 7) / 8;
    for (int tile = 0; tile < TILES; ++tile) {
      const int64_t first = row + tile * LANES;
      load_words(segment.signs, segment.bytes, rows, first, offset, count, words[tile]);
      if (segment.flip) {
        Words flip[WORDS];
        load_words(segment.flip, segment.bytes, rows, first, offset, count, flip);
        for (int64_t word = 0; word < count; ++word) words[tile][word] ^= flip[word];
      }
    }
    for (int64_t token = 0; token < tokens; ++token) {
      Floats* own = result + token * TILES;
      for (const Run& run : segment.chunks[chunk]) {
        if (token == 0) {  // the bits of the next rows, spread over the work
          for (int64_t line = 0; line < lines; ++line, ahead += 64) {
            __builtin_prefetch(segment.signs + ahead);
            if (segment.flip) __builtin_prefetch(segment.flip + ahead);
          }
        }
        Floats sums[TILES];
        sum_run(words, tables + token * stride + run.table, run.first, run.last, sums);
        for (int tile = 0; tile < TILES; ++tile) own[tile] += scales[tile * stride_of_scales + run.block] * sums[tile];
      }
    }
  }
}

// Tables of one token, x `(columns of the matrix)`, for a segment.
void token_tables(const Segment& segment, const float* x, Table* tables) {
  std::vector<float> scaled(segment.columns);
  segment.column_scale.read(segment.columns, scaled.data());
  if (segment.at) {
    for (int64_t j = 0; j < segment.columns; ++j) scaled[j] *= x[segment.at[j]];
  } else {
    for (int64_t j = 0; j < segment.columns; ++j) scaled[j] *= x[j];
  }
  if (segment.int8) round_to_int8(scaled.data(), segment.columns);
  for (const Span& span : segment.spans) {
    if (!segment.signs) {  // one table, of their sum
      (tables++)->entries[0] = std::accumulate(scaled.data() + span.first, scaled.data() + span.last, 0.0f);
      continue;
    }
    fill_tables(scaled.data(), span.first, span.last, tables);
    tables += (span.last + 3) / 4 - span.first / 4;
  }
}

// Rows `begin .. end` of Σ segments · x for some tokens: `store(token, row)` is where a sum goes.
template <typename Input, typename Store>
void multiply_all(const std::vector<Segment>& segments, int64_t tokens, int64_t begin, int64_t end, int64_t rows,
                  Input input, Store store) {
  int64_t stride = 0, blocks = 0;
  for (const Segment& segment : segments) stride += segment.tables, blocks = std::max(blocks, segment.blocks);
  std::vector<Table> tables(std::min<int64_t>(tokens, TOKENS) * stride);
  std::vector<Floats> scales(TILES * (blocks + 7));
  for (int64_t start = 0; start < tokens; start += TOKENS) {
    const int64_t count = std::min<int64_t>(TOKENS, tokens - start);
    for (int64_t token = 0; token < count; ++token) {
      Table* own = tables.data() + token * stride;
      for (const Segment& segment : segments) {
        token_tables(segment, input(start + token), own);
        own += segment.tables;
      }
    }
    for (int64_t row = begin; row < end; row += TILES * LANES) {
      Floats result[TOKENS * TILES] = {};
      const Table* own = tables.data();
      for (const Segment& segment : segments) {
        multiply(segment, own, stride, count, row, rows, scales.data(), result);
        own += segment.tables;
      }
      const int64_t number = std::min<int64_t>(TILES * LANES, end - row);
      for (int64_t token = 0; token < count; ++token) {
        std::memcpy(store(start + token, row), result + token * TILES, number * sizeof(float));
      }
    }
  }
}

// Rows of one task: all of them on one thread, else few enough that every thread has some.
int64_t rows_per_task(int64_t rows, int64_t products) {
  const int64_t threads = at::get_num_threads(), wanted = threads == 1 ? 1 : (4 * threads + products - 1) / products;
  const int64_t step = TILES * LANES;
  return std::max((rows / wanted + step - 1) / step * step, step);
}

// See layout.BinaryBank for shapes; x `(n, columns)` or `(n, parts, columns)` float32; returns `(pairs, parts, rows)`.
at::Tensor binary_grouped(const at::Tensor& signs, const at::Tensor& row_scale, const at::Tensor& column_scale,
                          const at::Tensor& extra_signs, const at::Tensor& extra_columns,
                          const at::Tensor& extra_row_scale, const at::Tensor& extra_column_scale, int64_t block_size,
                          const at::Tensor& x, const at::Tensor& tile_expert, const at::Tensor& tile_pairs,
                          int64_t pairs, int64_t pairs_per_row, bool int8) {
  const int64_t parts = signs.size(1), rows = signs.size(2), bytes = signs.size(3), blocks = row_scale.size(3);
  const int64_t extra = extra_columns.size(2), columns = x.size(-1), tile = tile_pairs.size(1);
  const int64_t inputs = x.dim() == 3 ? parts : 1;  // rows of x that a pair reads, one per part
  at::Tensor result = at::empty({pairs, parts, rows}, x.options());
  const float* input = x.const_data_ptr<float>();
  const int32_t* experts = tile_expert.const_data_ptr<int32_t>();
  const int32_t* members = tile_pairs.const_data_ptr<int32_t>();
  float* output = result.mutable_data_ptr<float>();

  int64_t tiles = 0;
  while (tiles < tile_expert.numel() && experts[tiles] >= 0) ++tiles;
  const int64_t slab = rows_per_task(rows, tiles * parts), slabs = (rows + slab - 1) / slab;
  at::parallel_for(0, tiles * parts * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / (parts * slabs), part = task / slabs % parts, first = task % slabs * slab;
      const int64_t matrix = experts[t] * parts + part;
      std::vector<int64_t> own;
      for (int64_t i = 0; i < tile; ++i) {
        if (members[t * tile + i] >= 0) own.push_back(members[t * tile + i]);
      }
      std::vector<Segment> segments;
      segments.push_back({signs.const_data_ptr<uint8_t>() + matrix * rows * bytes, nullptr,
                          {{Scales(row_scale, matrix * rows * blocks), 1}},
                          Scales(column_scale, matrix * 8 * bytes), nullptr, columns, bytes, blocks, int8});
      int64_t used = extra;  // without the spare places, whose scales are 0
      const at::Half* scale = extra_column_scale.const_data_ptr<at::Half>() + matrix * extra;
      while (used > 0 && static_cast<float>(scale[used - 1]) == 0) --used;
      if (used) {
        segments.push_back({extra_signs.const_data_ptr<uint8_t>() + matrix * rows * (extra / 8), nullptr,
                            {{Scales(extra_row_scale, matrix * rows * blocks), 1}},
                            Scales(extra_column_scale, matrix * extra),
                            extra_columns.const_data_ptr<int32_t>() + matrix * extra, used, extra / 8, blocks, false});
      }
      for (Segment& segment : segments) segment.split(block_size);
      multiply_all(
          segments, own.size(), first, std::min(first + slab, rows), rows,
          [&](int64_t token) { return input + (own[token] / pairs_per_row * inputs + part % inputs) * columns; },
          [&](int64_t token, int64_t row) { return output + (own[token] * parts + part) * rows + row; });
    }
  });
  return result;
}

// The segments whose sum is one stored segment (mobie.packing.binary) of columns `at`.
//
// With two magnitude groups a sum over one group is had from two over all columns. Let s be the signs and f the same,
// reversed where the bitmap is set: Σ s·x + Σ f·x is twice the sum over the first group, Σ s·x - Σ f·x twice that over
// the second. Means need Σ x, and Σ of x with the bitmap's bits for signs.
void add_segments(const at::Tensor& signs, const at::Tensor& row_scale, const std::optional<at::Tensor>& mean,
                  const std::optional<at::Tensor>& column_scale, const std::optional<at::Tensor>& bitmap,
                  const at::Tensor& at, std::vector<Segment>& segments) {
  const int64_t order = row_scale.size(0), groups = row_scale.size(1), rows = row_scale.size(2);
  const int64_t blocks = row_scale.size(3), columns = at.numel(), bytes = signs.size(2), matrix = rows * blocks;
  const int32_t* columns_at = at.const_data_ptr<int32_t>();
  const uint8_t* map = bitmap ? bitmap->const_data_ptr<uint8_t>() : nullptr;
  const auto add = [&](const uint8_t* bits, const uint8_t* flip, std::vector<Part> scale, Scales columns_scale) {
    segments.push_back({bits, flip, std::move(scale), columns_scale, columns_at, columns, bytes, blocks, false});
  };
  for (int64_t k = 0; k < order; ++k) {
    const uint8_t* own = signs.const_data_ptr<uint8_t>() + k * rows * bytes;
    const auto scale = [&](int64_t group) { return Scales(row_scale, (k * groups + group) * matrix); };
    const auto factors = [&](int64_t group) {
      return column_scale ? Scales(*column_scale, (k * groups + group) * columns) : Scales();
    };
    if (groups == 1) {
      add(own, nullptr, {{scale(0), 1}}, factors(0));
    } else if (column_scale) {
      for (int64_t group = 0; group < 2; ++group) {
        add(own, nullptr, {{scale(group), 0.5f}}, factors(group));
        add(own, map, {{scale(group), group ? -0.5f : 0.5f}}, factors(group));
      }
    } else {
      add(own, nullptr, {{scale(0), 0.5f}, {scale(1), 0.5f}}, {});
      add(own, map, {{scale(0), 0.5f}, {scale(1), -0.5f}}, {});
    }
  }
  if (mean && groups == 1) {
    add(nullptr, nullptr, {{Scales(*mean, 0), 1}}, {});
  } else if (mean) {
    add(nullptr, nullptr, {{Scales(*mean, 0), 0.5f}, {Scales(*mean, matrix), 0.5f}}, {});
    add(map, nullptr, {{Scales(*mean, 0), -0.5f}, {Scales(*mean, matrix), 0.5f}}, {});
  }
}

// Any stored binary matrix times x `(n, columns)` float32: `(n, rows)`. The lists hold the plain and the extra segment.
at::Tensor binary_linear(const std::vector<at::Tensor>& signs, const std::vector<at::Tensor>& row_scale,
                         const c10::List<std::optional<at::Tensor>>& mean,
                         const c10::List<std::optional<at::Tensor>>& column_scale,
                         const c10::List<std::optional<at::Tensor>>& bitmap, const std::vector<at::Tensor>& columns,
                         int64_t block_size, const at::Tensor& x) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < signs.size(); ++i) {
    add_segments(signs[i], row_scale[i], mean[i], column_scale[i], bitmap[i], columns[i], segments);
  }
  for (Segment& segment : segments) segment.split(block_size);
  const int64_t rows = row_scale[0].size(2), tokens = x.size(0), slab = rows_per_task(rows, 1);
  at::Tensor result = at::empty({tokens, rows}, x.options());
  const float* input = x.const_data_ptr<float>();
  float* output = result.mutable_data_ptr<float>();
  at::parallel_for(0, (rows + slab - 1) / slab, 1, [&](int64_t begin, int64_t end) {
    multiply_all(
        segments, tokens, begin * slab, std::min(end * slab, rows), rows,
        [&](int64_t token) { return input + token * x.size(1); },
        [&](int64_t token, int64_t row) { return output + token * rows + row; });
  });
  return result;
}

// --- int8 panel -----------------------------------------------------------------------------------------------------

constexpr int DEPTH = 64;    // columns of four tiles of rows that are held as floats, 16 KB
constexpr int TOGETHER = 4;  // tokens that share one load of them

// Columns `first .. last` of a tile of rows as `values[TILES * column][row]`; rows beyond the last are 0.
void load_codes(const int8_t* codes, int64_t row, int64_t rows, int64_t columns, int64_t first, int64_t last,
                Floats* values) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
  for (int64_t start = first; start < last; start += 16) {
    Words words[4];
    load_words(bytes, columns, rows, row, start, 4, words);
    for (int word = 0; word < 4; ++word) {  // four columns in a word, the first in the lowest byte
      for (int byte = 0; byte < 4; ++byte, values += TILES) {
        *values = __builtin_convertvector((Ints)(words[word] << (24 - 8 * byte)) >> 24, Floats);
      }
    }
    if (start % 64 == 0) {
      for (int lane = 0; lane < LANES; ++lane) __builtin_prefetch(codes + (row + lane) * columns + start + 2 * 64);
    }
  }
}

// sums[m][tile] += Σ values[k][tile] · x[m][k], for M tokens.
template <int M>
inline void accumulate(const Floats* values, const float* x, int64_t stride, int64_t depth, Floats* sums) {
  Floats sum[M * TILES];
  std::copy(sums, sums + M * TILES, sum);
  for (int64_t k = 0; k < depth; ++k, values += TILES) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int tile = 0; tile < TILES; ++tile) sum[m * TILES + tile] += values[tile] * x[m * stride + k];
    }
  }
  std::copy(sum, sum + M * TILES, sums);
}

// codes `(parts, rows, columns)` int8, scale `(parts, rows)` float16, x `(n, parts, columns)` float32
// → `(n, parts, rows)` float32, codes · x · scale.
at::Tensor panel_product(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& x, bool int8) {
  const int64_t parts = codes.size(0), rows = codes.size(1), columns = codes.size(2), tokens = x.size(0);
  at::Tensor result = at::empty({tokens, parts, rows}, x.options());
  at::Tensor rounded = int8 ? x.clone() : x;
  if (int8) {
    float* values = rounded.mutable_data_ptr<float>();
    for (int64_t i = 0; i < tokens * parts; ++i) round_to_int8(values + i * columns, columns);
  }
  const float* inputs = rounded.const_data_ptr<float>();
  float* output = result.mutable_data_ptr<float>();

  const int64_t step = TILES * LANES, blocks = (rows + step - 1) / step, stride = parts * columns;
  at::parallel_for(0, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Floats> values(TILES * DEPTH), sums(TILES * tokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, row = task % blocks * step;
      std::fill(sums.begin(), sums.end(), Floats{});
      for (int64_t first = 0; first < columns; first += DEPTH) {
        const int64_t last = std::min(first + DEPTH, columns);
        for (int tile = 0; tile < TILES; ++tile) {
          load_codes(codes.const_data_ptr<int8_t>() + part * codes.stride(0), row + tile * LANES, rows, columns, first,
                     last, values.data() + tile);
        }
        const auto at = [&](int64_t token) { return inputs + token * stride + part * columns + first; };
        int64_t token = 0;
        for (; token + TOGETHER <= tokens; token += TOGETHER) {
          accumulate<TOGETHER>(values.data(), at(token), stride, last - first, &sums[token * TILES]);
        }
        for (; token < tokens; ++token) {
          accumulate<1>(values.data(), at(token), stride, last - first, &sums[token * TILES]);
        }
      }
      const int64_t count = std::min(step, rows - row);
      float factor[TILES * LANES];
      half_to_float(scale.const_data_ptr<at::Half>() + part * scale.stride(0) + row, factor, count);
      for (int64_t token = 0; token < tokens; ++token) {
        const float* own = reinterpret_cast<const float*>(&sums[token * TILES]);
        float* to = output + (token * parts + part) * rows + row;
        for (int64_t i = 0; i < count; ++i) to[i] = own[i] * factor[i];
      }
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY(mobie_cpu, library) {
  library.def(
      "binary_grouped(Tensor signs, Tensor row_scale, Tensor column_scale, Tensor extra_signs, Tensor extra_columns, "
      "Tensor extra_row_scale, Tensor extra_column_scale, int block_size, Tensor x, Tensor tile_expert, "
      "Tensor tile_pairs, int pairs, int pairs_per_row, bool int8) -> Tensor");
  library.def(
      "binary_linear(Tensor[] signs, Tensor[] row_scale, Tensor?[] mean, Tensor?[] column_scale, Tensor?[] bitmap, "
      "Tensor[] columns, int block_size, Tensor x) -> Tensor");
  library.def("panel_product(Tensor codes, Tensor scale, Tensor x, bool int8) -> Tensor");
}

TORCH_LIBRARY_IMPL(mobie_cpu, CPU, library) {
  library.impl("binary_grouped", &binary_grouped);
  library.impl("binary_linear", &binary_linear);
  library.impl("panel_product", &panel_product);
}
