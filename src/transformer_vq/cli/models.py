"""What commands do with a trained model: open it, read prompts, keep states."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from transformer_vq.cli.cache import compilation_cache
from transformer_vq.cli.common import check_file, progress_bar, run_data, standard_input, tell
from transformer_vq.cli.parse import UsageError, as_usage, flat_names, option, overrides
from transformer_vq.config import ModelConfig
from transformer_vq.data import DataError, Tokenizer, free_memory, load_bytes, run_tokenizer
from transformer_vq.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformer_vq import Model, SamplingParams, State
    from transformer_vq.run.folder import RunInfo

CHUNK = 16 * 1024  # tokens of a prompt between looks at the progress

RunFolder = Annotated[
    Path, option("folder of a trained run, of an exported model, or hf:OWNER/NAME", "DIR")
]
FarOptions = Annotated[
    overrides(
        ModelConfig,
        "FarOptions",
        lambda f: "(default: as the model was trained)",
        only=("far_decay", "far_cap", "products"),
    ),
    flat_names,
]
WeightsOption = Annotated[
    Literal["as-saved", "bfloat16", "int8"],
    option("round the large matrices: less to read for each token (docs/sampling.md)"),
]
DraftOption = Annotated[
    str | None,
    option(
        "guess ahead, for the same text in less time: text: from what is written already; or a "
        "small model with the same vocabulary, as --run takes it",
        "text|DIR",
        default="none",
    ),
]
StateOption = Annotated[str | None, option("go on from a saved state", "FILE", default="none")]


def local(run: Path) -> Path:
    """The folder that `--run` names; of a model on the Hugging Face Hub, where it was put."""
    from transformer_vq.io.hub import local_folder

    return local_folder(run, "--run")


def open_run(folder: Path, checkpoint: str = "latest") -> "tuple[RunInfo, Tokenizer]":
    """What a checkpoint says of a run, and the vocabulary that it was trained with."""
    from transformer_vq.run.folder import find_step, load_info

    info = load_info(folder, find_step(folder, checkpoint))
    return info, run_tokenizer(folder, info.tokenizer)


def open_model(
    folder: Path,
    info: "RunInfo",
    far: Mapping[str, Any],
    state_file: str | None = None,
    weights: WeightsOption = "as-saved",
) -> "tuple[Model, State | None]":
    """The model of the run's checkpoint, with `FarOptions`, and a state of it from a file.

    Raises `UserError` if rounding its weights costs too much, or nobody knows what it costs.
    """
    from transformer_vq.engine.ready import keep_programs
    from transformer_vq.io.state import StateError, load_state
    from transformer_vq.measure.memory import trim_after_compiling
    from transformer_vq.run.folder import load_run

    trim_after_compiling()
    keep_programs(compilation_cache())
    model = _rounded(load_run(folder, info.step)[0], folder, info, weights)
    model = bounded(model, far)
    if state_file is None:
        return model, None
    state = load_state(state_file, model)
    if len(state.position) != 1:
        raise StateError(f"{state_file} holds {len(state.position)} sequences: one is needed")
    return model, state


def _rounded(model: "Model", folder: Path, info: "RunInfo", weights: WeightsOption) -> "Model":
    """The model with rounded weights, if that costs little: what is kept of the checkpoint says so,
    or it is measured now, on the text that the run was validated on."""
    if weights == "as-saved":
        return model

    from transformer_vq.nn.weights import round_weights
    from transformer_vq.run.weights import load_cost, measure_cost, require_small, save_cost

    rounded = round_weights(model, weights)
    cost = load_cost(folder, info, weights)
    if cost is None:
        try:
            source = run_data(info.data, (), run_tokenizer(folder, info.tokenizer))
            cost = measure_cost(model, rounded, info, source.split("validation"))
        except DataError as error:
            raise UserError(
                f"what --weights {weights} costs was not measured yet, and the text of the run "
                f"cannot be read ({error}): measure it once with tvq eval --run {folder} --weights "
                f"{weights} --data FILE"
            ) from None
        save_cost(folder, weights, cost)
        tell(
            f"{weights} weights cost {cost.difference:+.4f} bits per byte on {cost.tokens:,} "
            f"tokens of the validation split"
        )
    require_small(cost, weights)
    return rounded


# Options that several commands have.


def bounded(model: "Model", far: Mapping[str, Any]) -> "Model":
    """The model with `FarOptions`, which change none of its arrays. Raises `UsageError`."""
    try:
        return replace(model, config=model.config.replace(**far))
    except ConfigError as error:
        raise as_usage(error, "--", ModelConfig) from None


def check_save_state(path: str | None) -> None:
    """Raise `UsageError` now, and not after the work, if a state cannot be written there."""
    if path is None:
        return
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        raise UsageError(f"--save-state is {path}, which is {kind}: give the name of a file")
    check_file("--save-state", path)


# Prompts and states.


def prompt_tokens(text: str, file: str | None, tokenizer: Tokenizer) -> list[int]:
    """The prompt given as text or in a file, as tokens. Raises `UserError` if it is too large."""
    if file is None:
        return tokenizer.encode(text)
    most = free_memory() // 32  # bytes: a list of tokens takes several times as many
    if file != "-":
        return tokenizer.encode(load_bytes(file, max_bytes=most).tobytes())
    content = standard_input().read(most + 1)
    if len(content) > most:
        raise UsageError(f"the standard input has more than {most:,} bytes: too much")
    return tokenizer.encode(content)


def read(
    model: "Model", prompt: list[int], state: "State | None", *, room: int, quiet: bool = False
) -> "State":
    """The state after a prompt, read chunk by chunk; `room`: for so many tokens more."""
    from transformer_vq.engine import prefill, ready
    from transformer_vq.ops.decode import empty_state

    room = max(256, 1 << (len(prompt) + room - 1).bit_length())  # few shapes to compile for
    now = state
    if now is None:
        now = ready.call(empty_state, config=model.config, batch=1, room=room)
    with progress_bar("reading", quiet=quiet or len(prompt) <= CHUNK) as show:
        for start in range(0, len(prompt), CHUNK):
            chunk = prompt[start : start + CHUNK]
            now = prefill.read(model, now, [chunk])
            np.asarray(now.position)  # wait, so that the speed shown is true
            show(start + len(chunk), len(prompt))
    return now


def session(
    model: "Model",
    prompt: list[int],
    params: "SamplingParams",
    state: "State | None",
    draft: "bool | Model" = False,
) -> Any:
    """One request being decoded (`engine.batch.Session`)."""
    from transformer_vq.engine.batch import Session

    return Session(model, [prompt], params, state, draft=draft)


def open_draft(given: str | None) -> "bool | Model":
    """What guesses tokens ahead: `text`, or a model that `--run` would take; None: nothing."""
    if given in (None, "text"):
        return given is not None
    from transformer_vq.run.folder import load_run

    return load_run(given)[0]


def state_after(
    model: "Model",
    start: "State | None",
    prompt: Sequence[int],
    tokens: Sequence[int],
    session: Any,
    max_tokens: int,
) -> "State":
    """The state after the tokens that were shown, no further.

    A stop text is in the session's state by the time it is found: then the tokens are read again,
    into a state that has room for all `max_tokens`, as any other has.
    """
    before = 0 if start is None else int(start.position[0])
    consumed = [*prompt, *map(int, tokens)]
    if int(session.state.position[0]) == before + len(consumed):
        return session.state
    if not consumed:
        assert start is not None  # without a state there is a prompt
        return start
    return read(model, consumed, start, room=max(1, max_tokens - len(tokens)), quiet=True)


def require_probabilities(state: "State", run: Path, step: int) -> None:
    """Raise `UserError` if what comes after a state has no probabilities: not-a-numbers."""
    logits = np.asarray(state.logits, np.float32)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        sound = not np.isnan(logits - logits.max(axis=-1, keepdims=True)).any()
    if not sound:
        raise diverged(run, step)


def diverged(run: Path, step: int) -> UserError:
    """The error of a model whose probabilities are not numbers."""
    return UserError(
        f"the model in {run} at step {step} gives no probabilities but not-a-number (NaN): its "
        f"training diverged, so use an earlier checkpoint (tvq info lists them), or train anew "
        f"with a lower learning rate"
    )
