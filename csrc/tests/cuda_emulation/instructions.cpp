// The instructions of a warp, from the fragment maps in the PTX documentation, and the 16-bit floats.
#include "ptx.cuh"

namespace kvzip {
namespace emulation {
namespace {

uint16_t element(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, kvzip_shared + address, 2);
  return bits;
}

void load(void* const operands[32], bool transposed) {
  for (int j = 0; j < 4; ++j) {
    uint32_t row[8];
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      row[r] = static_cast<MatrixLoad*>(operands[8 * j + r])->address;
      if (row[r] % 16 != 0) fail("ldmatrix from an address that is not a multiple of 16");
      require_written(row[r], 16);
      banks |= 1u << (row[r] / 16 % 8);
    }
    if (banks != 0xff) fail("ldmatrix with bank conflicts");
    for (int l = 0; l < 32; ++l) {
      const int a = l / 4, b = 2 * (l % 4);
      const uint32_t low = transposed ? element(row[b] + 2 * a) : element(row[a] + 2 * b);
      const uint32_t high = transposed ? element(row[b + 1] + 2 * a) : element(row[a] + 2 * b + 2);
      static_cast<MatrixLoad*>(operands[l])->r[j] = low | high << 16;
    }
  }
}

template <float (*kWiden)(uint16_t)>
void multiply(void* const operands[32]) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const Product& product = *static_cast<Product*>(operands[l]);
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * (l % 4) + i, shift = 16 * i;
      for (int half = 0; half < 2; ++half) {
        a[l / 4 + 8 * half][k] = kWiden(static_cast<uint16_t>(product.a[half] >> shift));
        a[l / 4 + 8 * half][k + 8] = kWiden(static_cast<uint16_t>(product.a[2 + half] >> shift));
        b[k + 8 * half][l / 4] = kWiden(static_cast<uint16_t>(product.b[half] >> shift));
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* c = static_cast<Product*>(operands[l])->c;
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2;
      for (int k = 0; k < 16; ++k) c[e] += a[row][k] * b[k][column];
    }
  }
}

}  // namespace

void load_matrices(void* const operands[32]) { load(operands, false); }
void load_matrices_transposed(void* const operands[32]) { load(operands, true); }

void transpose_matrix(void* const operands[32]) {
  uint16_t matrix[8][8];
  for (int l = 0; l < 32; ++l) {
    const uint32_t in = static_cast<Transposition*>(operands[l])->in;
    matrix[l / 4][2 * (l % 4)] = static_cast<uint16_t>(in);
    matrix[l / 4][2 * (l % 4) + 1] = static_cast<uint16_t>(in >> 16);
  }
  for (int l = 0; l < 32; ++l) {
    static_cast<Transposition*>(operands[l])->out =
        matrix[2 * (l % 4)][l / 4] | static_cast<uint32_t>(matrix[2 * (l % 4) + 1][l / 4]) << 16;
  }
}

void mma_bfloat16(void* const operands[32]) { multiply<from_bfloat16>(operands); }
void mma_float16(void* const operands[32]) { multiply<from_float16>(operands); }

void shuffle(void* const operands[32]) {
  for (int l = 0; l < 32; ++l) {
    auto* shuffle = static_cast<Shuffle*>(operands[l]);
    shuffle->out = static_cast<Shuffle*>(operands[shuffle->source])->in;
  }
}

void sync(void* const[32]) {}

void ballot(void* const operands[32]) {
  uint32_t out = 0;
  for (int l = 0; l < 32; ++l) out |= static_cast<uint32_t>(static_cast<Vote*>(operands[l])->in) << l;
  for (int l = 0; l < 32; ++l) static_cast<Vote*>(operands[l])->out = out;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(e-1), 2^e)
  const auto places = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // 1024..2048
  return static_cast<uint16_t>(sign + ((static_cast<uint32_t>(exponent + 14) << 10) + (places - 1024)));
}

float from_float16(uint16_t bits) {
  static float* const table = [] {
    auto* values = new float[65536];
    for (int i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 1023;
      float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                        : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                         : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      values[i] = i & 0x8000 ? -magnitude : magnitude;
    }
    return values;
  }();
  return table[bits];
}

}  // namespace emulation
}  // namespace kvzip
