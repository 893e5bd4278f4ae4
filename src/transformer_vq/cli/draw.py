"""`tvq draw`: pictures, by a model that was trained on some."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes

from transformer_vq.cli.common import CheckpointOption, check_folder, progress_bar
from transformer_vq.cli.models import RunFolder, local, open_model, open_run
from transformer_vq.cli.parse import UsageError, as_usage, option
from transformer_vq.cli.sampling import sampling_options, sampling_values
from transformer_vq.cli.text import printable
from transformer_vq.run.log import to_json

MOST_IMAGES = 10_000  # they are kept in memory for the sheet of all

if TYPE_CHECKING:
    from types import SimpleNamespace as DrawOptions
else:
    DrawOptions = sampling_options(
        "DrawOptions",
        without=("max_tokens", "min_tokens", "stop", "logprobs"),
        changed={"seed": (0, "of the first picture; the next has the next")},
    )


@dataclass
class Draw:
    """Draw pictures with a model that was trained on pictures, each from nothing.

    Every picture has a seed of its own, and depends on no other one. They are written as PNGs, and
    all of them as one sheet, contact.png.
    """

    examples: ClassVar[str] = """
  tvq draw --run runs/pictures
  tvq draw --run runs/pictures --num-images 64 --out drawn --temperature 0.9
"""

    run: RunFolder
    checkpoint: CheckpointOption = "latest"
    num_images: Annotated[int, option("pictures to draw")] = 16
    out: Annotated[str, option("folder for the pictures and contact.png", "DIR")] = "samples"
    sampling: OmitArgPrefixes[DrawOptions] = field(default_factory=DrawOptions)
    json: Annotated[bool, option("print JSON: where the pictures are")] = False

    def main(self) -> int:
        if not 1 <= self.num_images <= MOST_IMAGES:
            raise UsageError(
                f"--num-images is {self.num_images}: it must be from 1 to {MOST_IMAGES:,}"
            )

        from transformer_vq import SamplingParams
        from transformer_vq.cli.images import draw_images, write_images

        def params(i: int, max_tokens: int, banned: range) -> SamplingParams:
            values = sampling_values(self.sampling)
            values["seed"] += i
            values["banned_tokens"] = [*values["banned_tokens"], *banned]
            try:
                return SamplingParams(max_tokens=max_tokens, **values)
            except ValueError as error:
                raise as_usage(error, "--", SamplingParams) from None

        for i in (0, self.num_images - 1):  # wrong ones are refused before anything is read
            params(i, 1, range(0))
        folder = local(self.run)
        info, tokenizer = open_run(folder, self.checkpoint)
        shape = info.data.image_shape
        if not shape:
            raise UsageError(
                f"the run in {self.run} was not trained on pictures: tvq sample writes text with it"
            )
        Path(self.out).mkdir(parents=True, exist_ok=True)  # before the work
        check_folder(f"--out is {self.out}", Path(self.out))
        model, _ = open_model(folder, info, {})
        # A model may have more tokens than there are bytes: those mean nothing.
        banned = range(tokenizer.vocab_size, model.config.vocab_size)
        every = [params(i, math.prod(shape), banned) for i in range(self.num_images)]
        with progress_bar("drawing", quiet=self.json) as show:
            images = draw_images(model, every, shape, tokenizer.eos_id, show)
        sheet = write_images(images, Path(self.out))
        if self.json:
            record = {"run": str(self.run), "step": info.step, "out": self.out}
            record |= {"seed": self.sampling.seed, "images": len(images)}
            print(to_json({**record, "contact_sheet": str(sheet)}))
        else:
            name = printable(self.out)
            print(f"{len(images)} pictures of {' x '.join(map(str, shape))} are in {name}")
            print(f"all of them: {printable(str(sheet))}")
        return 0
