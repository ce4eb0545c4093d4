"""The part of oneDNN's C interface that the kernels need, called through ctypes.

Paddle's Linux wheel carries oneDNN (paddle/libs/libdnnl.so.3), yet its eager convolutions never use it. This module
declares about twenty of the library's functions by hand and turns a description of an operation into a `Primitive`, a
callable on raw addresses.

Why ctypes and not a C++ custom operator: both reach the same speed, because a call costs microseconds against
milliseconds of work, and this way nobody needs a compiler, a build step or headers (the wheel's oneDNN headers are
stubs). The price is that declarations are not checked by a compiler, so `load` accepts only the library versions they
were tried with and the package runs a self-test before use.

Every thread has its own stream, primitives and cache: a primitive's arguments are set on memory objects it owns, so
two threads must not share one. OpenMP keeps the number of threads per calling thread too.
"""

import collections
import ctypes
import functools
import os
import threading
import weakref

import paddle

KNOWN_VERSIONS = ((3, 6),)
CACHED_PRIMITIVES = 512  # per thread; a network needs three per distinct convolution shape and two per BN shape

# Values of oneDNN's enumerations and argument indices (dnnl_types.h, the same in every 3.x release).
CPU, F32, IN_ORDER, OPENMP = 1, 3, 1, 2
ANY, ABCD, ABCDE, ACDB = 1, 5, 6, 22  # format tags; ACDB is NHWC for dimensions named (N, C, H, W)
FORWARD_TRAINING = 64
CONVOLUTION_DIRECT = 1
MISH, RELU_FROM_OUTPUT = 51, 256
BINARY_ADD = 131056
SRC, SRC_1, DST, WEIGHTS, DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 1, 2, 17, 33, 129, 145, 161
QUERY_MEMORY_CONSUMPTION, QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 6, 131, 132
STATUS_NAMES = ("success", "out of memory", "invalid arguments", "unimplemented", "last implementation reached",
                "runtime error", "not required")

_HANDLE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_HANDLE_OUT = ctypes.POINTER(ctypes.c_void_p)
_DIMS = ctypes.POINTER(ctypes.c_int64)
_CONVOLUTION_GEOMETRY = [_DIMS] * 4  # strides, dilations, padding before, padding after

# name -> argument types; every one returns a status except where _RETURNS says otherwise.
_SIGNATURES = {
    "dnnl_version": [],
    "dnnl_engine_create": [_HANDLE_OUT, _INT, ctypes.c_size_t],
    "dnnl_stream_create": [_HANDLE_OUT, _HANDLE, ctypes.c_uint],
    "dnnl_stream_destroy": [_HANDLE],
    "dnnl_memory_desc_create_with_tag": [_HANDLE_OUT, _INT, _DIMS, _INT, _INT],
    "dnnl_memory_desc_clone": [_HANDLE_OUT, _HANDLE],
    "dnnl_memory_desc_destroy": [_HANDLE],
    "dnnl_memory_desc_equal": [_HANDLE, _HANDLE],
    "dnnl_memory_desc_get_size": [_HANDLE],
    "dnnl_memory_create": [_HANDLE_OUT, _HANDLE, _HANDLE, _HANDLE],
    "dnnl_memory_set_data_handle": [_HANDLE, _HANDLE],
    "dnnl_memory_destroy": [_HANDLE],
    "dnnl_primitive_desc_query": [_HANDLE, _INT, _INT, _HANDLE],
    "dnnl_primitive_desc_query_md": [_HANDLE, _INT, _INT],
    "dnnl_primitive_desc_destroy": [_HANDLE],
    "dnnl_primitive_create": [_HANDLE_OUT, _HANDLE],
    "dnnl_primitive_execute": [_HANDLE, _HANDLE, _INT, _HANDLE],
    "dnnl_primitive_destroy": [_HANDLE],
    "dnnl_reorder_primitive_desc_create": [_HANDLE_OUT, *[_HANDLE] * 5],
    "dnnl_convolution_forward_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, _INT, *[_HANDLE] * 4, *_CONVOLUTION_GEOMETRY, _HANDLE],
    "dnnl_convolution_backward_data_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, *[_HANDLE] * 3, *_CONVOLUTION_GEOMETRY, _HANDLE, _HANDLE],
    "dnnl_convolution_backward_weights_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, *[_HANDLE] * 4, *_CONVOLUTION_GEOMETRY, _HANDLE, _HANDLE],
    "dnnl_batch_normalization_forward_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, _HANDLE, _HANDLE, _FLOAT, ctypes.c_uint, _HANDLE],
    "dnnl_eltwise_forward_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, _INT, _HANDLE, _HANDLE, _FLOAT, _FLOAT, _HANDLE],
    "dnnl_eltwise_backward_primitive_desc_create":
        [_HANDLE_OUT, _HANDLE, _INT, *[_HANDLE] * 3, _FLOAT, _FLOAT, _HANDLE, _HANDLE],
    "dnnl_binary_primitive_desc_create": [_HANDLE_OUT, _HANDLE, _INT, *[_HANDLE] * 4],
}


