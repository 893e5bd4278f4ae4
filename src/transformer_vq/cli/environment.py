"""What JAX and XLA take from the environment, made fit for a program that people use."""

import os
import re
import sys

from transformer_vq.errors import UserError, cut, plain

_OFF = re.compile(r"(n|no|f|false|off|0|)", re.IGNORECASE)
_ON = re.compile(r"(y|yes|t|true|on|1|)", re.IGNORECASE)
_ALLOWED = re.compile("(allow|log|)")

# Variables with which this program cannot work, or by which a seed means other numbers; and the
# values with which it can.
_NEEDED = {
    "JAX_DISABLE_JIT": _OFF,
    "JAX_NO_TRACING": _OFF,
    "JAX_TRANSFER_GUARD": _ALLOWED,
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": _ALLOWED,
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": _ALLOWED,
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": _ALLOWED,
    "JAX_DEFAULT_PRNG_IMPL": re.compile("(threefry2x32|)"),
    "JAX_THREEFRY_PARTITIONABLE": _ON,
}


def settle_environment() -> None:
    """Set what JAX is to find when it is imported.

    Raises `UserError` naming a variable with which this program cannot work.
    """
    for name, needed in _NEEDED.items():
        value = os.environ.get(name, "")
        if not needed.fullmatch(value):
            raise UserError(
                f"{name} is {cut(value)} in the environment, with which this program cannot work: "
                f"unset it"
            )
    if "jax" in sys.modules:
        return
    # XLA reports on itself, as errors too: that a compilation takes minutes, say. What fails comes
    # as an exception; what ends the process is printed all the same.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.get("JAX_NUMPY_RANK_PROMOTION") in ("warn", "raise"):
        # It is about how a program is written, and changes no value.
        os.environ["JAX_NUMPY_RANK_PROMOTION"] = "allow"


def of_environment(error: Exception) -> str:
    """What JAX says of a variable of the environment that it cannot use; or nothing."""
    text = " ".join(str(error).split())
    names = [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]
    if isinstance(error, FloatingPointError):
        said = [name for name in names if name in ("JAX_DEBUG_NANS", "JAX_DEBUG_INFS")]
    elif isinstance(error, ValueError):
        said = [name for name in names if name.lower() in text.lower()]
    else:
        said = []
    return plain(
        f"{said[0]} is {os.environ[said[0]]} in the environment: {cut(text, 300)}" if said else ""
    )


def without_devices() -> str:
    """Why JAX finds none of the devices that it is told to use; empty if it has them."""
    jax = sys.modules.get("jax")
    if jax is None:
        return ""
    try:
        jax.devices()
    except Exception as error:  # of several kinds, one of them an assertion
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "there is none"
        way = "name others that are here (cpu), or unset it" if wanted else "see its installation"
        setting = f", with JAX_PLATFORMS={wanted}" if wanted else ""
        return plain(f"JAX finds no device to compute on{setting}: {cut(reason, 300)}; {way}")
    return ""
