"""`tvq serve`: a model behind an address."""

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from transformer_vq.cli.common import CheckpointOption, size
from transformer_vq.cli.models import (
    FarOptions,
    RunFolder,
    WeightsOption,
    local,
    open_model,
    open_run,
)
from transformer_vq.cli.parse import UsageError, option, require_whole
from transformer_vq.errors import UserError

if TYPE_CHECKING:
    from transformer_vq.engine.scheduler import Scheduler
    from transformer_vq.serve.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Serve:
    """Serve a trained model: OpenAI's API for completions, and a page to play on.

    Requests run together, in slots; each has a state of constant size, whatever its length. It
    ends at SIGTERM or Ctrl-C, when what runs is answered; a second one ends it at once.
    """

    examples: ClassVar[str] = """
  tvq serve --run runs/book
  tvq serve --run runs/book --slots 16 --exact
  tvq serve --run runs/book --host 0.0.0.0 --api-key-file keys.txt --state-dir states
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    host: Annotated[str, option("address to listen at; 0.0.0.0: all of this machine")] = "127.0.0.1"
    port: Annotated[int, option("port to listen at; 0: any that is free")] = 8000
    slots: Annotated[int, option("requests that are decoded together")] = 8
    max_queue: Annotated[int, option("answers that may wait for a slot; more are refused")] = 64
    exact: Annotated[
        bool, option("answers that do not depend on the load, to the bit: always all slots")
    ] = False
    prompt_chunk: Annotated[
        Literal[16, 128, 1024], option("tokens of a prompt that are read at once")
    ] = 1024
    api_key_file: Annotated[
        Path | None, option("keys, one a line, of which clients send one", "FILE", default="none")
    ] = None
    state_cache: Annotated[int, option("memory for states that are kept, in MB")] = 1024
    state_dir: Annotated[
        Path | None, option("folder for named states", "DIR", default="only in memory")
    ] = None
    drain: Annotated[float, option("seconds that answers have when the server is to end")] = 30.0
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)

    def main(self) -> int:
        require_whole("--port", self.port, 0, 65535)
        require_whole("--slots", self.slots, 1, 4096)
        require_whole("--max-queue", self.max_queue, 0)
        require_whole("--state-cache", self.state_cache, 0)
        if not 0 <= self.drain < float("inf"):
            raise UsageError(f"--drain is {self.drain}: it must be a number of seconds, 0 or more")
        _require_libraries()
        keys = [] if self.api_key_file is None else _read_keys(self.api_key_file)
        folder = local(self.run)
        if not folder.is_dir():
            raise UserError(f"there is no run folder {self.run}: name one that was trained")

        from transformer_vq.engine.engine import Engine
        from transformer_vq.serve.process import listen, run
        from transformer_vq.serve.server import make_app
        from transformer_vq.serve.service import Service

        service = Service()
        load = functools.partial(self._load, service, folder)
        engine = Engine(load, service.deliver, max_queue=self.max_queue)
        app = make_app(service, keys=keys, local=self.host in LOOPBACK)
        sock = listen(self.host, self.port)
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{sock.getsockname()[1]}"
        return run(
            app, service, engine, sock, drain=self.drain, ready=lambda: self._tell(service, address)
        )

    def _load(self, service: "Service", folder: Path) -> "Scheduler":
        """Open the model and compile its programs, in the thread of the engine."""
        from transformer_vq.engine.device import Device
        from transformer_vq.engine.scheduler import Scheduler
        from transformer_vq.engine.snapshots import SnapshotFiles
        from transformer_vq.serve.service import Loaded
        from transformer_vq.serve.states import StateStore

        info, tokenizer = open_run(folder, self.checkpoint)
        if info.data.image_shape:
            raise UserError(f"the run in {self.run} draws pictures: tvq draw --run {self.run}")
        model, _ = open_model(folder, info, self.far, weights=self.weights)
        widths = (self.slots,) if self.exact else (1, self.slots)
        device = Device(model, widths, largest=self.prompt_chunk, room=info.context_limit)
        files = SnapshotFiles(model)
        store = StateStore(
            device.row_bytes,
            self.state_cache << 20,
            self.state_dir,
            grid=self.prompt_chunk,
            pack=files.pack,
            unpack=files.unpack,
        )
        service.loaded = Loaded(
            name=self.run.resolve().name,
            tokenizer=tokenizer,
            vocab_size=device.vocab_size,
            ends_documents=info.data.documents > 1,
            capacity=device.capacity,
            store=store,
            cache="exact" if self.exact else "any",
        )
        return Scheduler(device, exact=self.exact)

    def _tell(self, service: "Service", address: str) -> None:
        """That requests are taken, and what a slot costs."""
        assert service.loaded
        row = service.loaded.store.row_bytes
        print(
            f"serving {service.loaded.name} at {address} with {self.slots} slots of {size(row)}, "
            f"and {self.state_cache:,} MB for states that are kept",
            flush=True,
        )


def _require_libraries() -> None:
    """Raise `UserError` if what serves is not installed."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(name)
        except ImportError:
            raise UserError(
                f"tvq serve needs {name}, which is not installed: "
                f"pip install 'transformer-vq[serve]'"
            ) from None


def _read_keys(path: Path) -> list[str]:
    """The keys in a file. Raises `UserError` if there is none, for then nobody could ask."""
    with contextlib.suppress(UnicodeDecodeError):
        lines = path.read_text("utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        if keys and all(key.isascii() for key in keys):
            return keys
    raise UserError(f"--api-key-file {path} has no usable key: write one a line, in ASCII")
