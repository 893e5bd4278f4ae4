"""The model card of an exported model: README.md, as people and the Hugging Face Hub read it."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformer_vq.config import ModelConfig
from transformer_vq.errors import cut, plain
from transformer_vq.run.folder import RunInfo
from transformer_vq.run.log import Record
from transformer_vq.show.words import describe_model, duration, number

PAPER = "[arXiv 2309.16354](https://arxiv.org/abs/2309.16354)"


def model_card(
    name: str, info: RunInfo, records: Sequence[Record], *, licence: str = "", origin: str = ""
) -> str:
    """The card as Markdown, with a head for the Hub.

    `name`: of the folder. `records`: of metrics.jsonl. `licence`: its identifier on the Hub, as
    `mit`. `origin`: where the weights are from, if no run of this program made them; a sentence.
    """
    pictures = info.data.image_shape is not None
    task = "unconditional-image-generation" if pictures else "text-generation"
    head = {"license": licence, "library_name": "transformer-vq", "pipeline_tag": task}
    fields = [f"{key}: {_yaml(value)}" for key, value in head.items() if value]
    said = _code(licence) if licence else "not stated by who exported the model"
    return "\n".join(
        [
            "---",
            *fields,
            "tags: [transformer-vq, jax, long-context]",
            "---",
            "",
            f"# {_text(name)}",
            "",
            f"{_kind(info.config)} It generates {'pictures' if pictures else 'text'}.",
            "",
            f"- **Model.** {_sentence(describe_model(info.config))} Arrays in "
            f"{info.config.param_dtype}.",
            f"- **Data.** {_data(info)}",
            *([] if origin else [f"- **Training.** {_training(info)}"]),
            *([f"- **Origin.** {origin}"] if origin else []),
            *(f"- **Results.** {line}" for line in _results(records, pictures=pictures)),
            f"- **Licence.** {_sentence(said)}",
            "",
            "## How to use it",
            "",
            f"    {_install(info)}",
            *(f"    {line}" for line in _commands(_shell(name), pictures=pictures)),
            "",
            "Of a model on the Hugging Face Hub, `hf:OWNER/NAME` takes the place of the folder. In "
            "Python:",
            "",
            "```python",
            "from transformer_vq import SamplingParams, generate, load",
            "",
            f"model, tokenizer = load({json.dumps(_name(name))})",
            *_python(pictures=pictures),
            "```",
            "",
        ]
    )


def _kind(config: ModelConfig) -> str:
    if config.attention == "full":
        return f"A transformer with full attention, the baseline of Transformer-VQ ({PAPER})."
    sees = "the whole past" if config.use_cache else "a sliding window"
    return (
        f"A Transformer-VQ ({PAPER}), a transformer whose attention sees {sees} at linear cost, "
        f"with a state of constant size."
    )


def _data(info: RunInfo) -> str:
    paths = info.data.paths
    names = ", ".join(_code(Path(path).name or path) for path in paths[:3] if path) or "not named"
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    size = f", {info.data.size:,} tokens" if info.data.size else ""
    vocabulary = "bytes" if info.tokenizer == "bytes" else info.tokenizer.split(" ")[0]
    return f"{names}{more}{size}; vocabulary: {_text(vocabulary)}."


def _training(info: RunInfo) -> str:
    tokens = info.step * info.train.batch_size * info.train.update_len
    return (
        f"{info.step:,} updates with {info.train.optimizer}, {number(tokens)} tokens in sequences "
        f"of {info.train.sequence_len:,}, in {duration(info.seconds)}."
    )


def _results(records: Iterable[Record], *, pictures: bool) -> Iterable[str]:
    """The newest of what was measured: on the validation split, or else in training."""
    unit = "bits per dimension" if pictures else "bits per byte"
    records = list(records)
    for kind, said in (("validation_", "validation split"), ("", "batches of training")):
        found = [r for r in records if f"{kind}loss" in r and f"{kind}bpb" in r]
        if found:
            last = found[-1]
            yield (
                f"{last[f'{kind}bpb']:.4f} {unit} ({last[f'{kind}loss']:.4f} nats per token) on "
                f"the {said}, at step {last['step']:,}."
            )
            return


def _install(info: RunInfo) -> str:
    extras = ["hub"] if info.data.image_shape else ["hub", "serve"]
    if info.tokenizer != "bytes":
        extras.append("text")
    return f"pip install 'transformer-vq[{','.join(extras)}]'"


def _commands(folder: str, *, pictures: bool) -> list[str]:
    if pictures:
        return [f"tvq draw --run {folder} --num-images 16", f"tvq info --run {folder}"]
    return [f"tvq sample --run {folder} --prompt 'It was'", f"tvq serve --run {folder}"]


def _python(*, pictures: bool) -> list[str]:
    if pictures:
        return ["print(model.config)  # tvq draw makes pictures of its tokens"]
    return [
        'prompt = tokenizer.encode("It was")',
        "(tokens,) = generate(model, [prompt], SamplingParams(max_tokens=100))",
        "print(tokenizer.decode_text(tokens))",
    ]


# Names of files may hold anything.


def _name(text: str) -> str:
    return cut(plain(text))


def _text(text: str) -> str:
    """As it is, whatever Markdown makes of its characters."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", _name(text))


def _code(text: str) -> str:
    return f"`{_name(text).replace('`', '')}`"


def _shell(name: str) -> str:
    text = _name(name)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _yaml(text: str) -> str:
    return text if re.fullmatch(r"[a-z][a-z0-9.-]*", text) else json.dumps(text)
