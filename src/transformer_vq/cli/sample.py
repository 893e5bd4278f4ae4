"""`tvq sample` writes text; `tvq prefill` reads a prompt once and keeps the state it leaves."""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from tyro.conf import UseAppendAction

from transformer_vq.cli.common import CheckpointOption, progress_bar, size, standard_input
from transformer_vq.cli.parse import UsageError, as_usage, option
from transformer_vq.data import (
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    free_memory,
    load_bytes,
    run_tokenizer,
)
from transformer_vq.serve.text import TextStops

if TYPE_CHECKING:
    from transformer_vq import Model, SamplingParams, State, Token

PIECE = 16 * 1024  # tokens of a prompt between looks at the progress

RunFolder = Annotated[Path, option("folder of a trained run", "DIR")]


@dataclass
class Sample:
    """Write text with a trained model, as it comes; or draw pictures, if it was trained on some.

    A prompt of any length is read in bounded memory, and every token takes the same time. Bytes
    that are no text show as U+FFFD or as ^A; --json has them exactly, as token ids.
    """

    examples: ClassVar[str] = """
  tvq sample --run runs/book --prompt 'It was' --temperature 0.8
  tvq sample --run runs/book --prompt-file page.txt --stop '\\n\\n'
  tvq sample --run runs/book --prompt 'It was' --save-state s.tvq
  tvq sample --run runs/book --state s.tvq --prompt ' and so' --json
  tvq sample --run runs/pictures --num-images 64 --out drawn
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    prompt: Annotated[str, option("text to continue", "TEXT", default="empty")] = ""
    prompt_file: Annotated[
        str, option("the prompt from a file, any bytes; -: standard input", "FILE", default="none")
    ] = ""
    max_tokens: Annotated[int, option("tokens to write, 1 or more")] = 256
    temperature: Annotated[float, option("below 1 plainer, above 1 wilder; 0: the likeliest")] = 1.0
    top_p: Annotated[float, option("draw from the likeliest tokens of this total probability")] = (
        1.0
    )
    top_k: Annotated[int, option("draw from so many likeliest tokens; 0: all")] = 0
    min_p: Annotated[
        float, option("leave out tokens below this fraction of the likeliest's probability")
    ] = 0.0
    repetition_penalty: Annotated[
        float, option("above 1: discourage what is in prompt or output")
    ] = 1.0
    presence_penalty: Annotated[float, option("taken from scores of what was written")] = 0.0
    frequency_penalty: Annotated[float, option("the same, for each time it was written")] = 0.0
    seed: Annotated[int, option("of the first sample; the next has the next")] = 0
    num_samples: Annotated[int, option("samples, one after another")] = 1
    num_images: Annotated[int, option("pictures to draw, by a model of pictures")] = 0
    out: Annotated[
        str,
        option("folder for the pictures and contact.png, a sheet of all", "DIR", default="samples"),
    ] = ""
    stop: Annotated[
        UseAppendAction[tuple[str, ...]],
        option("end before this text; \\n is a line break; can be given several times", "TEXT"),
    ] = ()
    state: Annotated[
        str, option("go on from a saved state; a prompt comes after it", "FILE", default="none")
    ] = ""
    save_state: Annotated[
        str, option("save the state after what was written", "FILE", default="none")
    ] = ""
    logprobs: Annotated[
        bool, option("a line per token: log-probability, and what else was likely")
    ] = False
    json: Annotated[bool, option("print JSON: text, token ids, log-probabilities if asked")] = False

    def main(self) -> int:
        if self.num_samples < 1:
            raise UsageError(f"--num-samples is {self.num_samples}: it must be at least 1")
        if self.num_images < 0:
            raise UsageError(f"--num-images is {self.num_images}: it must be at least 1")
        if self.save_state and self.num_samples > 1:
            raise UsageError(
                f"--save-state keeps one state and --num-samples is {self.num_samples}: make it 1"
            )
        _check_folder(self.save_state)
        tokenizer = run_tokenizer(self.run)
        prompt = prompt_tokens(self.prompt, self.prompt_file, tokenizer)
        self._params(self.seed, tokenizer)  # wrong ones are refused before anything is read

        from transformer_vq.io.state import save_state

        model, info, given = open_model(self.run, self.state, self.checkpoint)
        if info.data.image_shape or self.num_images:
            return self._draw(model, info)
        if self.out:
            raise UsageError(
                f"--out is for pictures, and the run in {self.run} writes text: leave it out"
            )
        several = info.data.documents > 1  # then the model knows where a document ends
        seeds = range(self.seed, self.seed + self.num_samples)
        every = [self._params(seed, tokenizer, model, ends=several) for seed in seeds]
        if not prompt and given is None:
            prompt = [tokenizer.eos_id if several else tokenizer.start_id]

        # What all samples share is read once, unless penalties need to know what the prompt was.
        shared = self.repetition_penalty == 1
        start = given
        if shared and prompt:
            start = read(model, prompt, given, room=self.max_tokens, quiet=self.json)
        records, state = [], None
        for i, params in enumerate(every):
            if self.num_samples > 1 and not self.json:
                header = f"── sample {i + 1} of {self.num_samples}, seed {params.seed} "
                print(("\n" if i else "") + header.ljust(60, "─"))
            session = _session(model, [] if shared else prompt, params, start)
            tokens, text = self._write(session, tokenizer)
            records.append(self._record(params, tokens, text))
            if self.save_state:
                state = _state_after(model, start, [] if shared else prompt, tokens, session)
        if self.json:
            head = {"run": str(self.run), "step": info.step, "prompt_tokens": len(prompt)}
            print(json.dumps(head | {"samples": records}))
        if state is not None:
            save_state(self.save_state, state, model)
            print(f"tvq: the state is in {self.save_state}", file=sys.stderr)
        return 0

    def _draw(self, model: "Model", info: Any) -> int:
        """Pictures, each from nothing and with a seed of its own."""
        from transformer_vq.cli.images import draw_images, write_images

        shape, tokenizer = info.data.image_shape, ByteTokenizer()
        if not shape:
            raise UsageError(f"--num-images: the run in {self.run} was not trained on pictures")
        if not self.num_images:
            raise UsageError(f"the run in {self.run} draws pictures: give --num-images and --out")
        if self.prompt or self.prompt_file or self.state or self.save_state or self.stop:
            raise UsageError("pictures are drawn from nothing: give no prompt, state or stop text")
        for name in ("max_tokens", "num_samples", "logprobs"):
            if getattr(self, name) != getattr(Sample, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} is for text, and the run in {self.run} draws "
                    f"pictures: leave it out"
                )
        out = self.out or "samples"
        max_tokens = math.prod(shape)
        params = [
            dataclasses.replace(
                self._params(self.seed + i, tokenizer, model), max_tokens=max_tokens
            )
            for i in range(self.num_images)
        ]
        with progress_bar("drawing", quiet=self.json) as show:
            images = draw_images(model, params, shape, tokenizer.eos_id, show)
        sheet = write_images(images, Path(out))
        if self.json:
            record = {"run": str(self.run), "step": info.step, "out": out, "seed": self.seed}
            print(json.dumps({**record, "images": len(images), "contact_sheet": str(sheet)}))
        else:
            print(f"{len(images)} pictures of {' x '.join(map(str, shape))} are in {out}")
            print(f"all of them: {sheet}")
        return 0

    def _params(
        self,
        seed: int,
        tokenizer: Tokenizer,
        model: "Model | None" = None,
        *,
        ends: bool = False,
    ) -> "SamplingParams":
        """What tokens of this model are drawn by. `ends`: stop where it ends a document."""
        from transformer_vq import SamplingParams

        # A model may have more tokens than its vocabulary has: those mean nothing.
        size = tokenizer.vocab_size if model is None else model.config.vocab_size
        stop: list[list[int]] = [[tokenizer.eos_id]] if ends else []
        if isinstance(tokenizer, ByteTokenizer):  # else `_write` looks for them in the text
            stop += [tokenizer.encode(unescape(text)) for text in self.stop]
        try:
            return SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=seed,
                stop=stop,
                banned_tokens=range(tokenizer.vocab_size, size),
                logprobs=self.logprobs,
            )
        except ValueError as error:
            raise as_usage(error, "--", SamplingParams) from None

    def _write(self, session: Any, tokenizer: Tokenizer) -> "tuple[list[Token], str]":
        """The tokens of a session and their text, shown on the terminal as it comes.

        They end before a stop text: a token that holds its beginning is left out.
        """
        decoder, tokens, text = StreamDecoder(tokenizer), [], ""
        by_text = () if isinstance(tokenizer, ByteTokenizer) else map(unescape, self.stop)
        stops = TextStops(by_text)

        def show(piece: str) -> None:
            if not (self.json or self.logprobs):
                print(printable(piece), end="", flush=True)

        try:
            for token in session:
                tokens.append(token)
                piece = stops.push(decoder.push(token))
                text += piece
                show(piece)
                if stops.found:
                    break
                if self.logprobs and not self.json:
                    print(_logprob_line(token, tokenizer), end="", flush=True)
        finally:  # also if it is interrupted
            rest = stops.flush(decoder.flush())
            show(rest + "\n")
        while stops.found and len(tokenizer.decode_text(tokens)) > len(text):
            tokens.pop()
        return tokens, text + rest

    def _record(self, params: "SamplingParams", tokens: "list[Token]", text: str) -> dict[str, Any]:
        record: dict[str, Any] = {
            "seed": params.seed,
            "text": text,
            "tokens": [int(token) for token in tokens],
            "stopped": len(tokens) < params.max_tokens,
        }
        if self.logprobs:
            record["logprobs"] = [token.logprob for token in tokens]
            record["top_logprobs"] = [token.top_logprobs for token in tokens]
        return record


@dataclass
class Prefill:
    """Read a long prompt once, and keep the state it leaves, for `tvq sample --state`.

    The state has the same size after a line and after a library.
    """

    examples: ClassVar[str] = """
  tvq prefill --run runs/book --prompt-file book.txt --save-state book.tvq
  tvq sample --run runs/book --state book.tvq
