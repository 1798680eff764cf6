// One call of an op with random tensors: its inputs, its exact result in float64, and what 16-bit arithmetic costs.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "codes.h"

namespace kvzip {
namespace test {

struct Case {
  const char* name;
  DType dtype = DType::kBFloat16;
  int head_dim = 128, batch = 1, kv_heads = 2, groups = 4, q_len = 1;
  std::vector<int64_t> lengths;  // of the context's heads; empty = no context
  int64_t tail_length = 1, capacity = 70;
  bool cursor = false, skip = false, mask = false, sinks = false, scattered = false;
  float softcap = 0.0f, scaling = 0.09f;
  int resident = 5, depth = 3;
  int poisoned_head = -1;  // whose context and tail hold NaN and Inf
  int bits = 8;
  std::vector<int64_t> coded;  // lengths of the heads' quantised rows; empty = there are none
};

// A tensor of 16- or 32-bit floats; reads and writes are rounded to its dtype.
class Tensor {
 public:
  Tensor(DType dtype, size_t size) : dtype_(dtype), bytes_(size * item_bytes(dtype) + 16) {
    offset_ = (16 - reinterpret_cast<uintptr_t>(bytes_.data()) % 16) % 16;
    for (size_t i = 0; i < size; ++i) set(i, NAN);
  }
  static size_t item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
  size_t size() const { return (bytes_.size() - 16) / item_bytes(dtype_); }
  void* data() { return bytes_.data() + offset_; }
  const void* data() const { return bytes_.data() + offset_; }
  void set(size_t i, float x) {
    if (dtype_ == DType::kFloat32) {
      static_cast<float*>(data())[i] = x;
    } else {
      static_cast<uint16_t*>(data())[i] =
          dtype_ == DType::kFloat16 ? emulation::to_float16(x) : emulation::to_bfloat16(x);
    }
  }
  float get(size_t i) const {
    if (dtype_ == DType::kFloat32) return static_cast<const float*>(data())[i];
    const uint16_t bits = static_cast<const uint16_t*>(data())[i];
    return dtype_ == DType::kFloat16 ? emulation::from_float16(bits) : emulation::from_bfloat16(bits);
  }
  float rounded(float x) const {
    if (dtype_ == DType::kFloat32) return x;
    return dtype_ == DType::kFloat16 ? emulation::from_float16(emulation::to_float16(x))
                                     : emulation::from_bfloat16(emulation::to_bfloat16(x));
  }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
  size_t offset_;
};

struct Result {
  std::vector<double> output, lse;
};

// Tensors of a case and the pointers to them.
class Call {
 public:
  Call(const Case& c, unsigned seed);
  AttendParams params();
  Result exact() const;     // float64
  Result baseline() const;  // float32 accumulation, probabilities and output rounded to the dtype: a fused SDPA

 private:
  template <typename Real, bool kRounds>
  Result attend() const;
  int64_t query_index(int b, int h, int i) const;
  int64_t tail_index(int b, int h, int64_t j) const;

