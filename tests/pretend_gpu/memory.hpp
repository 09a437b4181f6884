// Tensors of a CUDA device whose memory is the host's, and its generators.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/Allocator.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>

namespace {

using at::Tensor;
constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int64_t BLOCK = 512;  // bytes; what torch's allocator rounds to

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream = 0;
c10::DeviceIndex num_devices = 1;
int64_t bytes_limit = INT64_MAX;
std::atomic<int64_t> bytes_now{0}, bytes_peak{0}, num_waits{0};

void count_bytes(int64_t change) {
  const int64_t now = bytes_now += change;
  int64_t peak = bytes_peak;
  while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {
  }
}

struct Held {
  c10::Storage storage;  // the host's, which owns the bytes
  int64_t counted;
};

void let_go(void* context) {
  auto* held = static_cast<Held*>(context);
  count_bytes(-held->counted);
  delete held;
}

c10::DataPtr on_device(c10::Storage host) {
  const int64_t counted = (static_cast<int64_t>(host.nbytes()) + BLOCK - 1) / BLOCK * BLOCK;
  count_bytes(counted);
  void* bytes = host.mutable_data();
  return {bytes, new Held{std::move(host), counted}, &let_go, c10::Device(CUDA, current_device)};
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* host = c10::GetAllocator(c10::kCPU);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        bytes_now + static_cast<int64_t>(size) <= bytes_limit,
        "CUDA out of memory. Tried to allocate ", size >> 20, ".00 MiB. GPU 0 has ...");
    return on_device(c10::Storage(c10::Storage::use_byte_size_t(), size, host->allocate(size), host, false));
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    default_copy_data(to, from, size);
  }
};
DeviceMemory device_memory;

void drop_alias(void* context) {
  delete static_cast<c10::Storage*>(context);
}

Tensor as_host(const Tensor& given) {
  if (!given.defined() || !given.is_cuda()) {
    return given;
  }
  const auto& storage = given.storage();
  auto* bytes = storage.unsafeGetStorageImpl()->mutable_data();
  c10::DataPtr alias(bytes, new c10::Storage(storage), &drop_alias, c10::Device(c10::kCPU));
  c10::Storage host(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(alias), c10::GetAllocator(c10::kCPU), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(host), c10::DispatchKeySet(c10::DispatchKey::CPU), given.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(given.sizes(), given.strides(), given.storage_offset());
  if (given.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return out;
}

c10::Storage aliased_by(const c10::Storage& host) {
  const auto& pointer = host.data_ptr();
  return pointer.get_deleter() == &drop_alias ? *static_cast<c10::Storage*>(pointer.get_context()) : c10::Storage();
}

Tensor as_device(const Tensor& given) {
  if (!given.defined() || given.is_cuda()) {
    return given;
  }
  auto storage = aliased_by(given.storage());
  if (!storage) {
    const auto size = given.storage().nbytes();
    storage = c10::Storage(c10::Storage::use_byte_size_t(), size, on_device(given.storage()), &device_memory, true);
  }
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), given.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(given.sizes(), given.strides(), given.storage_offset());
  return out;
}

// What an operation did to the host's view of a tensor that it may write: `resize_` and out= make it another size.
void follow(const Tensor& given, const Tensor& host) {
  auto* impl = given.unsafeGetTensorImpl();
  if (!aliased_by(host.storage())) {
    const auto size = host.storage().nbytes();
    auto* storage = given.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(on_device(host.storage()));
    storage->set_nbytes(size);
  }
  if (given.sizes() != host.sizes() || given.strides() != host.strides() ||
      given.storage_offset() != host.storage_offset()) {
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
}

struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    TORCH_CHECK(offset == 0, "no offset here");
  }
  uint64_t get_offset() const override {
    return 0;
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device_.index());
    copy->host = host.clone();
    return copy;
  }
  at::Generator host;
};

const at::Generator& default_generator() {
  static auto generator = at::make_generator<DeviceGenerator>(0);
  return generator;
}

at::Generator host_generator(const std::optional<at::Generator>& given) {
  const auto& generator = given.has_value() && given->defined() ? *given : default_generator();
  TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", generator.device().type(), "'");
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
}

} // namespace