class _Version(ctypes.Structure):
    """dnnl_version_t."""

    _fields_ = [("major", _INT), ("minor", _INT), ("patch", _INT), ("hash", ctypes.c_char_p),
                ("cpu_runtime", ctypes.c_uint), ("gpu_runtime", ctypes.c_uint)]


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = [("index", _INT), ("memory", _HANDLE)]


_RETURNS = {
    "dnnl_version": ctypes.POINTER(_Version),
    "dnnl_memory_desc_get_size": ctypes.c_size_t,
    "dnnl_primitive_desc_query_md": _HANDLE,
}


class Unusable(RuntimeError):
    """The library cannot be used here; the message is one line that says why."""


def check(status, action):
    """Raise RuntimeError when a oneDNN call returned anything but success."""
    if status:
        name = STATUS_NAMES[status] if 0 <= status < len(STATUS_NAMES) else status
        raise RuntimeError(f"oneDNN could not {action}: {name}")


@functools.cache
def load():
    """Paddle's oneDNN with its functions declared.

    Raises Unusable when the file is missing, lacks a function, has another version or was not built for OpenMP.
    """
    path = os.path.join(os.path.dirname(paddle.__file__), "libs", "libdnnl.so.3")
    if not os.path.exists(path):
        raise Unusable("Paddle's wheel has no libs/libdnnl.so.3")
    try:
        library = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _RETURNS.get(name, _INT)
    except (OSError, AttributeError) as error:
        raise Unusable(f"cannot load oneDNN: {error}") from error
    version = library.dnnl_version().contents
    if (version.major, version.minor) not in KNOWN_VERSIONS or version.cpu_runtime != OPENMP:
        found = f"oneDNN {version.major}.{version.minor} with runtime {version.cpu_runtime}"
        raise Unusable(f"{found} is not a version this was tried with")
    return library


def version():
    """Version of the loaded library, such as '3.6.2'."""
    found = load().dnnl_version().contents
    return f"{found.major}.{found.minor}.{found.patch}"


@functools.cache
def _engine():
    return _new(load().dnnl_engine_create, "create an engine", CPU, 0)


def _new(function, action, *arguments):
    """Call a oneDNN function whose first argument receives the handle it creates, and return that handle."""
    handle = ctypes.c_void_p()
    check(function(ctypes.byref(handle), *arguments), action)
    return handle.value


def dims(values):
    """A dnnl_dims_t (the C functions copy it)."""
    return (ctypes.c_int64 * len(values))(*values)


class Description:
    """Shape and layout of one argument: a float32 memory descriptor that is destroyed with this object.

    Shapes are always in oneDNN's order, (N, C, H, W), whatever order the tag lays them out in.
    """

    def __init__(self, shape, tag):
        handle = _new(load().dnnl_memory_desc_create_with_tag, "describe a tensor", len(shape), dims(shape), F32, tag)
        self._own(handle)

    @classmethod
    def chosen(cls, primitive_desc, query):
        """The layout that oneDNN chose for an argument described with the tag ANY."""
        self = cls.__new__(cls)
        borrowed = load().dnnl_primitive_desc_query_md(primitive_desc.handle, query, 0)
        self._own(_new(load().dnnl_memory_desc_clone, "copy a description", borrowed))
        return self

    def _own(self, handle):
        self.handle = handle
        _destroy_with(self, load().dnnl_memory_desc_destroy, handle)

    @property
    def nbytes(self):
        return load().dnnl_memory_desc_get_size(self.handle)

    def __eq__(self, other):
        return bool(load().dnnl_memory_desc_equal(self.handle, other.handle))

    __hash__ = None