"""

    run: RunFolder
    prompt_file: Annotated[str, option("what to read, any bytes; -: standard input", "FILE")]
    save_state: Annotated[str, option("where to keep the state", "FILE")]
    checkpoint: CheckpointOption = "latest"
    state: Annotated[str, option("go on from a saved state", "FILE", default="none")] = ""

    def main(self) -> int:
        _check_folder(self.save_state)
        prompt = prompt_tokens("", self.prompt_file, run_tokenizer(self.run))
        if not prompt:
            raise UsageError("--prompt-file is empty: give a prompt of one byte or more")

        from transformer_vq import costs
        from transformer_vq.io.state import save_state

        model, _, given = open_model(self.run, self.state, self.checkpoint)
        began = time.monotonic()
        state = read(model, prompt, given, room=256)
        seconds = time.monotonic() - began
        save_state(self.save_state, state, model)
        print(f"read {len(prompt):,} tokens, {len(prompt) / seconds:,.0f} tokens/s")
        print(
            f"the state is in {self.save_state}: {size(costs.state_bytes(model.config))} for a "
            f"sequence, now {int(state.position[0]):,} tokens long"
        )
        return 0


def open_model(
    folder: Path, state_file: str = "", checkpoint: str = "latest"
) -> "tuple[Model, Any, State | None]":
    """The model of a run, its info, and a state of it from a file, if one is named."""
    from transformer_vq.io.state import StateError, load_state
    from transformer_vq.measure.memory import trim_after_compiling
    from transformer_vq.run.folder import find_step, load_run

    trim_after_compiling()
    model, info = load_run(folder, find_step(folder, checkpoint))
    if not state_file:
        return model, info, None
    state = load_state(state_file, model)
    if len(state.position) != 1:
        raise StateError(f"{state_file} holds {len(state.position)} sequences: one is needed")
    return model, info, state


def _check_folder(save_state: str) -> None:
    """Raise `UsageError` now, and not after the work, if there is no place for the state."""
    if save_state and not Path(save_state).parent.is_dir():
        raise UsageError(f"--save-state is {save_state}: there is no such folder, make it first")


def prompt_tokens(text: str, file: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt given as text or in a file, as tokens."""
    if text and file:
        raise UsageError("--prompt and --prompt-file are both given: give one")
    most = free_memory() // 32  # bytes: a list of tokens takes several times as many
    if file == "-":
        content = standard_input().read(most + 1)
        if len(content) > most:
            raise UsageError(f"the standard input has more than {most:,} bytes: too much")
        return tokenizer.encode(content)
    return tokenizer.encode(load_bytes(file, max_bytes=most).tobytes() if file else text)


