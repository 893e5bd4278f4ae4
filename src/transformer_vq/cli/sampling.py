"""Options for how tokens are drawn: one for every field of `SamplingParams`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

from tyro.conf import UseAppendAction, arg

from transformer_vq.engine.request import SamplingParams

# The types of options, where a field takes what no option can be.
_TYPES: dict[str, Any] = {
    "logit_bias": (UseAppendAction[tuple[tuple[int, float], ...]], "TOKEN NUMBER", "none"),
    "allowed_tokens": (tuple[int, ...], "TOKENS", "all"),
    "banned_tokens": (tuple[int, ...], "TOKENS", "none"),
    "stop": (UseAppendAction[tuple[str, ...]], "TEXT", "none"),
}


def sampling_options(
    name: str, *, without: tuple[str, ...] = (), changed: Mapping[str, tuple[Any, str]] = {}
) -> type:
    """A dataclass of these options, to be used as `OmitArgPrefixes[...]`.

    `without`: fields that are no options here. `changed`: another default and help, by field.
    """
    hints = get_type_hints(SamplingParams)
    fields: list[Any] = []
    for f in dataclasses.fields(SamplingParams):
        if f.name in without:
            continue
        default, help = changed.get(f.name, (f.default, f.metadata["help"]))
        if f.name in _TYPES:
            kind, metavar, none = _TYPES[f.name]
            how = arg(help=help, metavar=metavar, help_behavior_hint=f"(default: {none})")
            fields.append((f.name, Annotated[kind, how], ()))
        else:
            fields.append((f.name, Annotated[hints[f.name], arg(help=help)], default))
    return dataclasses.make_dataclass(name, fields)


def sampling_values(options: Any) -> dict[str, Any]:
    """The options as `SamplingParams` has them."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    if "allowed_tokens" in values:
        values["allowed_tokens"] = values["allowed_tokens"] or None
    return values
