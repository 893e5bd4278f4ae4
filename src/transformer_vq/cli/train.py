"""`tvq train`: a model from a file, in a run folder."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from transformer_vq.cli.parse import (
    DataPaths,
    UsageError,
    as_usage,
    flat,
    option,
    overrides,
    require_whole,
    with_options,
)
from transformer_vq.config import MeshConfig, ModelConfig, TrainConfig
from transformer_vq.data import (
    ByteTokenizer,
    OnError,
    Task,
    Tokenizer,
    is_task,
    load_tokenizer,
    require_length,
    run_tokenizer,
)
from transformer_vq.presets import PRESETS, TRAIN_PRESETS

DEFAULT_PRESET = "tiny"  # minutes on a laptop
MOST_SIDE = 16_384  # of a picture

if TYPE_CHECKING:
    from transformer_vq.run.observer import Observer

    ConfigOptions = dict[str, Any]  # the fields that are given
    TrainOptions = dict[str, Any]
    MeshOptions = dict[str, Any]
else:
    _tiny = ModelConfig.preset(DEFAULT_PRESET)
    ConfigOptions = overrides(
        ModelConfig, "ConfigOptions", lambda f: f"({DEFAULT_PRESET}: {getattr(_tiny, f.name)})"
    )
    TrainOptions = overrides(TrainConfig, "TrainOptions", lambda f: f"(default: {f.default})")
    MeshOptions = overrides(MeshConfig, "MeshOptions", lambda f: f"(default: {f.default})")


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
  tvq train --data recall:pairs=6,filler=32 --out runs/recall --config.window-len 4
  tvq train --data book.txt --out runs/fast --products auto
  tvq train --preset enwik8 --dry-run
  srun tvq train --distributed --data enwik8.gz --out runs/e8 --preset enwik8 --mesh.fsdp 8
"""

    out: Annotated[
        Path | None, option("folder of the run; made if need be", "DIR", default="required")
    ] = None
    data: Annotated[
        DataPaths,
        option(
            "files or folders: text, .jsonl, .parquet, pictures (.png, .jpg and the like, "
            "idx3-ubyte, .npz); compressed too (.gz, .bz2, .xz, .zst, .zip of one file); or a task "
            "of memory: recall:pairs=6,filler=32 (also updates:, copy:, passkey:, reading:)",
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
            f"model and recipe to start from: {', '.join(PRESETS)}; --config.* and --train.* "
            f"change them",
            "NAME",
            default=f"{DEFAULT_PRESET}, or the run's own with --resume",
        ),
    ] = ""
    steps: Annotated[
        int | None, option("updates in all: short for --train.steps", "INT", default="1000")
    ] = None
    products: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        option(
            "short for --config.products; auto measures at the start which is faster here",
            default="float32, or as the run has it",
        ),
    ] = None
    dry_run: Annotated[
        bool,
        option("compile, print sizes, memory and costs, and stop; needs neither --data nor --out"),
    ] = False
    resume: Annotated[
        bool, option("go on with the run in --out, with its model, data and settings")
    ] = False
    tensorboard: Annotated[
        bool, option("also write TensorBoard event files, to tensorboard/ of the run folder")
    ] = False
    wandb: Annotated[
        str, option("also log to this project of Weights & Biases", "PROJECT", default="none")
    ] = ""
    config: tyro.conf.FlagConversionOff[ConfigOptions] = field(default_factory=dict)
    train: tyro.conf.FlagConversionOff[TrainOptions] = field(default_factory=dict)
    mesh: tyro.conf.FlagConversionOff[MeshOptions] = field(default_factory=dict)
    distributed: Annotated[
        bool, option("one of several processes, found through SLURM, Kubernetes, MPI or a TPU pod")
    ] = False
    coordinator: Annotated[
        str, option("find the processes at the first one's address", "HOST:PORT", default="none")
    ] = ""
    num_processes: Annotated[int | None, option("with --coordinator: how many", "INT")] = None
    process_id: Annotated[int | None, option("with --coordinator: which, from 0", "INT")] = None

    def main(self) -> int:
        require_whole("--image-size", self.image_size, low=0, high=MOST_SIDE)
        if self.dry_run:
            return self._plan()
        if self.out is None:
            raise UsageError("--out is missing: give it (see tvq train --help)")
        saved = _saved_run(self.out, by_hand=bool(self.data)) if self.resume else None
        config, train = self._configs(saved)
        if self.products is not None:
            config = self._with_products(config, saved)
        mesh = self._mesh()
        if not self.data and saved is None:
            missing = f"there is no run in {self.out} to resume" if self.resume else "no --data"
            raise UsageError(f"{missing}: give --data FILE, the file to train on")

        from transformer_vq.cli.common import (
            describe_data,
            describe_model,
            join_processes,
            open_data,
            program,
            quoted,
            say,
            train_with_progress,
        )

        trackers = self._trackers()
        paths, how = self._data(saved["data"] if saved else {})
        tokenizer = self._tokenizer(saved)
        if not saved and "vocab_size" not in self.config:
            config = config.replace(vocab_size=tokenizer.vocab_size)
        source = open_data(paths, tokenizer=tokenizer, **how)
        part = source.split("train")
        if not saved:
            shape = " x ".join(map(str, source.image_shape or ()))
            what = f"pictures of {shape}" if shape else f"episodes of {source.path}"
            train = self._sequences(train, source.sequence_len, what)
        require_length(part.tokens, train.sequence_len, f"the train split of {source.path}")

        if self.distributed or self.coordinator:
            join_processes(self.coordinator, self.num_processes, self.process_id)

        from transformer_vq.run.folder import DataSource
        from transformer_vq.sharding import make_mesh

        say(f"model: {describe_model(config)}")
        say(f"data: {describe_data(source, part)}")
        result = train_with_progress(
            config,
            train,
            source,
            self.out,
            data=DataSource.of(paths[0], source, more_paths=tuple(paths[1:]), **how),
            resume=self.resume,
            observers=trackers,
            mesh=make_mesh(mesh),
            reword=self._reworded,
        )
        out = quoted(self.out)
        again = f"{program()} train --resume --out {out}"
        if result.status == "interrupted":
            if result.step:
                print(f"interrupted and saved at step {result.step}. To go on: {again}")
            else:
                print("interrupted before the first step: nothing to save")
            return 130
        say(f"done: {result.step} steps. The run is in {self.out}. What now:")
        print(f"  {program()} eval --run {out}")
        use = "draw" if source.image_shape else "sample"
        rest = " --num-images 25 --out drawn" if source.image_shape else ""
        print(f"  {program()} {use} --run {out}{rest}")
        print(f"  {program()} report --run {out}")
        print(f"  {again} --steps {2 * result.step}")
        return 0

    def _reworded(self, note: str) -> str:
        return with_options(note, type(self))

    def _trackers(self) -> "list[Observer]":
        """What was asked for besides metrics.jsonl; raises `TrackerError` if it is missing."""
        from transformer_vq.show.trackers import TensorBoard, WandB

        trackers: list[Observer] = [TensorBoard()] if self.tensorboard else []
        return [*trackers, WandB(self.wandb)] if self.wandb else trackers

    def _plan(self) -> int:
        """What training would take; no data are read, nothing is written or allocated."""
        if self.resume:
            raise UsageError("--dry-run is for a run from the start: leave out --resume")
        config, train = self._configs(None)
        data = flat(self.data)
        if data and is_task(data[0]):
            task = Task.named(data[0])
            train = self._sequences(train, task.length, f"episodes of {task}")
        if self.products is not None:
            config = self._with_products(config, None)
        mesh = self._mesh()
        if self.tokenizer and "vocab_size" not in self.config:
            config = config.replace(vocab_size=load_tokenizer(self.tokenizer).vocab_size)

        from transformer_vq.cli.common import describe_model, number, say, size, tell
        from transformer_vq.run.plan import plan
        from transformer_vq.sharding import make_mesh

        say(f"model: {describe_model(config)}")
        print(
            f"recipe: {train.optimizer}, {train.steps:,} updates of {train.batch_size:,} rows by "
            f"{train.update_len:,} tokens, in sequences of {train.sequence_len:,}",
            flush=True,
        )
        for note in train.notes():
            tell(self._reworded(note))
        if data and not is_task(data[0]):
            tell("the data are not read: sequences are as long as --train.sequence-len says")
        made = plan(config, train, make_mesh(mesh))
        print(f"compiled: the train step in {made.compile_seconds:.1f} s, for {made.devices}")
        share = " on each device" if made.num_devices > 1 else ""
        print(f"memory: {size(made.total_bytes)}{share}, as the compiler counts it:")
        for name, count in made.bytes.items():
            print(f"  {name:<24}{size(count):>9}")
        flops, tokens = made.flops_per_token, made.tokens_per_update
        print(f"costs: {number(flops)}FLOP a token, {number(flops * tokens)}FLOP an update", end="")
        print(f" of {tokens:,} tokens")
        total = tokens * train.steps
        print(f"in all: {number(total)} tokens, {number(flops * total)}FLOP")
        print("dry run: nothing was trained")
        return 0

    def _with_products(self, config: ModelConfig, saved: dict[str, Any] | None) -> ModelConfig:
        """The configuration with products as asked for, or as is faster here; a run that goes on
        keeps its own, whatever is faster."""
        given = saved["config"].get("products", "float32") if saved else config.products
        if saved and self.products in (given, "auto"):
            return config.replace(products=given)
        if saved or "products" in self.config:
            where = "the run" if saved else "--config.products"
            raise UsageError(
                f"--products is {self.products}, and {where} says {given} already: leave it out"
            )
        made, several = self.products, self.distributed or self.coordinator
        if made == "auto" and several:
            raise UsageError(
                "--products auto measures one machine, and there are several: give float32 or "
                "bfloat16"
            )
        if made != "float32" and not several and config.compute_dtype == "float32":
            from transformer_vq.cli.common import say, tell
            from transformer_vq.run.peak import product_rates

            rates = product_rates(config)
            if made == "auto":
                made = rates.faster
                say(f"products: {made}, for {rates}")
            elif rates.rounded < rates.float32:
                tell(f"--products bfloat16 is slower here than float32: {rates}")
        made = "float32" if made == "auto" else made
        try:
            return config.replace(products=made)
        except ValueError as error:
            raise as_usage(error, "--config.", ModelConfig) from None

    def _mesh(self) -> MeshConfig:
        """The mesh asked for, of processes that can find each other."""
        if self.num_processes is not None:
            require_whole("--num-processes", self.num_processes)
        by_hand = {"--num-processes": self.num_processes, "--process-id": self.process_id}
        for name, value in by_hand.items():
            if (value is None) == bool(self.coordinator):
                raise UsageError(
                    f"--coordinator, --num-processes and --process-id go together: "
                    f"{name} is {'missing' if value is None else 'alone'}"
                )
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise UsageError(f"--coordinator is {self.coordinator}: it must be HOST:PORT")
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise UsageError(
                f"--process-id is {self.process_id}: it must be from 0 to "
                f"{self.num_processes - 1}, below --num-processes"
            )
        try:
            return MeshConfig(**self.mesh)
        except ValueError as error:
            raise as_usage(error, "--mesh.", MeshConfig) from None

    def _sequences(self, train: TrainConfig, length: int | None, what: str) -> TrainConfig:
        """A new run, now that the data are known: of whole documents (`what`), a sequence is one of
        them, of `length` tokens."""
        length = length or train.sequence_len
        if length != train.sequence_len and "sequence_len" in self.train:
            raise UsageError(
                f"--train.sequence-len is {train.sequence_len}, and {what} are "
                f"sequences of {length}: leave it out"
            )
        usual = TRAIN_PRESETS.get(self.preset, {}) if length == train.sequence_len else {}
        update_len = self.train.get("update_len", usual.get("update_len", 0))
        lengths = {"sequence_len": length, "update_len": update_len}
        try:
            return TrainConfig(**{**dataclasses.asdict(train), **lengths})
        except ValueError as error:
            raise as_usage(error, "--train.", TrainConfig) from None

    def _tokenizer(self, saved: dict[str, Any] | None) -> Tokenizer:
        """As given, or as the saved run has it, or bytes."""
        if not self.tokenizer:
            if not (saved and self.out):
                return ByteTokenizer()
            return run_tokenizer(self.out, saved.get("tokenizer"))
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
        paths = [path if is_task(path) else os.path.realpath(path) for path in given]
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
        recipe = saved["train"] if saved else TRAIN_PRESETS.get(self.preset, {})
        if not saved and not self.dry_run:
            changes["update_len"] = 0  # of a length that the data may decide: see `_sequences`
        try:
            train = TrainConfig(**{**recipe, **changes})
        except (ValueError, TypeError) as error:  # TypeError: a field of another version
            raise as_usage(error, "--train.", TrainConfig) from None
        try:
            if saved and not self.preset:
                return ModelConfig.from_dict({**saved["config"], **self.config}), train
            return ModelConfig.preset(self.preset or DEFAULT_PRESET, **self.config), train
        except ValueError as error:
            raise as_usage(error, "--config.", ModelConfig) from None


def _saved_run(folder: Path, *, by_hand: bool) -> dict[str, Any] | None:
    """What is known of the run in a folder, as config.json has it; None if there is none.

    If that file is damaged, the newest checkpoint knows the same. Without a checkpoint nothing was
    trained: None if the data are given `by_hand`, or else `UsageError`.
    """
    path = folder / "config.json"
    if not path.exists():
        return None

    from transformer_vq.cli.common import tell
    from transformer_vq.run.folder import RunInfo, checkpoints_of, load_info, refuse_export

    refuse_export(folder)
    try:
        saved = json.loads(path.read_bytes())
        saved.pop("environment", None)
        return RunInfo.from_dict(saved).to_dict()
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        if checkpoints_of(folder).latest() is None:
            if by_hand:
                return None
            raise UsageError(
                f"{path} is damaged ({error}), and there is no checkpoint: give --data, and all "
                f"else that is not as usual, to start anew"
            ) from None
        tell(f"{path} is damaged: the checkpoint says what it said")
        return load_info(folder).to_dict()
