// NCCL's interface over gloo, which refuses what NCCL refuses.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "memory.hpp"

namespace {

using Tensors = std::vector<Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

Tensor for_nccl(const Tensor& given) {
  TORCH_CHECK(given.is_cuda(), "No backend type associated with device type ", given.device().type(), " (NCCL)");
  TORCH_CHECK(given.is_contiguous() || given.is_non_overlapping_and_dense(), "Tensors must be contiguous (NCCL)");
  const auto type = given.scalar_type();
  TORCH_CHECK(
      type != at::kShort && !at::isComplexType(type), "Unconvertible NCCL type ", c10::toString(type));
  return as_host(given);
}

Tensors for_nccl(const Tensors& given) {
  Tensors hosts;
  for (const auto& one : given) {
    hosts.push_back(for_nccl(one));
  }
  return hosts;
}

std::vector<Tensors> for_nccl(const std::vector<Tensors>& given) {
  std::vector<Tensors> hosts;
  for (const auto& one : given) {
    hosts.push_back(for_nccl(one));
  }
  return hosts;
}

struct Done final : c10d::Work {
  bool isCompleted() override {
    return true;
  }
  bool isSuccess() const override {
    return true;
  }
  bool wait(std::chrono::milliseconds) override {
    return true;
  }
};

struct Several final : c10d::Work {
  explicit Several(std::vector<WorkPtr> parts) : parts_(std::move(parts)) {}
  bool wait(std::chrono::milliseconds timeout) override {
    for (auto& part : parts_) {
      part->wait(timeout);
    }
    return true;
  }
  std::vector<WorkPtr> parts_;
};

// NCCL's interface over gloo. `wait` waits, where NCCL's makes the stream wait.
struct PretendNccl final : c10d::Backend {
  explicit PretendNccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override {
    return "nccl";
  }
  bool supportsCoalescing() const override {
    return true;
  }
  void startCoalescing() override {
    collecting_ = true;
  }
  WorkPtr endCoalescing() override {
    collecting_ = false;
    return c10::make_intrusive<Several>(std::exchange(collected_, {}));
  }
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto hosts = for_nccl(tensors);
    return issue(gloo_->broadcast(hosts, options));
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto hosts = for_nccl(tensors);
    if (options.reduceOp != c10d::ReduceOp::AVG) {
      return issue(gloo_->allreduce(hosts, options));
    }
    auto sums = options;
    sums.reduceOp = c10d::ReduceOp::SUM;
    gloo_->allreduce(hosts, sums)->wait();
    for (auto& host : hosts) {
      host.div_(getSize());
    }
    return issue(c10::make_intrusive<Done>());
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    std::vector<WorkPtr> parts;
    for (auto& tensor : tensors) {
      Tensors one{tensor};
      parts.push_back(allreduce(one, options));
    }
    return c10::make_intrusive<Several>(std::move(parts));
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto hosts = for_nccl(tensors);
    return issue(gloo_->reduce(hosts, options));
  }
  WorkPtr allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = for_nccl(outputs);
    auto from = for_nccl(inputs);
    return issue(gloo_->allgather(to, from, options));
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = for_nccl(output), from = for_nccl(input);
    return issue(gloo_->_allgather_base(to, from, options));
  }
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    std::vector<WorkPtr> parts;
    for (size_t i = 0; i < outputs.size(); ++i) {
      parts.push_back(_allgather_base(outputs[i], inputs[i], options));
    }
    return c10::make_intrusive<Several>(std::move(parts));
  }
  WorkPtr reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = for_nccl(outputs);
    auto from = for_nccl(inputs);
    return issue(gloo_->reduce_scatter(to, from, options));
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto to = for_nccl(output), from = for_nccl(input);
    if (options.reduceOp != c10d::ReduceOp::AVG) {
      return issue(gloo_->_reduce_scatter_base(to, from, options));
    }
    auto sums = options;
    sums.reduceOp = c10d::ReduceOp::SUM;
    gloo_->_reduce_scatter_base(to, from, sums)->wait();
    to.div_(getSize());
    return issue(c10::make_intrusive<Done>());
  }
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    std::vector<WorkPtr> parts;
    for (size_t i = 0; i < outputs.size(); ++i) {
      parts.push_back(_reduce_scatter_base(outputs[i], inputs[i], options));
    }
    return c10::make_intrusive<Several>(std::move(parts));
  }
  WorkPtr alltoall_base(
      Tensor& output,
      Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto to = for_nccl(output), from = for_nccl(input);
    return issue(gloo_->alltoall_base(to, from, output_sizes, input_sizes, options));
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto hosts = for_nccl(tensors);
    return issue(gloo_->send(hosts, to, tag));
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto hosts = for_nccl(tensors);
    return issue(gloo_->recv(hosts, from, tag));
  }
  WorkPtr gather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = for_nccl(outputs);
    auto from = for_nccl(inputs);
    return issue(gloo_->gather(to, from, options));
  }
  WorkPtr scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    auto to = for_nccl(outputs);
    auto from = for_nccl(inputs);
    return issue(gloo_->scatter(to, from, options));
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    auto plain = options;
    plain.device_ids.clear();
    plain.device = std::nullopt;
    return issue(gloo_->barrier(plain));
  }
  void setSequenceNumberForGroup() override {
    gloo_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo_->getSequenceNumberForGroup();
  }
  // Waits for all processes of the group, as NCCL does.
  void shutdown() override {
    gloo_->barrier(c10d::BarrierOptions())->wait();
  }
  void setTimeout(std::chrono::milliseconds timeout) override {
    gloo_->setTimeout(timeout);
  }

 private:
  WorkPtr issue(WorkPtr work) {
    if (collecting_) {
      collected_.push_back(work);
    }
    return work;
  }
  c10::intrusive_ptr<c10d::Backend> gloo_;
  bool collecting_ = false;
  std::vector<WorkPtr> collected_;
};

c10::intrusive_ptr<c10d::Backend> pretend_nccl(c10::intrusive_ptr<c10d::Backend> gloo) {
  return c10::make_intrusive<PretendNccl>(std::move(gloo));
}

} // namespace
