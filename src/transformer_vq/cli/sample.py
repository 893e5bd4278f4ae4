"""`tvq sample`: text, as it comes."""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import OmitArgPrefixes

from transformer_vq.cli.common import CheckpointOption, tell
from transformer_vq.cli.models import (
    DraftOption,
    FarOptions,
    RunFolder,
    WeightsOption,
    check_save_state,
    local,
    open_draft,
    open_model,
    open_run,
    prompt_tokens,
    read,
    require_probabilities,
    session,
    state_after,
)
from transformer_vq.cli.parse import UsageError, as_usage, option
from transformer_vq.cli.sampling import sampling_options, sampling_values
from transformer_vq.cli.text import logprob_line, printable, unescape
from transformer_vq.data import ByteTokenizer, StreamDecoder, Tokenizer
from transformer_vq.run.log import to_json
from transformer_vq.serve.text import TextStops

if TYPE_CHECKING:
    from transformer_vq import Model, SamplingParams, Token

MOST_SAMPLES = 1_000_000
MOST_STOPS = 8

if TYPE_CHECKING:
    from types import SimpleNamespace as SampleOptions
else:
    SampleOptions = sampling_options(
        "SampleOptions",
        changed={
            "max_tokens": (256, "tokens to write, 1 or more"),
            "stop": ((), "end before this text; \\n is a line break; can be given several times"),
            "seed": (0, "of the first sample; the next has the next"),
            "logprobs": (False, "a line per token: log-probability, and what else was likely"),
        },
    )


