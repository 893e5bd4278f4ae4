"""Memory that XLA's compiler has freed, returned to the operating system.

The C library of most Linux systems, glibc, keeps what a program frees for its next use: after
compiling a train step some 300 MB, and what the step itself needs comes on top.
"""

import ctypes
import functools
import sys
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
LONG = 1.0  # seconds of a compilation that may leave much behind


@functools.cache  # once
def trim_after_compiling() -> None:
    """From now on, the end of every long compilation gives free memory back, in some 50 ms.

    Programs call it (`tvq` does); importing the library registers nothing.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        jax.monitoring.register_event_duration_secs_listener(_trim)


def _trim(event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILED and duration_secs > LONG:
        ctypes.CDLL(None).malloc_trim(0)
