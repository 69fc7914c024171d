// Tensors that say they are on cuda:0 and lie in the host's memory; every operator computes on the CPU, in place.
//
// A CPU build of torch has no kernels for CUDA, so that a fallback for that dispatch key sees every operator. It refuses
// what CUDA would refuse, tensors and generators of different devices, and reports what makes the host wait. Autograd,
// storages, page-locked memory and device threads are torch's own. Written against torch 2.13.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_set>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device device(CUDA, 0);

// ---- what the host waits for ----

py::object* report = nullptr;

void tell(const std::string& what) {
  py::gil_scoped_acquire gil;
  if (report != nullptr) (*report)(what);
}

// ---- memory ----

std::atomic<int64_t> allocated{0}, peak{0};

// Context of a storage on the device: the storage of the host that has the bytes.
struct Memory {
  c10::Storage host;
  int64_t bytes;
};

void release(void* context) {
  auto* memory = static_cast<Memory*>(context);
  allocated -= memory->bytes;
  delete memory;
}

c10::DataPtr on_device(const c10::Storage& host) {
  auto bytes = static_cast<int64_t>(host.nbytes());
  int64_t now = allocated += bytes, most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
  return {host.mutable_data(), new Memory{host, bytes}, release, device};
}

const c10::Storage& host_of(const c10::Storage& storage) {
  auto* memory = storage.data_ptr().cast_context<Memory>(release);
  TORCH_CHECK(memory != nullptr, "a storage of cuda:0 that was not made there");
  return memory->host;
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor_over(host_of(tensor.storage()), tensor, c10::DispatchKey::CPU);
}

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

// Page-locked memory is memory of the host that is known by its address.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    if (bytes > 0) pinned[static_cast<const char*>(memory->get())] = bytes;
    return {memory->get(), memory, &free, c10::Device(c10::DeviceType::CPU)};
  }
  static void free(void* context) {
    auto* memory = static_cast<c10::DataPtr*>(context);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(memory->get()));
    delete memory;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  const auto& [begin, bytes] = *std::prev(after);
  return data < begin + bytes;
}

// ---- the device, as torch asks for it ----

// A generator of the device draws what one of the host does.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(at::Generator host)
      : GeneratorImpl(c10::Device(CUDA, 0), c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(host.clone()); }
  at::Generator host;
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
  }
};

// torch has made its own hooks, which know no CUDA, before this is loaded. They hold nothing but their functions.
void replace_hooks() {
  static Hooks hooks;
  static_assert(sizeof(hooks) == sizeof(void*));
  std::memcpy(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()), static_cast<void*>(&hooks), sizeof(hooks));
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return device; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- operators ----

// Arguments become tensors of the host over the same bytes, results tensors of the device over theirs.
struct Call {
  explicit Call(const c10::OperatorHandle& op)
      : name(op.schema().name()),
        // What CUDA takes from the host: numbers in elementwise operators, and those that are put somewhere.
        takes_numbers(
            op.hasTag(at::Tag::pointwise) || name.rfind("aten::_foreach", 0) == 0 || name == "aten::fill_" ||
            name == "aten::_index_put_impl_") {}

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      mixed |= tensor.dim() > 0 || !takes_numbers;
      return tensor;
    }
    passed.emplace_back(tensor, on_host(tensor));
    return passed.back().second;
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(to_host(tensor));
      return tensors;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const auto& each : value.toOptionalTensorVector())
        tensors.push_back(each.has_value() ? std::optional<at::Tensor>(to_host(*each)) : std::nullopt);
      return tensors;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::DeviceType::CPU);
    if (value.isStorage() && value.toStorage().device().is_cuda()) {
      storages.push_back(value.toStorage());
      return host_of(value.toStorage());
    }
    if (value.isGenerator()) {
      auto generator = value.toGenerator();
      auto* ours = dynamic_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl());
      TORCH_CHECK(ours != nullptr, name, " on cuda:0: expected a generator of it, found one of the CPU");
      return ours->host;
    }
    return value;
  }

  c10::Storage storage_over(const c10::Storage& host) {
    for (const auto& storage : storages)
      if (host_of(storage).is_alias_of(host)) return storage;
    for (const auto& [original, made] : passed)
      if (host_of(original.storage()).is_alias_of(host)) return original.storage();
    return {c10::Storage::use_byte_size_t(), host.nbytes(), on_device(host)};
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(to_device(tensor).toTensor());
      return tensors;
    }
    if (!value.isTensor() || !value.toTensor().defined()) return value;
    auto host = value.toTensor();
    for (const auto& [original, made] : passed)
      if (host.is_same(made)) return original;
    return tensor_over(storage_over(host.storage()), host, c10::DispatchKey::CUDA);
  }

  // Where the operator gave an argument another storage, more memory or another shape.
  void keep_changes() {
    for (const auto& [original, made] : passed) {
      auto* impl = original.unsafeGetTensorImpl();
      auto& host = host_of(original.storage());
      if (!made.storage().is_alias_of(host)) {
        impl->set_storage_keep_dtype(storage_over(made.storage()));
      } else if (host.data() != original.storage().data() || host.nbytes() != original.storage().nbytes()) {
        auto* storage = original.storage().unsafeGetStorageImpl();
        auto bytes = host.nbytes();
        storage->set_data_ptr_noswap(on_device(host));
        storage->set_nbytes(bytes);
      }
      if (original.sizes() != made.sizes() || original.strides() != made.strides() ||
          original.storage_offset() != made.storage_offset())
        impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    }
  }

  std::string name;
  bool takes_numbers;
  bool mixed = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> passed;
  std::vector<c10::Storage> storages;
};

