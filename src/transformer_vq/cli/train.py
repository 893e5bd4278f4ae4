"""`tvq train`: a model from a file, in a run folder."""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from transformer_vq.cli.parse import DataPaths, UsageError, as_usage, flat, option, overrides
from transformer_vq.config import PRESETS, ModelConfig, TrainConfig
from transformer_vq.data import (
    ByteTokenizer,
    OnError,
    Source,
    Tokenizer,
    load_tokenizer,
    require_length,
    run_tokenizer,
)

DEFAULT_PRESET = "tiny"  # minutes on a laptop

if TYPE_CHECKING:
    ConfigOptions = dict[str, Any]  # the fields that are given
    TrainOptions = dict[str, Any]
else:
    _tiny = ModelConfig.preset(DEFAULT_PRESET)
    ConfigOptions = overrides(
        ModelConfig, "ConfigOptions", lambda f: f"({DEFAULT_PRESET}: {getattr(_tiny, f.name)})"
    )
    TrainOptions = overrides(TrainConfig, "TrainOptions", lambda f: f"(default: {f.default})")


@dataclass
class Train:
    """Train a model on files, and leave it in a run folder.

    Each file is a document, and so is each line of .jsonl and each row of .parquet; the folders
    train, validation and test in a folder are its splits. Otherwise the first 90 % are trained on,
    the next 5 % are scored now and then (validation), the last 5 % are kept for `tvq eval` (test).
    The run folder gets config.json, metrics.jsonl and checkpoints. The same command gives the same
    losses, digit for digit. Ctrl-C saves and stops; --resume goes on.
    """

    examples: ClassVar[str] = """
  tvq train --data book.txt --out runs/book
  tvq train --data book.txt --out runs/book --resume --steps 4000
  tvq train --data books/ more.jsonl.gz --out runs/books
  tvq train --data books/ --tokenizer tokenizer.json --out runs/words
  tvq train --data pictures/ --image-size 32 --out runs/pictures
  tvq train --data enwik8.gz --out runs/e8 --preset small --config.d-model 384 \\
      --train.batch-size 16 --train.sequence-len 4096 --train.update-len 1024
"""

    out: Annotated[Path, option("folder of the run; made if need be", "DIR")]
    data: Annotated[
        DataPaths,
        option(
            "files or folders: text, .gz, .zst, .jsonl, .parquet, pictures",
            "PATH",
            default="those of the run",
        ),
    ] = ()
    tokenizer: Annotated[
        str,
        option(
            "vocabulary: a tokenizer.json or a SentencePiece .model",
            "FILE",
            default="bytes, or that of the run",
        ),
    ] = ""
    text_column: Annotated[
        str, option("where .jsonl and .parquet have the text", "NAME", default="text")
    ] = ""
    image_size: Annotated[
        int, option("resize and crop pictures to squares of this side", default="as they are")
    ] = 0
    on_error: Annotated[
        OnError | None,
        option(
            "at a document that cannot be read: stop or skip it; skipped ones are counted",
            default="stop",
        ),
    ] = None
    preset: Annotated[
        str,
        option(
            f"model to start from: {', '.join(PRESETS)}; --config.* change it",
            "NAME",
            default=f"{DEFAULT_PRESET}, or the run's own with --resume",
        ),
    ] = ""
    steps: Annotated[
        int | None, option("updates in all: short for --train.steps", "INT", default="1000")
    ] = None
    resume: Annotated[
        bool, option("go on with the run in --out, with its model, data and settings")
    ] = False
    config: tyro.conf.FlagConversionOff[ConfigOptions] = field(default_factory=dict)
    train: tyro.conf.FlagConversionOff[TrainOptions] = field(default_factory=dict)

    def main(self) -> int:
        saved = _saved_run(self.out) if self.resume else None
        config, train = self._configs(saved)
        if not self.data and saved is None:
            missing = f"there is no run in {self.out} to resume" if self.resume else "no --data"
            raise UsageError(f"{missing}: give --data FILE, the file to train on")

        from transformer_vq.cli.common import (
            describe_data,
            describe_model,
            open_data,
            program,
            train_with_progress,
        )

        paths, how = self._data(saved["data"] if saved else {})
        tokenizer = self._tokenizer(saved)
        if not saved and "vocab_size" not in self.config:
            config = config.replace(vocab_size=tokenizer.vocab_size)
        source = open_data(paths, tokenizer=tokenizer, **how)
        part = source.split("train")
        train = self._sequences(train, source, saved)
        require_length(part.tokens, train.sequence_len, f"the train split of {source.path}")

        from transformer_vq.ops.run import DataSource

        print(f"model: {describe_model(config)}")
        print(f"data: {describe_data(source, part)}")
        data = DataSource.of(paths[0], source, more_paths=tuple(paths[1:]), **how)
        result = train_with_progress(config, train, source, self.out, data=data, resume=self.resume)
        out = shlex.quote(str(self.out))
        again = f"{program()} train --resume --out {out}"
        if result.status == "interrupted":
            if result.step:
                print(f"interrupted and saved at step {result.step}. To go on: {again}")
            else:
                print("interrupted before the first step: nothing to save")
            return 130
        print(f"done: {result.step} steps. The run is in {self.out}. What now:")
        print(f"  {program()} eval --run {out}")
        pictures = " --num-images 25 --out drawn" if source.image_shape else ""
        print(f"  {program()} sample --run {out}{pictures}")
        print(f"  {again} --steps {2 * result.step}")
        return 0

    def _sequences(
        self, train: TrainConfig, source: Source, saved: dict[str, Any] | None
    ) -> TrainConfig:
        """Now that the data are known: a sequence is a picture, if they are pictures."""
        length = source.sequence_len or train.sequence_len
        if length != train.sequence_len and (saved or "sequence_len" in self.train):
            shape = " x ".join(map(str, source.image_shape or ()))
            raise UsageError(
                f"--train.sequence-len is {train.sequence_len}, and pictures of {shape} are "
                f"sequences of {length}: leave it out"
            )
        if saved:
            return train
        pieces = {"sequence_len": length, "update_len": self.train.get("update_len", 0)}
        try:
            return TrainConfig(**{**dataclasses.asdict(train), **pieces})
        except ValueError as error:
            raise as_usage(error, "--train.", TrainConfig) from None

    def _tokenizer(self, saved: dict[str, Any] | None) -> Tokenizer:
        """As given, or as the saved run has it, or bytes."""
        if not self.tokenizer:
            return run_tokenizer(self.out) if saved else ByteTokenizer()
        tokenizer = load_tokenizer(self.tokenizer)
        if saved and tokenizer.name != saved.get("tokenizer"):
            raise UsageError(
                f"--tokenizer is {self.tokenizer}, another vocabulary than that of the run in "
                f"{self.out}: leave it out, or start another run"
            )
        return tokenizer

    def _data(self, saved: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Paths, and how to read them: as given, or as the saved run did."""
        given = flat(self.data) or [saved["path"], *saved.get("more_paths", ())]
        paths = [str(Path(path).resolve()) for path in given]
        how = {
            "text_column": self.text_column,
            "image_size": self.image_size,
            "on_error": self.on_error,
        }
        defaults = {"text_column": "text", "image_size": 0, "on_error": "stop"}
        return paths, {k: v or saved.get(k, defaults[k]) for k, v in how.items()}

    def _configs(self, saved: dict[str, Any] | None) -> tuple[ModelConfig, TrainConfig]:
        """Model and run: of the saved run or the preset, with what was given on top."""
        changes = dict(self.train)
        if self.steps is not None and changes.setdefault("steps", self.steps) != self.steps:
            raise UsageError(
                f"--steps is {self.steps} and --train.steps {changes['steps']}: give one"
            )
        if saved is None:
            changes.pop("update_len", None)  # of a length that the data may decide
        try:
            train = TrainConfig(**{**(saved["train"] if saved else {}), **changes})
        except (ValueError, TypeError) as error:  # TypeError: a field of another version
            raise as_usage(error, "--train.", TrainConfig) from None
        try:
            if saved and not self.preset:
                return ModelConfig.from_dict({**saved["config"], **self.config}), train
            return ModelConfig.preset(self.preset or DEFAULT_PRESET, **self.config), train
        except ValueError as error:
            raise as_usage(error, "--config.", ModelConfig) from None


def _saved_run(folder: Path) -> dict[str, Any] | None:
    """What config.json says of the run in a folder; None if there is none."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        return saved if {"config", "train", "data"} <= saved.keys() else None
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise UsageError(f"{folder / 'config.json'} is damaged: give --data and --preset") from None
