"""`tvq serve`: a model behind an address."""

import contextlib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from transformer_vq.cli.common import CheckpointOption, read_small, size, tell
from transformer_vq.cli.models import (
    DraftOption,
    FarOptions,
    RunFolder,
    WeightsOption,
    open_draft,
    open_model,
)
from transformer_vq.cli.parse import UsageError, option, require_whole
from transformer_vq.cli.served import (
    STATE_CACHE,
    PromptChunkOption,
    Served,
    SlotsOption,
    StateCacheOption,
    open_text_run,
    prompt_chunk,
    require_libraries,
    run_folder,
    shared_mesh,
)
from transformer_vq.errors import UserError

if TYPE_CHECKING:
    from transformer_vq.engine.scheduler import Scheduler
    from transformer_vq.serve.chat import ChatTemplate
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
    slots: SlotsOption = 8
    max_queue: Annotated[int, option("answers that may wait for a slot; more are refused")] = 64
    exact: Annotated[
        bool, option("answers that do not depend on the load, to the bit: always all slots")
    ] = False
    prompt_chunk: PromptChunkOption = None
    api_key_file: Annotated[
        Path | None, option("keys, one a line, of which clients send one", "FILE", default="none")
    ] = None
    chat_template: Annotated[
        str | None,
        option(
            "makes prompts of chats: Jinja2, in a file or as it is",
            "FILE|TEXT",
            default="that of the run, if it has one",
        ),
    ] = None
    state_cache: StateCacheOption = STATE_CACHE
    state_dir: Annotated[
        Path | None, option("folder for named states", "DIR", default="only in memory")
    ] = None
    state_disk: Annotated[
        int, option("disk for states of known prompts, in --state-dir, in MB; 0: none")
    ] = 0
    drain: Annotated[float, option("seconds that answers have when the server is to end")] = 30.0
    draft: DraftOption = None
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)

    def main(self) -> int:
        require_whole("--port", self.port, 0, 65535)
        require_whole("--slots", self.slots, 1, 4096)
        require_whole("--max-queue", self.max_queue, 0)
        require_whole("--state-cache", self.state_cache, 0)
        require_whole("--state-disk", self.state_disk, 0)
        if self.state_disk and self.state_dir is None:
            raise UsageError(f"--state-disk is {self.state_disk}: give --state-dir, where it is")
        if not 0 <= self.drain < float("inf"):
            raise UsageError(f"--drain is {self.drain}: it must be a number of seconds, 0 or more")
        if self.exact and self.draft is not None:
            raise UsageError(
                "--exact and --draft are both given: tokens that are tried together differ in "
                "rounding, so give one of them"
            )
        require_libraries("serve", "fastapi", "uvicorn", "prometheus_client")
        keys = [] if self.api_key_file is None else _read_keys(self.api_key_file)
        folder = run_folder(self.run)
        template = _chat_template(self.chat_template, folder)

        from transformer_vq.engine.engine import Engine
        from transformer_vq.serve.process import listen, run
        from transformer_vq.serve.server import make_app
        from transformer_vq.serve.service import Service

        service = Service()
        load = functools.partial(self._load, service, folder)
        engine = Engine(load, service.deliver, max_queue=self.max_queue)
        app = make_app(service, keys=keys, local=self.host in LOOPBACK, template=template)
        sock = listen(self.host, self.port)
        tell(f"loading {self.run} (the first start takes longer: it compiles programs)")
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{sock.getsockname()[1]}"
        status = run(
            app, service, engine, sock, drain=self.drain, ready=lambda: self._tell(service, address)
        )
        if status == 0 and service.loaded is not None:
            service.loaded.store.close()
        return status

    def _load(self, service: "Service", folder: Path) -> "Scheduler":
        """Open the model and compile its programs, in the thread of the engine."""
        from transformer_vq.engine.snapshots import SnapshotFiles

        mesh = shared_mesh(self.slots, self.draft)
        info, tokenizer = open_text_run(folder, self.checkpoint, self.run)
        model, _ = open_model(folder, info, self.far, weights=self.weights)
        served = Served(
            name=self.run.resolve().name,
            info=info,
            tokenizer=tokenizer,
            model=model,
            files=SnapshotFiles(model),
            slots=self.slots,
            exact=self.exact,
            prompt_chunk=prompt_chunk(self.prompt_chunk),
            state_cache=self.state_cache,
            state_dir=self.state_dir,
            cache="exact" if self.exact else "any",
            state_disk=self.state_disk,
            draft=open_draft(self.draft),
        )
        return served.load(service, mesh=mesh)

    def _tell(self, service: "Service", address: str) -> None:
        """That requests are taken, and what a slot costs."""
        assert service.loaded
        row = service.loaded.store.row_bytes
        print(
            f"serving {service.loaded.name} at {address} with {self.slots} slots of {size(row)}, "
            f"and {self.state_cache:,} MB for states that are kept",
            flush=True,
        )


def _read_keys(path: Path) -> list[str]:
    """The keys in a file. Raises `UserError` if there is none, for then nobody could ask."""
    with contextlib.suppress(UnicodeDecodeError):
        lines = read_small("--api-key-file", path).decode("utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        if keys and all(key.isascii() for key in keys):
            return keys
    raise UserError(f"--api-key-file {path} has no usable key: write one a line, in ASCII")


def _chat_template(given: str | None, folder: Path) -> "ChatTemplate | None":
    """The template that is given, or that of the model; None if there is none.

    Raises `UserError` for one that cannot be used.
    """
    source = _own_template(folder) if given is None else _given_template(given)
    if source is None:
        return None
    require_libraries("serve --chat-template", "jinja2")

    from transformer_vq.serve.chat import ChatTemplate

    return ChatTemplate(source)


def _given_template(given: str) -> str:
    if "{" in given or "\n" in given:
        return given
    try:
        content = read_small("--chat-template", given).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {given} is not UTF-8: give a file of text") from None
    except UserError as error:
        raise UserError(f"{error}, or a template in Jinja2") from None
    return content.replace("\r\n", "\n")


def _own_template(folder: Path) -> str | None:
    """That of the model, in the files in which Hugging Face's tokenizers have it."""
    with contextlib.suppress(OSError, ValueError):
        return (folder / "chat_template.jinja").read_text("utf-8")
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        template = config.get("chat_template") if isinstance(config, dict) else None
        return template if isinstance(template, str) else None
    return None