@dataclass
class Sample:
    """Write text with a trained model, as it comes.

    A prompt of any length is read in bounded memory, and every token takes the same time. Bytes
    that are no text show as U+FFFD or as ^A; --json has them exactly, as token ids. A prompt is
    text, letters such as <|endoftext|> too; a terminal shows it before the text, a file or a pipe
    gets what follows it. Pictures are drawn by tvq draw.
    """

    examples: ClassVar[str] = """
  tvq sample --run runs/book --prompt 'It was' --temperature 0.8
  tvq sample --run runs/book --prompt-file page.txt --stop '\\n\\n'
  tvq sample --run runs/book --prompt 'It was' --save-state s.tvq
  tvq sample --run runs/book --state s.tvq --prompt ' and so' --json
  tvq sample --run runs/book --prompt 'It was' --draft text
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    prompt: Annotated[str, option("text to continue", "TEXT", default="empty")] = ""
    prompt_file: Annotated[
        str | None,
        option("the prompt from a file, any bytes; -: standard input", "FILE", default="none"),
    ] = None
    sampling: OmitArgPrefixes[SampleOptions] = field(default_factory=SampleOptions)
    num_samples: Annotated[int, option("samples, one after another")] = 1
    state: Annotated[
        str | None,
        option("go on from a saved state; a prompt comes after it", "FILE", default="none"),
    ] = None
    save_state: Annotated[
        str | None, option("save the state after what was written", "FILE", default="none")
    ] = None
    draft: DraftOption = None
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)
    json: Annotated[bool, option("print JSON: text, token ids, log-probabilities if asked")] = False
    num_images: Annotated[int | None, option("as of tvq draw", default="none")] = None
    out: Annotated[str | None, option("as of tvq draw", "DIR", default="none")] = None

    def main(self) -> int:
        if self.num_images is not None or self.out is not None:
            return self._draw()
        self._check_options()
        self._params(self.sampling.seed)  # wrong ones are refused before anything is read
        self._params(self.sampling.seed + self.num_samples - 1)

        from transformer_vq.io.state import save_state

        folder = local(self.run)
        info, tokenizer = open_run(folder, self.checkpoint)
        if info.data.image_shape:
            raise UsageError(f"the run in {self.run} draws pictures: tvq draw --run {self.run}")
        prompt = prompt_tokens(self.prompt, self.prompt_file, tokenizer)
        model, given = open_model(folder, info, self.far, self.state, self.weights)
        draft = open_draft(self.draft)
        # What is written goes on from the prompt; nobody knows the text of a state.
        decoder = StreamDecoder(tokenizer, prompt or (None if given is not None else ()))
        several = info.data.documents > 1  # then the model knows where a document ends
        if not prompt and given is None:
            prompt = [tokenizer.eos_id if several else tokenizer.start_id]

        # What all samples share is read once, unless penalties or drafts need to know the prompt.
        shared = self.sampling.repetition_penalty == 1 and not draft
        start, unread = given, prompt
        if shared and prompt:
            start = read(model, prompt, given, room=self.sampling.max_tokens, quiet=self.json)
            unread = []
        if start is not None:
            require_probabilities(start, self.run, info.step)
        records, state, guessed, right = [], None, 0, 0
        for i in range(self.num_samples):
            seed = self.sampling.seed + i
            params = self._params(seed, tokenizer, model, ends=several)
            if self.num_samples > 1 and not self.json:
                header = f"── sample {i + 1} of {self.num_samples}, seed {seed} "
                print(("\n" if i else "") + header.ljust(60, "─"))
            request = session(model, unread, params, start, draft)
            if unread:
                request.read_prompts()
                require_probabilities(request.state, self.run, info.step)
            if sys.stdout.isatty() and not (self.json or self.sampling.logprobs):
                print(printable(self.prompt), end="", flush=True)  # a file gets the rest alone
            tokens, text = self._write(request, tokenizer, decoder)
            guessed, right = guessed + request.drafted[0], right + request.drafted[1]
            if self.json:
                records.append(self._record(seed, tokens, text))
            if self.save_state:
                state = state_after(model, start, unread, tokens, request, params.max_tokens)
        if self.draft is not None:
            share = f", {right / guessed:.0%} of them right" if guessed else ""
            tell(f"{guessed:,} tokens were guessed ahead{share}")
        if self.json:
            head = {"run": str(self.run), "step": info.step, "prompt_tokens": len(prompt)}
            if self.draft is not None:
                head |= {"guessed": guessed, "right": right}
            print(to_json(head | {"samples": records}))
        if state is not None and self.save_state:
            save_state(self.save_state, state, model)
            tell(f"the state is in {self.save_state}")
        return 0

    def _check_options(self) -> None:
        """Raise `UsageError` for what makes no sense, whatever the run is."""
        if not 1 <= self.num_samples <= MOST_SAMPLES:
            raise UsageError(
                f"--num-samples is {self.num_samples}: it must be from 1 to {MOST_SAMPLES:,}"
            )
        if self.save_state is not None and self.num_samples > 1:
            raise UsageError(
                f"--save-state keeps one state and --num-samples is {self.num_samples}: make it 1"
            )
        if self.prompt and self.prompt_file is not None:
            raise UsageError("--prompt and --prompt-file are both given: give one")
        if not all(self.sampling.stop):
            raise UsageError("--stop is empty: give a text of one character or more")
        if len(self.sampling.stop) > MOST_STOPS:
            raise UsageError(
                f"--stop is given {len(self.sampling.stop)} times: at most {MOST_STOPS} fit"
            )
        check_save_state(self.save_state)

    def _draw(self) -> int:
        """What this command did for pictures before `tvq draw` did it."""
        from transformer_vq.cli.draw import Draw, DrawOptions

        usual = Sample(self.run)
        parts: list[Any] = [(DrawOptions, self.sampling, usual.sampling), (Draw, self, usual)]
        taken = []
        for kind, given, default in parts:
            names = {f.name for f in dataclasses.fields(kind)}
            values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
            for name in values.keys() - names:
                if values[name] != getattr(default, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} is for text, and --num-images and --out draw "
                        f"pictures (see tvq draw --help): leave it out"
                    )
            taken.append({n: v for n, v in values.items() if n in names and v is not None})
        sampling, options = taken
        return Draw(**{**options, "sampling": DrawOptions(**sampling)}).main()

    def _params(
        self,
        seed: int,
        tokenizer: Tokenizer | None = None,
        model: "Model | None" = None,
        *,
        ends: bool = False,
    ) -> "SamplingParams":
        """What tokens of this model are drawn by. `ends`: stop where it ends a document."""
        from transformer_vq import SamplingParams

        values, tokenizer = sampling_values(self.sampling), tokenizer or ByteTokenizer()
        # A model may have more tokens than its vocabulary has: those mean nothing.
        size = tokenizer.vocab_size if model is None else model.config.vocab_size
        banned = [*values["banned_tokens"], *range(tokenizer.vocab_size, size)]
        stop: list[list[int]] = [[tokenizer.eos_id]] if ends else []
        if isinstance(tokenizer, ByteTokenizer):  # else `_write` looks for them in the text
            stop += [tokenizer.encode(unescape(text)) for text in self.sampling.stop]
        try:
            return SamplingParams(**{**values, "seed": seed, "stop": stop, "banned_tokens": banned})
        except ValueError as error:
            raise as_usage(error, "--", SamplingParams) from None

    def _write(
        self, request: Any, tokenizer: Tokenizer, decoder: StreamDecoder
    ) -> "tuple[list[Token], str]":
        """The tokens of a request and their text, shown on the terminal as it comes.

        They end before a stop text: a token that holds its beginning is left out.
        """
        by_text = () if isinstance(tokenizer, ByteTokenizer) else map(unescape, self.sampling.stop)
        stops, tokens, text = TextStops(by_text), [], ""
        sizes = [0]  # characters of the text after each number of tokens

        def show(piece: str) -> None:
            if not (self.json or self.sampling.logprobs):
                print(printable(piece), end="", flush=True)

        try:
            for token in request:
                line = ""
                if self.sampling.logprobs and not self.json:
                    line = logprob_line(token, tokenizer, decoder)
                tokens.append(token)
                piece = decoder.push(token)
                sizes.append(sizes[-1] + len(piece))
                if len(tokens) > self.sampling.min_tokens:
                    piece = stops.push(piece)
                text += piece
                show(piece)
                if stops.found:
                    break
                print(line, end="", flush=True)
        finally:  # also if it is interrupted
            rest = stops.flush(decoder.flush())
            show(rest + "\n")
        if stops.found:
            kept = sizes.index(max(size for size in sizes if size <= len(text)))
            tokens = tokens[: max(kept, self.sampling.min_tokens)]
        return tokens, text + rest

    def _record(self, seed: int, tokens: "list[Token]", text: str) -> dict[str, Any]:
        record: dict[str, Any] = {
            "seed": seed,
            "text": text,
            "tokens": [int(token) for token in tokens],
            "stopped": len(tokens) < self.sampling.max_tokens,
        }
        if self.sampling.logprobs:
            record["logprobs"] = [token.logprob for token in tokens]
            record["top_logprobs"] = [token.top_logprobs for token in tokens]
        return record
