"""CUDA without a GPU: what code does on "cuda" can be walked, counted and, in real numbers, compared.

`fake_cuda`: tensors on cuda:0 have shapes, types and layouts but no numbers. torch's own dispatch runs (autocast,
autograd, device checks), so a mismatch of devices raises, and every operator and wait of the host is recorded.
`cuda_on_cpu`: "cuda" means the CPU everywhere, with real numbers, so the branches for CUDA compute.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pneumo_dist.model import unet

MEMORY = 80 << 30  # bytes that the device claims to have
_CUDA = 1  # c10::DeviceType::CUDA
_NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh", "prim.")


class Shape(NamedTuple):
    """What an operator sees of a tensor."""

    size: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize


class Call(NamedTuple):
    """One operator that starts a kernel (or, for `_foreach` and fused ones, a few)."""

    name: str
    inputs: list[Shape]
    outputs: list[Shape]

    @property
    def bytes(self) -> int:
        """Bytes read and written once each: the least that the operator moves."""
        return sum(shape.bytes for shape in (*self.inputs, *self.outputs))


class Record(TorchDispatchMode):
    """The operators on the device, and the operators at which the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.waits: list[str] = []

    def clear(self) -> None:
        self.calls, self.waits = [], []

    def names(self) -> Counter[str]:
        """Return how often each operator ran."""
        return Counter(call.name for call in self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _on_device((args, kwargs))
        name = str(func).rsplit(".", 1)[0]
        if name == "aten._local_scalar_dense" and args[0].constant is None:
            self.waits += [name] if read else []
            return _one(args[0].dtype)
        out = _run(name, func, args, kwargs)
        written = _on_device(out)
        copies = name in ("aten._to_copy", "aten.copy_")
        blocking = not (kwargs.get("non_blocking") or (name == "aten.copy_" and args[2:] and args[2]))
        if copies and blocking and _crosses(args, out):
            self.waits.append(name)
        if (read or written) and not func.is_view and not name.startswith(_NO_KERNEL):
            self.calls.append(Call(name, read, written))
        return out


def _run(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on fakes; where torch's own fake lacks something, return what CUDA returns."""
    if name == "aten._fused_adam_":  # it changes its arguments
        return None
    if name == "aten._pin_memory":
        return args[0]
    out = func(*args, **kwargs)
    if name in ("aten.convolution", "aten.convolution_backward"):  # cuDNN follows its arguments; the fake is contiguous
        last = any(suggest_memory_format(arg) is torch.channels_last for arg in args[: 3 if "backward" in name else 2])
        layout = torch.channels_last if last else torch.contiguous_format
        return tree_map_only(Tensor, lambda t: torch.empty_like(t, memory_format=layout) if t.dim() == 4 else t, out)
    return out


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _on_device(values: Any) -> list[Shape]:
    tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type == "cuda"}
    return [Shape(tuple(t.shape), t.dtype, t.stride()) for t in tensors.values()]


def _crosses(args: Sequence[Any], out: Tensor) -> bool:
    """Return whether a copy is between host and device."""
    return len({t.device.type for t in (*args[:2], out) if isinstance(t, Tensor)}) > 1


def _swap(param: Tensor, moved: Tensor) -> None:
    """Do for fakes what `torch.utils.swap_tensors` does: only the layout of a weight on the device can change."""
    assert param.device == moved.device and param.dtype == moved.dtype
    with torch.no_grad():
        param.as_strided_(moved.shape, moved.stride())


@contextmanager
def _cuda_module() -> Iterator[None]:
    """Replace those functions of torch.cuda that ask or wait for a device."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "fake",
        "get_device_properties": lambda device=None: SimpleNamespace(name="fake", total_memory=MEMORY, uuid="fake-0"),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    }
    silent = ("set_device", "synchronize", "current_stream", "stream", "Stream", "Event", "graph", "CUDAGraph")
    unet._scale_and_shift.cache_clear()  # it keeps tensors of a device
    with ExitStack() as stack:
        for name, answer in (answers | {name: mock.MagicMock() for name in silent}).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
    unet._scale_and_shift.cache_clear()


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let a torch without CUDA accept CUDA tensors without data; it is taken back at the end.

    torch has a guard that does nothing, and installs it where a guard counts no device; a CPU build has none to count
    them. And autograd asks the hooks of CUDA whether it is built (their third function) and in use (the fifth).
    """
    if torch.backends.cuda.is_built():
        yield
        return
    libraries = Path(torch.__file__).parent / "lib"
    guards = (ctypes.c_void_p * 2).in_dll(
        ctypes.CDLL(str(libraries / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    find_hooks = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))["_ZN2at6detail12getCUDAHooksEv"]
    find_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(find_hooks())
    no, yes = (ctypes.CFUNCTYPE(ctypes.c_int8)(lambda answer=answer: answer) for answer in (0, 1))
    address_no, address_yes = (ctypes.cast(function, ctypes.c_void_p).value for function in (no, yes))
    without_device = (ctypes.c_void_p * 64)(*[address_no] * 64)
    no_guard = ctypes.c_void_p(ctypes.addressof(without_device))
    before = guards[_CUDA], hooks.value
    functions = (ctypes.c_void_p * 64)(*(ctypes.c_void_p * 64).from_address(hooks.value))
    functions[2], functions[4] = address_yes, address_no
    guards[_CUDA], hooks.value = ctypes.addressof(no_guard), ctypes.addressof(functions)
    torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[_CUDA], hooks.value = before


@contextmanager
def fake_cuda() -> Iterator[Record]:
    """Run the block with a cuda:0 whose tensors have no numbers; what the host reads from them is 1.

    Build networks before: they become fakes when they are moved to the device. Autograd runs in this thread, because
    the process may have started its threads without a device.
    """
    with ExitStack() as stack:
        stack.enter_context(_device_guard())
        stack.enter_context(_cuda_module())
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap))
        stack.enter_context(
            mock.patch.object(_foreach_utils, "_foreach_supported_types", [Tensor, Parameter, FakeTensor])
        )
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Record())


class _OnCpu(TorchFunctionMode):
    """Replace "cuda" among the arguments of torch's functions; nothing is pinned."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.pin_memory, Tensor.cuda):
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(_cpu, args), **kwargs)


def _cpu(argument: Any) -> Any:
    if isinstance(argument, str | torch.device) and str(argument).split(":")[0] == "cuda":
        return torch.device("cpu")
    return argument


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class _Graph(TorchDispatchMode):
    """A CUDA graph of operators on the CPU: a replay runs them again with the same numbers, tensors and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._computed = False  # unlike CUDA's, this capture computes: its results are those of the first replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self:
            yield
        self._computed = True

    @torch.no_grad()
    def replay(self) -> None:
        calls, self._computed = [] if self._computed else self._calls, False
        for func, args, kwargs, out in calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Run the block with "cuda" meaning the CPU: a tensor's own device is the CPU, that of `Ranks` is cuda:0."""
    with ExitStack() as stack:
        stack.enter_context(_cuda_module())
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", _Graph))
        stack.enter_context(mock.patch.object(torch.cuda, "graph", _Graph.capture))
        stack.enter_context(_OnCpu())
        yield
