"""A model that answers requests, for the commands that have an engine: `serve` and `batch`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from transformer_vq.cli.models import local, open_run
from transformer_vq.cli.parse import option
from transformer_vq.errors import UserError, to_install

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from transformer_vq.data import Tokenizer
    from transformer_vq.engine.scheduler import Scheduler
    from transformer_vq.engine.snapshots import SnapshotFiles
    from transformer_vq.nn.model import Model
    from transformer_vq.run.folder import RunInfo
    from transformer_vq.serve.service import Service
    from transformer_vq.serve.states import CacheMode
STATE_CACHE = 1024  # MB of states that are kept, by default

SlotsOption = Annotated[int, option("requests that are decoded together")]
PromptChunkOption = Annotated[
    Literal[16, 64, 256, 1024] | None,
    option("tokens of a prompt that are read at once", default="256 on a CPU, 1024 elsewhere"),
]
StateCacheOption = Annotated[int, option("memory for states that are kept, in MB")]


def require_libraries(command: str, *names: str) -> None:
    """Raise `UserError` if what a command needs of the extra `serve` is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            raise UserError(
                f"tvq {command} needs {name}, which is not installed: {to_install('serve')}"
            ) from None


def run_folder(run: Path) -> Path:
    """The folder that `--run` names. Raises `UserError` if there is none."""
    folder = local(run)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {run}: name one that was trained")
    return folder


def open_text_run(folder: Path, checkpoint: str, run: Path) -> "tuple[RunInfo, Tokenizer]":
    """`open_run` of the folder that `run` names. Raises `UserError` for one of pictures, too."""
    info, tokenizer = open_run(folder, checkpoint)
    if info.data.image_shape:
        raise UserError(f"the run in {run} draws pictures: tvq draw --run {run}")
    return info, tokenizer


def shared_mesh(slots: int, draft: object) -> "Mesh | None":
    """All devices of this process, which share the slots; None if there is one.

    Raises `UserError` where they cannot.
    """
    import jax

    from transformer_vq.sharding import data_mesh

    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    fewer = "let the process see fewer of them (CUDA_VISIBLE_DEVICES)"
    if slots % len(devices):
        raise UserError(
            f"--slots is {slots}: it must be a multiple of the {len(devices)} devices that share "
            f"the slots, or {fewer}"
        )
    if draft:
        raise UserError(
            f"--draft is for one device, and there are {len(devices)}: leave it out, or {fewer}"
        )
    return data_mesh(devices)


def prompt_chunk(given: int | None) -> int:
    """How many tokens of a prompt are read at once: what is given, or what suits the backend."""
    from transformer_vq.nn.products import tuning

    return given or tuning().prompt_chunk


@dataclass(frozen=True)
class Served:
    """A model, and how it answers requests."""

    name: str  # of the model
    info: "RunInfo"
    tokenizer: "Tokenizer"
    model: "Model"
    files: "SnapshotFiles"  # of its states
    slots: int
    exact: bool
    prompt_chunk: int
    state_cache: int  # MB
    state_dir: Path | None
    cache: "CacheMode"  # where a request does not say it
    state_disk: int = 0  # MB
    draft: "bool | Model" = False  # what guesses tokens ahead

    def load(
        self, service: "Service", device: Any = None, mesh: "Mesh | None" = None
    ) -> "Scheduler":
        """Compile the programs of an engine, and tell the service what it serves.

        `device`, `mesh`: as of `engine.device.Device`.
        """
        from transformer_vq.engine.device import Device
        from transformer_vq.engine.scheduler import Scheduler
        from transformer_vq.serve.prompts import PromptFiles
        from transformer_vq.serve.service import Loaded
        from transformer_vq.serve.states import StateStore

        few = 1 if mesh is None else mesh.size
        widths = (self.slots,) if self.exact else (few, self.slots)
        made = Device(
            self.model,
            widths,
            largest=self.prompt_chunk,
            room=self.info.context_limit,
            device=device,
            mesh=mesh,
            draft=self.draft,
        )
        prompts = None
        if self.state_disk and self.state_dir is not None:
            prompts = PromptFiles(
                self.state_dir / "prompts",
                f"{self.files.digest[:12]}-{self.prompt_chunk}",
                self.state_disk << 20,
                pack=self.files.pack,
                unpack=self.files.unpack,
            )
        store = StateStore(
            made.row_bytes,
            self.state_cache << 20,
            self.state_dir,
            grid=self.prompt_chunk,
            pack=self.files.pack,
            unpack=self.files.unpack,
            prompts=prompts,
        )
        service.loaded = Loaded(
            name=self.name,
            tokenizer=self.tokenizer,
            vocab_size=made.vocab_size,
            ends_documents=self.info.data.documents > 1,
            capacity=made.capacity,
            store=store,
            cache=self.cache,
        )
        return Scheduler(made, exact=self.exact)