def read(
    model: "Model", prompt: list[int], state: "State | None", *, room: int, quiet: bool = False
) -> "State":
    """The state after a prompt, read piece by piece; `room`: for so many tokens more."""
    from transformer_vq.engine import prefill
    from transformer_vq.nn.model import init_state

    capacity = None
    if model.config.attention == "full":
        capacity = max(256, 1 << (len(prompt) + room - 1).bit_length())
    now = init_state(model.config, 1, capacity=capacity) if state is None else state
    with progress_bar("reading", quiet=quiet or len(prompt) <= PIECE) as show:
        for start in range(0, len(prompt), PIECE):
            piece = prompt[start : start + PIECE]
            now = prefill.read(model, now, [piece])
            np.asarray(now.position)  # wait, so that the speed shown is true
            show(start + len(piece), len(prompt))
    return now


def _session(
    model: "Model", prompt: list[int], params: "SamplingParams", state: "State | None"
) -> Any:
    from transformer_vq.engine.batch import Session

    return Session(model, [prompt], params, state)


def _state_after(
    model: "Model", start: "State | None", prompt: list[int], tokens: "list[Token]", session: Any
) -> "State":
    """The state after the tokens that were shown, no further.

    A stop text is in the session's state by the time it is found: then the tokens are read again.
    """
    before = 0 if start is None else int(start.position[0])
    consumed = [*prompt, *map(int, tokens)]
    if int(session.state.position[0]) == before + len(consumed):
        return session.state
    if not consumed:
        assert start is not None  # without a state there is a prompt
        return start
    return read(model, consumed, start, room=1, quiet=True)


# Text for terminals.


def unescape(text: str) -> str:
    r"""A stop text with \n, \t and \\ as what they mean: shells make line breaks hard to type."""
    meant = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    out, i = [], 0
    while i < len(text):
        pair = text[i : i + 2]
        out.append(meant.get(pair, text[i]))
        i += 2 if pair in meant else 1
    return "".join(out)


def printable(text: str) -> str:
    """The text with control characters as ^A, so that none of them reaches a terminal."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def _logprob_line(token: "Token", tokenizer: Tokenizer) -> str:
    """A token, its log-probability in nats, and the likeliest tokens with their probabilities."""
    best = list((token.top_logprobs or {}).items())[:4]
    others = "  ".join(f"{show_token(t, tokenizer)} {math.exp(p):.3f}" for t, p in best)
    return f"{show_token(token, tokenizer):6} {token.logprob:9.4f}   {others}\n"


def show_token(token: int, tokenizer: Tokenizer) -> str:
    """A token between quotes, as Python has it; a byte that is no text as a number."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"  # of the model, not of the vocabulary
    content = tokenizer.decode([int(token)])
    if len(content) == 1 and not 32 <= content[0] < 127:
        return f"0x{content[0]:02x}"
    return repr(content.decode(errors="replace"))
