"""llama.cpp as the package llama-cpp-python brings it: loaded when it is first needed, with its log taken into ours."""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections import deque
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import UsageError

log = logging.getLogger("stip.cloud")

PACKAGE = "llama-cpp-python"
INSTALL = "pip install 'stip[llama.cpp]'"
ERROR = 4  # ggml's log level
GPU = 1  # ggml's type of device
_errors: deque[str] = deque(maxlen=8)  # what llama.cpp said last of failures
_callbacks: list[Any] = []  # C holds no reference to them
_versions: list[str] = []

Floats = npt.NDArray[np.float32]


@cache
def library() -> Any:
    """The C functions of llama.cpp, and its constants, by their own names.

    Raises UsageError where the package is not installed, or its library does not load.
    """
    try:
        package = importlib.import_module("llama_cpp")
        functions = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError:
        raise UsageError(f"engine llama.cpp: {PACKAGE} is not installed", hint=INSTALL) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"engine llama.cpp: {PACKAGE} does not load: {str(error).splitlines()[0]}",
            hint=f"build it on this machine: pip install --force-reinstall --no-binary {PACKAGE} {PACKAGE}",
        ) from None
    heard = functions.llama_log_callback(_heard)
    _callbacks.append(heard)
    functions.llama_log_set(heard, ctypes.c_void_p(None))
    functions.llama_backend_init()
    _versions.append(str(package.__version__))
    return functions


def _heard(level: int, text: bytes, _data: object) -> None:
    """Takes what llama.cpp says. It lists a file's metadata, of which ours names the key: that is left out."""
    line = text.decode(errors="replace").strip()
    if level == ERROR:
        _errors.append(line)
    if line and "stip." not in line:
        # Of a failure it says counts, positions and names of tensors; it sees embeddings, and quotes none.
        log.log(logging.WARNING if level == ERROR else logging.DEBUG, "llama.cpp: %s", line)


def forget_failures() -> None:
    """Before something that `failure` is asked of."""
    _errors.clear()


def failure() -> str:
    """Why llama.cpp failed, in its own words."""
    reasons = [line for line in _errors if "error loading" in line] or list(_errors) or ["it does not say why"]
    return reasons[0].rpartition("error loading model: ")[2]


def floats(pointer: Any, count: int) -> Floats:
    """So many numbers that llama.cpp points to, in its own memory."""
    memory: Any = (ctypes.c_float * count).from_address(ctypes.addressof(pointer.contents))
    return np.frombuffer(memory, np.float32)


def version() -> str:
    """Of the package."""
    library()
    return _versions[-1]


def features() -> dict[str, list[str]]:
    """What each part of this build can use, as {"CPU": ["AVX2", …], "CUDA": […]}."""
    found: dict[str, list[str]] = {}
    part: list[str] = []
    for entry in library().llama_print_system_info().decode().split("|"):
        name, _, rest = entry.strip().rpartition(" : ")
        if name:
            part = found.setdefault(name, [])
        feature, _, value = rest.partition(" = ")
        if feature and value not in ("", "0"):
            part.append(feature if value == "1" else f"{feature} {value}")
    return found


def gpus() -> list[str]:
    """The graphics cards that this build can use, as ggml names them: CUDA0, Metal, Vulkan0."""
    ggml = _ggml()
    return [ggml.ggml_backend_dev_name(card).decode() for card in _cards(ggml)]


def gpu_memory() -> int:
    """Bytes that are free now on the graphics cards that this build can use, all together as it uses them."""
    ggml = _ggml()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    found = 0
    for card in _cards(ggml):
        ggml.ggml_backend_dev_memory(card, ctypes.byref(free), ctypes.byref(total))
        found += free.value
    return found


def _ggml() -> Any:
    """The C functions of ggml, on which llama.cpp rests. Raises UsageError as `library` does."""
    library()  # which says what is missing
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_memory.restype = None
    return ggml


def _cards(ggml: Any) -> list[ctypes.c_void_p]:
    found = range(ggml.ggml_backend_dev_count())
    devices = [ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(at))) for at in found]
    return [device for device in devices if ggml.ggml_backend_dev_type(device) == GPU]
