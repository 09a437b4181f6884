// Operations: those that know of storages have kernels here, all others run the CPU's on the same bytes.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "memory.hpp"

namespace {

std::optional<at::Device> with_index(std::optional<at::Device> device) {
  return device.has_value() && device->has_index() ? device : std::nullopt;
}

Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(with_index(device));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(with_index(device));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  num_waits += !self.is_cuda() || !source.is_cuda();
  auto host = as_host(self);
  host.copy_(as_host(source));
  return self;
}

at::Scalar read_scalar(const Tensor& self) {
  ++num_waits;
  return at::native::_local_scalar_dense_cpu(as_host(self));
}

Tensor& set_storage(
    Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device_type() == CUDA, "set_: a storage of the host for a tensor of the device");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto given = C10_AS_INTARRAYREF_SLOW(stride);
  const c10::DimVector strides =
      given.empty() ? c10::contiguous_strides(sizes) : c10::DimVector(given.begin(), given.end());
  impl->set_sizes_and_strides(sizes, strides, offset.guard_int(__FILE__, __LINE__));
  return self;
}

Tensor& set_source(Tensor& self, c10::Storage source) {
  const int64_t size = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(source), 0, c10::SymInt(size), {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true);
  return set_storage(self, std::move(none), 0, c10::SymInt(0), {});
}

// One call of an operation: its arguments as the host's, its results as the device's.
class HostCall {
 public:
  explicit HostCall(const c10::FunctionSchema& schema) : schema_(schema) {}

  c10::IValue to_host(const c10::Argument& argument, const c10::IValue& value) {
    const bool writes = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      return to_host(value.toTensor(), writes);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const auto& one : value.toTensorVector()) {
        hosts.push_back(to_host(one, writes));
      }
      return hosts;
    }
    if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
      c10::List<std::optional<Tensor>> hosts;
      for (const c10::IValue& one : value.toListRef()) {
        hosts.push_back(one.isNone() ? std::nullopt : std::optional(to_host(one.toTensor(), writes)));
      }
      return hosts;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      return c10::Device(c10::kCPU);
    }
    if (argument.name() == "generator") {
      return host_generator(value.isNone() ? std::nullopt : std::optional(value.toGenerator()));
    }
    return argument.name() == "pin_memory" ? c10::IValue() : value;
  }

  c10::IValue to_device(const c10::IValue& value) const {
    if (value.isTensor()) {
      return to_device(value.toTensor());
    }
    if (!value.isTensorList()) {
      return value;
    }
    c10::List<Tensor> devices;
    for (const auto& one : value.toTensorVector()) {
      devices.push_back(to_device(one));
    }
    return devices;
  }

  // A tensor without dimensions counts as a number, and indices may lie on the host.
  void check_places() const {
    const auto& name = schema_.name();
    const bool is_index = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
    for (const auto& one : given_) {
      TORCH_CHECK(
          is_index || !one.defined() || one.dim() == 0 || one.is_cuda(), name,
          ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
    }
  }

  void follow_writes() const {
    for (const auto& [given, host] : written_) {
      follow(given, host);
    }
  }

 private:
  Tensor to_host(const Tensor& given, bool writes) {
    given_.push_back(given);
    auto host = as_host(given);
    if (writes && given.defined()) {
      written_.emplace_back(given, host);
    }
    return host;
  }

  // What was written goes back as it came.
  Tensor to_device(const Tensor& host) const {
    for (const auto& [given, its_host] : written_) {
      if (its_host.is_same(host)) {
        return given;
      }
    }
    return as_device(host);
  }

  const c10::FunctionSchema& schema_;
  std::vector<Tensor> given_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  HostCall call(schema);
  auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    stack->push_back(call.to_host(schema.arguments()[i], arguments[i]));
  }
  call.check_places();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.follow_writes();
  for (auto& result : torch::jit::pop(*stack, schema.returns().size())) {
    stack->push_back(call.to_device(result));
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &read_scalar);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
}

int64_t choose_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool causal, std::optional<double> scale, bool shared) {
  return at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, shared);
}

} // namespace