class PrimitiveDesc:
    """An operation with its shapes, not compiled yet. `function` names a dnnl_*_primitive_desc_create without prefix
    and suffix.

    Descriptions and other operations are given as they are, not by their handles: so each lives until oneDNN has read
    it, whoever else has let go of it.
    """

    def __init__(self, function, *arguments):
        create = getattr(load(), f"dnnl_{function}_primitive_desc_create")
        handles = (a.handle if isinstance(a, (Description, PrimitiveDesc)) else a for a in arguments)
        self.handle = _new(create, f"describe {function}", *handles)
        _destroy_with(self, load().dnnl_primitive_desc_destroy, self.handle)

    @classmethod
    def on_engine(cls, function, *arguments):
        """The same for the operations whose first argument is the engine, which is all of them but the reorder."""
        return cls(function, _engine(), *arguments)

    @property
    def scratch_bytes(self):
        """Size of the temporary buffer the operation needs, which grows with the number of threads."""
        size = ctypes.c_int64()
        check(load().dnnl_primitive_desc_query(self.handle, QUERY_MEMORY_CONSUMPTION, 0, ctypes.byref(size)),
              "describe a kernel")
        return size.value


class Primitive:
    """A compiled operation: call it with one contiguous float32 tensor per argument, in the order given here.

    Only the tensors' addresses reach oneDNN, which checks nothing: their sizes must be those of the descriptions.

    Args:
        primitive_desc: the operation.
        arguments: pairs (argument index, Description).
    """

    def __init__(self, primitive_desc, arguments):
        library = load()
        self._library = library
        self._primitive = _new(library.dnnl_primitive_create, "compile a kernel", primitive_desc.handle)
        _destroy_with(self, library.dnnl_primitive_destroy, self._primitive)
        self._memories = []
        for _, description in arguments:
            memory = _new(library.dnnl_memory_create, "create a memory object", description.handle, _engine(), None)
            _destroy_with(self, library.dnnl_memory_destroy, memory)
            self._memories.append(memory)
        pairs = [_Argument(index, memory) for (index, _), memory in zip(arguments, self._memories, strict=True)]
        self._arguments = (_Argument * len(pairs))(*pairs)

    def __call__(self, *tensors):
        library = self._library
        for memory, tensor in zip(self._memories, tensors, strict=True):
            library.dnnl_memory_set_data_handle(memory, tensor.data_ptr())
        status = library.dnnl_primitive_execute(self._primitive, _state().stream, len(tensors), self._arguments)
        check(status, "run a kernel")


class Reorder:
    """A copy of a tensor in another layout; the tensor itself where the two layouts are equal."""

    def __init__(self, source, target):
        self._primitive = None
        if source != target:
            operation = PrimitiveDesc("reorder", source, _engine(), target, _engine(), None)
            self._primitive = Primitive(operation, [(SRC, source), (DST, target)])
            self._floats = target.nbytes // 4

    def __call__(self, tensor):
        if self._primitive is None:
            return tensor
        converted = paddle.empty([self._floats], dtype="float32")
        self._primitive(tensor, converted)
        return converted


def _destroy_with(owner, destroy, handle):
    """Destroy a handle with its Python owner, but not at interpreter exit, when the library may be half gone."""
    weakref.finalize(owner, destroy, handle).atexit = False


class _ThreadState:
    """What each thread has for itself: a stream and the primitives it used last."""

    def __init__(self):
        self.stream = _new(load().dnnl_stream_create, "create a stream", _engine(), IN_ORDER)
        _destroy_with(self, load().dnnl_stream_destroy, self.stream)
        self.primitives = collections.OrderedDict()


_local = threading.local()


def _state():
    try:
        return _local.state
    except AttributeError:
        _local.state = _ThreadState()
        return _local.state


def cached(threads, build, *key):
    """build(*key) for the calling thread, kept until CACHED_PRIMITIVES others have been used since.

    The number of OpenMP threads tells results apart, because a kernel divides its work and sizes its buffers when it
    is compiled.
    """
    primitives = _state().primitives
    full_key = (threads, build, *key)
    found = primitives.get(full_key)
    if found is not None:
        primitives.move_to_end(full_key)
        return found
    made = primitives[full_key] = build(*key)
    if len(primitives) > CACHED_PRIMITIVES:
        primitives.popitem(last=False)
    return made