  Case c_;
  int64_t total_ = 0;
  Tensor query_, keys_, values_, tail_keys_, tail_values_, sinks_;
  Strides query_strides_, tail_strides_;
  std::vector<int64_t> cu_seqlens_{0}, cu_tiles_{0}, cursor_, skip_;
  std::vector<uint8_t> mask_;
  std::mt19937 random_;
  CodedRows coded_;
};

inline int64_t total(const std::vector<int64_t>& lengths) {
  int64_t sum = 0;
  for (const int64_t length : lengths) sum += length;
  return sum;
}

inline Call::Call(const Case& c, unsigned seed)
    : c_(c),
      total_(total(c.lengths)),
      query_(c.dtype, static_cast<size_t>(c.batch) * c.kv_heads * c.groups * c.q_len * c.head_dim),
      keys_(c.dtype, total_ * c.head_dim),
      values_(c.dtype, total_ * c.head_dim),
      tail_keys_(c.dtype, c.batch * c.kv_heads * c.capacity * c.head_dim),
      tail_values_(c.dtype, c.batch * c.kv_heads * c.capacity * c.head_dim),
      sinks_(c.dtype, c.kv_heads * c.groups),
      random_(seed),
      coded_(c.bits, c.head_dim, c.coded.empty() ? std::vector<int64_t>(c.kv_heads) : c.coded, c.mask, random_) {
  std::mt19937& random = random_;
  std::normal_distribution<float> normal;
  const int64_t d = c.head_dim, query_heads = c.kv_heads * c.groups;
  // Scattered: (batch, tokens, heads, head_dim) in memory, else (batch, heads, tokens, head_dim).
  query_strides_ = c.scattered ? Strides{c.q_len * query_heads * d, d, query_heads * d}
                               : Strides{c.q_len * query_heads * d, c.q_len * d, d};
  tail_strides_ = c.scattered ? Strides{c.capacity * c.kv_heads * d, d, c.kv_heads * d}
                              : Strides{c.capacity * c.kv_heads * d, c.capacity * d, d};
  for (Tensor* tensor : {&query_, &keys_, &values_, &sinks_}) {
    for (size_t i = 0; i < tensor->size(); ++i) tensor->set(i, normal(random));
  }
  for (const int64_t length : c.lengths) {
    cu_seqlens_.push_back(cu_seqlens_.back() + length);
    cu_tiles_.push_back(cu_tiles_.back() + tiles_of(length));
  }
  cursor_ = {c.tail_length};
  for (int b = 0; b < c.batch; ++b) {
    const int64_t begin = b % 3 == 2 ? 0 : b % 2, end = b % 3 == 1 ? begin : begin + 3 + 17 * b;
    skip_.push_back(begin), skip_.push_back(end);
    for (int h = 0; h < c.kv_heads; ++h) {
      for (int64_t j = 0; j < c.tail_length; ++j) {     // what lies beyond stays NaN
        if (c.skip && j >= begin && j < end) continue;  // as does what is skipped
        for (int64_t k = 0; k < d; ++k) {
          tail_keys_.set(tail_index(b, h, j) + k, normal(random));
          tail_values_.set(tail_index(b, h, j) + k, normal(random));
        }
      }
    }
  }
  if (c.mask) {
    for (int64_t i = 0; i < total_; ++i) mask_.push_back(random() % 3 != 0);
    for (int64_t i = 0; i < c.lengths[0]; ++i) mask_[i] = i >= 20 && mask_[i];  // one whole warp's keys, too
    for (int64_t i = 0; i < total_; ++i) {
      for (int64_t k = 0; !mask_[i] && k < d; ++k) keys_.set(i * d + k, INFINITY), values_.set(i * d + k, NAN);
    }
  }
  if (c.poisoned_head >= 0) {
    const int h = c.poisoned_head;
    for (int64_t i = cu_seqlens_[h] * d; i < cu_seqlens_[h + 1] * d; ++i) {
      keys_.set(i, i % 2 ? NAN : INFINITY);
      values_.set(i, NAN);
    }
    for (int64_t k = 0; k < d; ++k) tail_values_.set(tail_index(0, h, c.tail_length - 1) + k, NAN);
    coded_.poison(h);
  }
}

inline int64_t Call::query_index(int b, int h, int i) const {
  return b * query_strides_.batch + h * query_strides_.head + i * query_strides_.token;
}

inline int64_t Call::tail_index(int b, int h, int64_t j) const {
  return b * tail_strides_.batch + h * tail_strides_.head + j * tail_strides_.token;
}

inline AttendParams Call::params() {
  AttendParams p{};
  p.dtype = c_.dtype;
  p.query = query_.data(), p.query_strides = query_strides_;
  if (total_ > 0) {
    p.keys = keys_.data(), p.values = values_.data();
    p.context.cu_seqlens = cu_seqlens_.data(), p.context.cu_tiles = cu_tiles_.data();
    if (c_.mask) p.context.mask = mask_.data(), p.context.mask_length = c_.lengths[0];
  }
  p.quantized = coded_.params();
  p.tail_keys = tail_keys_.data(), p.tail_values = tail_values_.data();
  p.tail_key_strides = p.tail_value_strides = tail_strides_;
  p.capacity = c_.capacity;
  p.tail_length = c_.cursor ? -1 : c_.tail_length;
  if (c_.cursor) p.tail_cursor = cursor_.data();
  if (c_.skip) p.tail_skip = skip_.data();
  if (c_.sinks) p.sinks = sinks_.data(), p.sinks_dtype = c_.dtype;
  p.scaling = c_.scaling, p.softcap = c_.softcap;
  p.batch = c_.batch, p.kv_heads = c_.kv_heads, p.groups = c_.groups, p.q_len = c_.q_len;
  p.context.depth = p.quantized.rows.depth = c_.depth;
  for (const Tensor* tensor : {&keys_, &values_, &tail_keys_, &tail_values_}) {
    emulation::allow_reads(tensor->data(), tensor->size() * Tensor::item_bytes(c_.dtype));
  }
  return p;
}

template <typename Real, bool kRounds>
Result Call::attend() const {
  const int query_heads = c_.kv_heads * c_.groups;
  Result result;
  result.output.assign(static_cast<size_t>(c_.batch) * c_.q_len * query_heads * c_.head_dim, 0.0);
  result.lse.assign(static_cast<size_t>(c_.batch) * query_heads * c_.q_len, -INFINITY);
  for (int b = 0; b < c_.batch; ++b) {
    for (int hq = 0; hq < query_heads; ++hq) {
      for (int i = 0; i < c_.q_len; ++i) {
        const int h = hq / c_.groups;
        std::vector<Real> logits, values;
        const auto see = [&](const auto& key, const auto& value) {
          Real logit = 0;
          for (int k = 0; k < c_.head_dim; ++k) {
            logit += static_cast<Real>(query_.get(query_index(b, hq, i) + k)) * static_cast<Real>(key(k));
            values.push_back(static_cast<Real>(value(k)));
          }
          logit *= static_cast<Real>(c_.scaling);
          if (c_.softcap != 0.0f) logit = c_.softcap * std::tanh(logit / static_cast<Real>(c_.softcap));
          logits.push_back(logit);
        };
        const auto see_row = [&](const Tensor& keys, const Tensor& values, int64_t index) {
          see([&](int k) { return keys.get(index + k); }, [&](int k) { return values.get(index + k); });
        };
        for (int64_t j = total_ > 0 ? cu_seqlens_[h] : 0; total_ > 0 && j < cu_seqlens_[h + 1]; ++j) {
          if (!c_.mask || mask_[j]) see_row(keys_, values_, j * c_.head_dim);
        }
        for (int64_t j = coded_.begin(h); j < coded_.end(h); ++j) {
          if (!coded_.is_visible(j)) continue;
          see([&](int k) { return coded_.key(h, j, k); }, [&](int k) { return coded_.value(j, k); });
        }
        for (int64_t j = 0; j <= c_.tail_length - c_.q_len + i; ++j) {
          if (c_.skip && j >= skip_[2 * b] && j < skip_[2 * b + 1]) continue;
          see_row(tail_keys_, tail_values_, tail_index(b, h, j));
        }
        if (logits.empty()) continue;
        Real largest = -INFINITY, sum = 0;
        for (const Real logit : logits) largest = std::fmax(largest, logit);
        std::vector<Real> output(c_.head_dim, 0);
        for (size_t n = 0; n < logits.size(); ++n) {
          const Real weight = std::exp(logits[n] - largest);
          sum += weight;
          const Real used = kRounds ? static_cast<Real>(query_.rounded(static_cast<float>(weight))) : weight;
          for (int k = 0; k < c_.head_dim; ++k) output[k] += used * values[n * c_.head_dim + k];
        }
        const Real lse = largest + std::log(sum);
        Real share = 1 / sum;
        if (c_.sinks) share /= 1 + std::exp(static_cast<Real>(sinks_.get(hq)) - lse);
        const size_t to = ((static_cast<size_t>(b) * c_.q_len + i) * query_heads + hq) * c_.head_dim;
        for (int k = 0; k < c_.head_dim; ++k) {
          result.output[to + k] = kRounds ? query_.rounded(static_cast<float>(output[k] * share)) : output[k] * share;
        }
        result.lse[(static_cast<size_t>(b) * query_heads + hq) * c_.q_len + i] = lse;
      }
    }
  }
  return result;
}

inline Result Call::exact() const { return attend<double, false>(); }
inline Result Call::baseline() const { return attend<float, true>(); }

}  // namespace test
}  // namespace kvzip