// Their results have sizes that depend on values, or are values.
const std::unordered_set<std::string> READS{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive",
    "aten::unique_dim", "aten::bincount", "aten::equal"};

void tell_of_copy(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_cuda() == from.is_cuda() || to.numel() == 0) return;
  auto* bytes = (to.is_cuda() ? from : to).storage().data();
  if (!non_blocking || !is_pinned(bytes)) tell(to.is_cuda() ? "copy from ordinary memory" : "copy to the host");
}

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::optional<c10::InferenceMode> plain;
  if (c10::InferenceMode::is_enabled()) plain.emplace(false);  // tensors made in it cannot be viewed on the host
  Call call(op);
  auto arguments = torch::jit::pop(*stack, op.schema().arguments().size());
  if (call.name == "aten::record_stream") return;
  bool copies = call.name == "aten::copy_";
  for (const auto& value : arguments) stack->push_back(call.to_host(value));
  TORCH_CHECK(
      !call.mixed || call.passed.empty() || copies, call.name, ": expected all tensors on cuda:0, found one on the CPU");
  if (copies) tell_of_copy(arguments[0].toTensor(), arguments[1].toTensor(), arguments[2].toBool());
  if (READS.count(call.name) > 0) tell(call.name);
  op.callBoxed(stack);
  call.keep_changes();
  if (copies && !arguments[0].toTensor().is_cuda()) return;
  for (auto& value : torch::jit::pop(*stack, op.schema().returns().size())) stack->push_back(call.to_device(value));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Registered for every device, with a kernel of each behind it.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

// ---- collectives ----

// NCCL, played by gloo on the same bytes.
struct Nccl final : c10d::Backend {
  using Tensors = std::vector<at::Tensor>;
  using Work = c10::intrusive_ptr<c10d::Work>;

  Nccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo(std::move(gloo)) {}
  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  static at::Tensor host(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), "NCCL takes contiguous tensors of a CUDA device");
    return on_host(tensor);
  }
  static Tensors host(const Tensors& tensors) {
    Tensors made;
    for (const auto& tensor : tensors) made.push_back(host(tensor));
    return made;
  }
  static std::vector<Tensors> host(const std::vector<Tensors>& lists) {
    std::vector<Tensors> made;
    for (const auto& tensors : lists) made.push_back(host(tensors));
    return made;
  }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto t = host(tensors);
    return gloo->broadcast(t, options);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto t = host(tensors);
    return gloo->allreduce(t, options);
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto t = host(tensors);
    return gloo->allreduce_coalesced(t, options);
  }
  Work allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) override {
    auto t = host(to);
    auto f = host(from);
    return gloo->allgather(t, f, options);
  }
  Work _allgather_base(at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& options) override {
    auto t = host(to), f = host(from);
    return gloo->_allgather_base(t, f, options);
  }
  Work _reduce_scatter_base(at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& options) override {
    auto t = host(to), f = host(from);
    return gloo->_reduce_scatter_base(t, f, options);
  }
  Work allgather_into_tensor_coalesced(Tensors& to, Tensors& from, const c10d::AllgatherOptions& options) override {
    auto t = host(to), f = host(from);
    return gloo->allgather_into_tensor_coalesced(t, f, options);
  }
  Work reduce_scatter_tensor_coalesced(Tensors& to, Tensors& from, const c10d::ReduceScatterOptions& options) override {
    auto t = host(to), f = host(from);
    return gloo->reduce_scatter_tensor_coalesced(t, f, options);
  }
  Work gather(std::vector<Tensors>& to, Tensors& from, const c10d::GatherOptions& options) override {
    auto t = host(to);
    auto f = host(from);
    return gloo->gather(t, f, options);
  }
  Work scatter(Tensors& to, std::vector<Tensors>& from, const c10d::ScatterOptions& options) override {
    auto t = host(to);
    auto f = host(from);
    return gloo->scatter(t, f, options);
  }
  Work alltoall_base(
      at::Tensor& to, at::Tensor& from, std::vector<int64_t>& received, std::vector<int64_t>& sent,
      const c10d::AllToAllOptions& options) override {
    auto t = host(to), f = host(from);
    return gloo->alltoall_base(t, f, received, sent, options);
  }
  Work send(Tensors& tensors, int rank, int tag) override {
    auto t = host(tensors);
    return gloo->send(t, rank, tag);
  }
  Work recv(Tensors& tensors, int rank, int tag) override {
    auto t = host(tensors);
    return gloo->recv(t, rank, tag);
  }
  Work barrier(const c10d::BarrierOptions& options) override { return gloo->barrier(options); }

  c10::intrusive_ptr<c10d::Backend> gloo;
};

}  // namespace

PYBIND11_MODULE(pretended_cuda_extension, m) {
  replace_hooks();
  m.def("set_report", [](py::object callable) { report = new py::object(std::move(callable)); });
  m.def("on_host", &on_host, "The same bytes as a tensor of the CPU.");
  m.def("allocated", [] { return allocated.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = allocated.load(); });
  py::class_<Nccl, c10d::Backend, c10::intrusive_ptr<Nccl>>(m, "Nccl")
      .def(py::init([](py::object store, int rank, int size, py::object) {
        auto gloo = py::module_::import("torch.distributed").attr("ProcessGroupGloo")(store, rank, size);
        return c10::make_intrusive<Nccl>(gloo.cast<c10::intrusive_ptr<c10d::Backend>>(), rank, size);
      }));
}
