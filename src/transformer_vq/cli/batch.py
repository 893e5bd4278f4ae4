"""`tvq batch`: a file of requests is answered."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from transformer_vq.cli.common import CheckpointOption, say
from transformer_vq.cli.interrupts import leave
from transformer_vq.cli.models import FarOptions, RunFolder, WeightsOption, open_model
from transformer_vq.cli.parse import UsageError, option, require_whole
from transformer_vq.cli.sentences import end
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
)
from transformer_vq.errors import plain, shown
from transformer_vq.fields import MOST_SEED

if TYPE_CHECKING:
    from transformer_vq.engine.engine import Engine
    from transformer_vq.serve.answers import AnswerFile
    from transformer_vq.serve.lines import Line
    from transformer_vq.serve.service import Service

LET_GO = 5.0  # seconds that engines have for their last step


@dataclass
class Batch:
    """Answer a file of requests, one a line, into a file of answers.

    A line is a request of OpenAI's batch format, the body of one (an object with `prompt` and what
    else /v1/completions takes), or a prompt as a JSON string. Answers come in any order. Whatever
    ends it, the same command goes on, and each request is answered once.
    """

    examples: ClassVar[str] = """
  tvq batch --run runs/book --input requests.jsonl --out answers.jsonl
  tvq batch --run runs/book --input prompts.txt --text --out answers.jsonl \\
      --body '{"max_tokens": 200, "temperature": 0.8}'
  tvq batch --run runs/book --input requests.jsonl --out answers.jsonl --shard 0/4
"""

    run: RunFolder
    input: Annotated[Path, option("requests, one a line", "FILE")]
    out: Annotated[
        Path, option("where answers are added; with --shard, FILE-0-of-4 and so on", "FILE")
    ]
    text: Annotated[bool, option("each line is a prompt as it is, not JSON")] = False
    body: Annotated[
        str, option("fields of requests that do not have them, as an object", "JSON")
    ] = "{}"
    seed: Annotated[int, option("of what is drawn for requests without a seed")] = 0
    shard: Annotated[
        str | None, option("answer every N-th request, from the I-th on", "I/N", default="all")
    ] = None
    checkpoint: CheckpointOption = "latest"
    slots: SlotsOption = 8
    exact: Annotated[
        bool, option("answers that do not depend on what else runs, to the bit: always all slots")
    ] = False
    prompt_chunk: PromptChunkOption = None
    state_cache: StateCacheOption = STATE_CACHE
    state_dir: Annotated[Path | None, option("folder of named states", "DIR", default="none")] = (
        None
    )
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)

    def main(self) -> int:
        require_whole("--slots", self.slots, 1, 4096)
        require_whole("--seed", self.seed, 0, MOST_SEED)
        require_whole("--state-cache", self.state_cache, 0)
        shard = _shard(self.shard)
        require_libraries("batch", "pydantic")
        defaults = _defaults(self.body)
        folder = run_folder(self.run)

        from transformer_vq.serve.answers import AnswerFile
        from transformer_vq.serve.lines import RequestFile

        with RequestFile(self.input, text=self.text) as requests:
            total = requests.share(*shard)
            served = self._open(folder)
            out, options = self._named(*shard), self._digest(defaults)
            with AnswerFile(out, requests, options=options, model=served.files.digest) as answers:
                if 0 < answers.answered < total:
                    say(f"{answers.answered:,} of {total:,} requests are answered in {out} already")
                left = requests.read(*shard, answers.done)
                stopped, closed = self._answer(served, left, answers, total, defaults)
        if stopped:
            said = f"{answers.answered:,} of {total:,} requests are answered in {plain(str(out))}"
            status = end(f"tvq: stopped; {said}, and the same command goes on", 128 + stopped)
            return status if closed else leave(status)  # it compiles: nobody can end that thread
        failed = f", {answers.failed:,} of them with an error" if answers.failed else ""
        one = answers.answered == 1
        these = "1 request is" if one else f"{answers.answered:,} requests are"
        say(f"{these} answered in {out}{failed}")
        return int(0 < answers.failed == answers.answered)

    def _named(self, index: int, count: int) -> Path:
        """The file of the answers."""
        part = "" if self.shard is None else f"-{index}-of-{count}"
        return self.out.with_name(f"{self.out.stem}{part}{self.out.suffix}")

    def _digest(self, defaults: dict[str, Any]) -> str:
        """A hash of all that changes answers beside the model and the input."""
        width = self.slots if self.exact else 0  # other widths differ in rounding: that is allowed
        what = [defaults, self.seed, self.text, prompt_chunk(self.prompt_chunk), width]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _open(self, folder: Path) -> Served:
        """The model."""
        from transformer_vq.engine.snapshots import SnapshotFiles

        info, tokenizer = open_text_run(folder, self.checkpoint, self.run)
        model, _ = open_model(folder, info, self.far, weights=self.weights)
        return Served(
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
            cache="exact",  # an answer must not depend on what was answered before
        )

    def _answer(
        self,
        served: Served,
        left: "Iterator[Line]",
        answers: "AnswerFile",
        total: int,
        defaults: dict[str, Any],
    ) -> tuple[int, bool]:
        """Answer what is left: 0, or the signal that ended it; and whether all threads ended."""
        if answers.answered >= total:
            return 0, True
        from transformer_vq.serve.job import Job
        from transformer_vq.show.answered import Answered

        engines = _engines(served)
        try:
            with Answered(total, answers.answered, answers.failed) as progress:
                job = Job(
                    left,
                    answers,
                    engines,
                    depth=2 * self.slots,
                    defaults=defaults,
                    seed=self.seed,
                    keeps_states=self.state_dir is not None,
                    tell=progress.one_more,
                )
                stopped = job.run()
        finally:
            closed = all([engine.close(LET_GO) for _, engine in engines])
        return stopped, closed


def _engines(served: Served) -> "list[tuple[Service, Engine]]":
    """One for each device of this process, none of them started."""
    import jax

    from transformer_vq.engine.engine import Engine
    from transformer_vq.serve.service import Service

    devices = jax.local_devices()
    found = []
    for device in devices if len(devices) > 1 else [None]:
        service = Service()
        load = functools.partial(served.load, service, device)
        found.append((service, Engine(load, service.deliver, max_queue=served.slots)))
    return found


def _shard(given: str | None) -> tuple[int, int]:
    """Which requests: every `count`-th, from the `index`-th on. Raises `UsageError`."""
    if given is None:
        return 0, 1
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", given)
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard is {shown(given)}: it must be I/N, with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def _defaults(given: str) -> dict[str, Any]:
    """The fields of `--body`. Raises `UsageError` for what no request may have."""
    from transformer_vq.serve.job import completion_request
    from transformer_vq.serve.protocol import ApiError

    try:
        fields = json.loads(given)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UsageError(
            f"--body is {shown(given)}: it must be a JSON object, such as '{{\"max_tokens\": 100}}'"
        )
    try:
        completion_request(fields)
    except ApiError as error:
        raise UsageError(f"--body: {error.message}") from None
    return fields
