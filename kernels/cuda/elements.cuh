// How the kernels read and write the elements of tensors in global memory.
#pragma once
#include "layout.cuh"

// One element of a tensor of elements.
template <class C>
DEVICE typename Element<C::TYPE>::Bits load_element(const void* tensor, i64 index) {
  if constexpr (sizeof(typename Element<C::TYPE>::Bits) == 2)
    return device::load_global16((const u16*)tensor + index);
  else
    return device::load_global32((const u32*)tensor + index);
}
template <class C>
DEVICE void store_element(void* tensor, i64 index, typename Element<C::TYPE>::Bits v) {
  if constexpr (sizeof(v) == 2)
    device::store_global16((u16*)tensor + index, v);
  else
    device::store_global32((u32*)tensor + index, v);
}

// One number of a tensor of elements, or of float32 if `is_float`; in two steps, so that others can
// be loaded before this one has come, or in one.
template <class C>
DEVICE u32 load_bits(const void* tensor, int is_float, i64 index) {
  if (is_float) return device::load_global32((const u32*)tensor + index);
  return load_element<C>(tensor, index);
}
template <class C>
DEVICE float number_of(u32 bits, int is_float) {
  if (is_float) return device::float_of(bits);
  return device::to_float<C::TYPE>((typename Element<C::TYPE>::Bits)bits);
}
template <class C>
DEVICE float load_number(const void* tensor, int is_float, i64 index) {
  return number_of<C>(load_bits<C>(tensor, is_float, index), is_float);
}
template <class C>
DEVICE void store_number(void* tensor, int is_float, i64 index, float v) {
  if (is_float)
    device::store_global32((u32*)tensor + index, device::bits_of(v));
  else
    store_element<C>(tensor, index, device::from_float<C::TYPE>(v));
}

// The first row of step t among all rows of the sequence.
template <class C>
DEVICE i64 first_row(const Modifiers& modifiers, int t, int batch) {
  if constexpr (C::PACKED) {
    const Words2 row = device::load_global64(modifiers.step_rows + t);
    return (i64)((u64)row.y << 32 | row.x);
  }
  return (i64)t * batch;
}
