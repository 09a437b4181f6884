// A CUDA device made of host memory, for a torch without CUDA: dispatcher, autograd and storages see tensors on cuda:0.

#include "guard.hpp"
#include "memory.hpp"
#include "nccl.hpp"
#include "operations.hpp"

namespace {

// torch asked for its hooks while it was imported, and keeps what it got.
void take_over_hooks() {
  static at::PretendHooks hooks;
  auto* kept = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(kept) = *reinterpret_cast<void**>(&hooks);
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(CUDA, &device_memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  take_over_hooks();
  m.def("set_num_devices", [](int count) { num_devices = static_cast<c10::DeviceIndex>(count); });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int device) { current_device = static_cast<c10::DeviceIndex>(device); });
  m.def("allocated", [] { return bytes_now.load(); });
  m.def("max_allocated", [] { return bytes_peak.load(); });
  m.def("reset_peak", [] { bytes_peak = bytes_now.load(); });
  m.def("set_limit", [](int64_t bytes) { bytes_limit = bytes; });
  m.def("num_waits", [] { return num_waits.load(); });
  m.def("default_generator", [] { return default_generator(); });
  m.def("as_host", &as_host);
  m.def("pretend_nccl", &pretend_nccl);
}
