// The CPU kernels over quantised keys and values, against double, without torch: to be run under sanitizers.
//
// Buffers are as large as they must be and not a byte more, so that a read beyond one is seen.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kvzip/attention.h"

namespace {

using kvzip::Attention;
using kvzip::Kernels;
using Random = std::mt19937;

int failures = 0, checks = 0;

uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

double from_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<double>(half);
}

struct Problem {
  int bits;
  int64_t groups, q_len, batch, dim, heads;
  std::vector<int64_t> lengths, cu_seqlens{0}, cu_tiles{0};
  std::vector<uint8_t> key_codes, value_codes, mask;
  std::vector<uint16_t> key_scales, value_scales;
  std::vector<float> query, tail_keys, tail_values, out, lse;
  Attention a = {};

  Problem(Random& random, int bits, std::vector<int64_t> lengths, int64_t groups, int64_t q_len, int64_t batch,
          int64_t dim, bool masked)
      : bits(bits), groups(groups), q_len(q_len), batch(batch), dim(dim), heads(lengths.size()), lengths(lengths) {
    for (int64_t length : lengths) {
      cu_seqlens.push_back(cu_seqlens.back() + length);
      cu_tiles.push_back(cu_tiles.back() + kvzip::tiles_of(length));
    }
    const int64_t rows = cu_seqlens.back(), tiles = cu_tiles.back();
    std::uniform_real_distribution<float> real(-1.0f, 1.0f);
    const auto codes = [&](std::vector<uint8_t>& to) {
      to.resize(rows * dim * bits / 8);
      for (auto& code : to) code = random();
    };
    codes(key_codes);
    codes(value_codes);
    const float step = 1.0f / ((1 << bits) - 1);
    for (int64_t i = 0; i < tiles; ++i) {
      for (int64_t d = 0; d < dim; ++d) key_scales.push_back(to_half((1.5f + real(random)) * step));
      for (int64_t d = 0; d < dim; ++d) key_scales.push_back(to_half(real(random)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      value_scales.push_back(to_half((1.5f + real(random)) * step));
      value_scales.push_back(to_half(real(random)));
    }
    if (masked) {
      for (int64_t i = 0; i < rows; ++i) mask.push_back(random() % 3 != 0);
    }
    const auto normal = [&](std::vector<float>& to, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to.push_back(real(random));
    };
    normal(query, batch * heads * groups * q_len * dim);
    normal(tail_keys, batch * heads * q_len * dim);
    normal(tail_values, batch * heads * q_len * dim);
    out.assign(query.size(), NAN);
    lse.assign(batch * heads * groups * q_len, NAN);

    a.batch = batch, a.num_heads = heads * groups, a.num_kv_heads = heads, a.q_len = q_len;
    a.head_dim = a.v_head_dim = dim;
    a.dtype = kvzip::DType::kFloat32;
    a.query = query.data();
    a.query_strides[0] = a.num_heads * q_len * dim, a.query_strides[1] = q_len * dim, a.query_strides[2] = dim;
    a.tail_keys = tail_keys.data(), a.tail_values = tail_values.data(), a.tail_length = q_len;
    for (auto* strides : {a.tail_key_strides, a.tail_value_strides}) {
      strides[0] = heads * q_len * dim, strides[1] = q_len * dim, strides[2] = dim;
    }
    a.quantized = {bits, key_codes.data(), value_codes.data(), key_scales.data(), value_scales.data(),
                   cu_seqlens.data(), cu_tiles.data(), masked ? mask.data() : nullptr, lengths[0]};
    a.scaling = 1.0f / std::sqrt(static_cast<float>(dim));
    a.out = out.data(), a.lse = lse.data();
  }

  int code(const std::vector<uint8_t>& from, int64_t row, int64_t d) const {
    if (bits == 8) return from[row * dim + d];
    const uint8_t byte = from[row * dim / 2 + d % (dim / 2)];
    return d < dim / 2 ? byte & 15 : byte >> 4;
  }

  // One output row in double: the values' weighted mean, and the log-sum-exp behind it.
  std::vector<double> exact(int64_t b, int64_t h, int64_t i) const {
    const int64_t head = h / groups;
    const float* q = query.data() + ((b * a.num_heads + h) * q_len + i) * dim;
    std::vector<double> logits;
    std::vector<std::vector<double>> values;
    for (int64_t k = 0; k < lengths[head]; ++k) {
      const int64_t row = cu_seqlens[head] + k, tile = cu_tiles[head] + k / kvzip::kTile;
      if (!mask.empty() && !mask[head * lengths[0] + k]) continue;
      double logit = 0;
      std::vector<double> value(dim);
      for (int64_t d = 0; d < dim; ++d) {
        const double scale = from_half(key_scales[tile * 2 * dim + d]), zero = from_half(key_scales[(tile * 2 + 1) * dim + d]);
        logit += q[d] * (code(key_codes, row, d) * scale + zero);
        value[d] = code(value_codes, row, d) * from_half(value_scales[2 * row]) + from_half(value_scales[2 * row + 1]);
      }
      logits.push_back(logit * a.scaling);
      values.push_back(value);
    }
    for (int64_t k = 0; k <= i; ++k) {
      const int64_t row = (b * heads + head) * q_len + k;
      double logit = 0;
      for (int64_t d = 0; d < dim; ++d) logit += q[d] * tail_keys[row * dim + d];
      logits.push_back(logit * a.scaling);
      values.emplace_back(tail_values.begin() + row * dim, tail_values.begin() + (row + 1) * dim);
    }
    double sum = 0;
    std::vector<double> result(dim + 1);
    for (size_t k = 0; k < logits.size(); ++k) {
      const double weight = std::exp(logits[k]);
      sum += weight;
      for (int64_t d = 0; d < dim; ++d) result[d] += weight * values[k][d];
    }
    for (int64_t d = 0; d < dim; ++d) result[d] /= sum;
    result[dim] = std::log(sum);
    return result;
  }

  void run(const Kernels& kernels, int64_t workers) {
    std::vector<float> space(kernels.workspace(a, workers));
    for (int64_t worker = workers - 1; worker >= 0; --worker) kernels.attend(a, worker, workers, space.data());
    kernels.merge(a, workers, space.data(), 0, batch * heads);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < a.num_heads; ++h) {
        for (int64_t i = 0; i < q_len; ++i) {
          const std::vector<double> wanted = exact(b, h, i);
          for (int64_t d = 0; d <= dim; ++d) {
            const double found = d < dim ? out[((b * q_len + i) * a.num_heads + h) * dim + d]
                                         : lse[(b * a.num_heads + h) * q_len + i];
            ++checks;
            if (!(std::abs(found - wanted[d]) <= 2e-5 * (1 + std::abs(wanted[d])))) {
              if (failures++ < 10) {
                std::printf("%s, %d bits, dim %lld, workers %lld: row %lld of head %lld is %g, not %g\n", kernels.isa,
                            bits, (long long)dim, (long long)workers, (long long)i, (long long)h, found, wanted[d]);
              }
            }
          }
        }
      }
    }
  }
};

}  // namespace

int main() {
  Random random(7);
  std::string names;
  for (const char* isa : {"avx512", "avx2", "generic"}) {
    const Kernels* kernels = kvzip::cpu_kernels(isa);
    if (kernels == nullptr) continue;
    names += std::string(" ") + isa;
    for (int bits : {8, 4}) {
      for (int64_t dim : {8, 24, 40, 64, 96, 128}) {
        for (int64_t workers : {1, 3, 8}) {
          Problem(random, bits, {70, 0, 1, 200}, 3, 2, 2, dim, false).run(*kernels, workers);
          Problem(random, bits, {130, 130}, 4, 1, 1, dim, true).run(*kernels, workers);
        }
      }
    }
  }
  std::printf("%d of %d checks failed; instruction sets:%s\n", failures, checks, names.c_str());
  return failures != 0;
}
