"""Numbers, sizes, times and models in words."""

import math

from transformer_vq import costs
from transformer_vq.config import ModelConfig


def number(value: float) -> str:
    """A large number as people read it: `1.23 M`."""
    for power, name in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {name}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes as people read them: `1.23 MB`."""
    return f"{number(count)}B" if count >= 1000 else f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people read them: `1:05`, or `2:03:04` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar(value: float, largest: float, width: int = 24) -> str:
    """A bar whose length shows a value; empty where there is nothing to compare."""
    if not (math.isfinite(value) and math.isfinite(largest) and largest > 0):
        return ""
    return "█" * round(width * value / largest)


def describe_attention(config: ModelConfig) -> str:
    """What a token attends to."""
    if config.attention == "full":
        return "full attention"
    return f"{config.codebook_size} codes, window {config.window_len}"


def describe_layers(config: ModelConfig) -> str:
    """How many layers there are, and how wide they are."""
    several = "" if config.num_layers == 1 else "s"
    return f"{config.num_layers} layer{several} of width {config.d_model}"


def describe_model(config: ModelConfig) -> str:
    """A model in one line."""
    return (
        f"{number(costs.parameter_count(config))} parameters, {describe_layers(config)}, "
        f"{describe_attention(config)}, "
        f"{size(costs.state_bytes(config))} of state"
    )
