// Random quantised rows of a case, and the keys and values that they stand for.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "dispatch.cuh"

namespace kvzip {
namespace test {

class CodedRows {
 public:
  CodedRows(int bits, int head_dim, const std::vector<int64_t>& lengths, bool has_mask, std::mt19937& random)
      : bits_(bits), head_dim_(head_dim) {
    for (const int64_t length : lengths) {
      cu_seqlens_.push_back(cu_seqlens_.back() + length);
      cu_tiles_.push_back(cu_tiles_.back() + tiles_of(length));
    }
    const int64_t rows = cu_seqlens_.back(), tiles = cu_tiles_.back();
    std::uniform_real_distribution<float> uniform;
    // A range of about 3 is that of normal numbers; channel 1 of the last head's keys is an outlier.
    const auto scale = [&](bool wide) { return (wide ? 60 : 3) * (0.5f + uniform(random)) / (1 << bits); };
    const auto zero = [&](bool wide) { return (wide ? -60 : -1.5f) * (0.5f + uniform(random)); };
    for (int64_t i = 0; i < tiles * 2 * head_dim; ++i) {
      const bool wide = i % head_dim == 1 && i >= cu_tiles_[lengths.size() - 1] * 2 * head_dim;
      key_scales_.push_back(emulation::to_float16(i / head_dim % 2 == 0 ? scale(wide) : zero(wide)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      value_scales_.push_back(emulation::to_float16(scale(false)));
      value_scales_.push_back(emulation::to_float16(zero(false)));
    }
    for (std::vector<uint8_t>* codes : {&key_codes_, &value_codes_}) {
      for (int64_t i = 0; i < rows * head_dim * bits / 8; ++i) codes->push_back(static_cast<uint8_t>(random()));
    }
    if (has_mask && rows > 0) {
      mask_length_ = lengths[0];
      for (int64_t i = 0; i < rows; ++i) mask_.push_back(random() % 3 != 0);
      for (int64_t i = 0; i < lengths[0]; ++i) mask_[i] = i >= 70 && mask_[i];  // a whole tile, too
      for (int64_t i = 0; i < rows; ++i) {
        if (!mask_[i]) value_scales_[2 * i] = value_scales_[2 * i + 1] = 0x7e00;  // NaN
      }
    }
  }

  // Makes everything of a head NaN.
  void poison(int head) {
    for (int64_t i = cu_tiles_[head] * 2 * head_dim_; i < cu_tiles_[head + 1] * 2 * head_dim_; ++i)
      key_scales_[i] = 0x7e00;
    for (int64_t i = cu_seqlens_[head] * 2; i < cu_seqlens_[head + 1] * 2; ++i) value_scales_[i] = 0x7e00;
  }

  Quantized params() const {
    Quantized q{};
    if (cu_seqlens_.back() == 0) return q;
    q.bits = bits_;
    q.rows.cu_seqlens = cu_seqlens_.data(), q.rows.cu_tiles = cu_tiles_.data();
    if (!mask_.empty()) q.rows.mask = mask_.data(), q.rows.mask_length = mask_length_;
    q.key_codes = readable(key_codes_), q.value_codes = readable(value_codes_);
    q.key_scales = readable(key_scales_), q.value_scales = readable(value_scales_);
    return q;
  }

  int64_t begin(int head) const { return cu_seqlens_[head]; }
  int64_t end(int head) const { return cu_seqlens_[head + 1]; }
  bool is_visible(int64_t row) const { return mask_.empty() || mask_[row]; }
  double key(int head, int64_t row, int k) const {
    const int64_t tile = cu_tiles_[head] + (row - cu_seqlens_[head]) / kTile;
    const uint16_t* pair = &key_scales_[tile * 2 * head_dim_ + k];
    return affine(code(key_codes_, row, k), pair[0], pair[head_dim_]);
  }
  double value(int64_t row, int k) const {
    return affine(code(value_codes_, row, k), value_scales_[2 * row], value_scales_[2 * row + 1]);
  }

 private:
  template <typename T>
  static const T* readable(const std::vector<T>& data) {
    emulation::allow_reads(data.data(), data.size() * sizeof(T));
    return data.data();
  }
  static double affine(int code, uint16_t scale, uint16_t zero) {
    return code * static_cast<double>(emulation::from_float16(scale)) + emulation::from_float16(zero);
  }
  int code(const std::vector<uint8_t>& codes, int64_t row, int k) const {
    if (bits_ == 8) return codes[row * head_dim_ + k];
    const int half = head_dim_ / 2, byte = codes[row * half + k % half];
    return k < half ? byte & 15 : byte >> 4;
  }

  int bits_, head_dim_;
  int64_t mask_length_ = 0;
  std::vector<int64_t> cu_seqlens_{0}, cu_tiles_{0};
  std::vector<uint8_t> key_codes_, value_codes_, mask_;
  std::vector<uint16_t> key_scales_, value_scales_;
};

}  // namespace test
}  // namespace kvzip
