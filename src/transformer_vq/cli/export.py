"""`tvq export`: a trained model as a folder that stands by itself."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from transformer_vq.cli.common import CheckpointOption, program, quoted, say, size, tell
from transformer_vq.cli.models import RunFolder
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.errors import cut, shown

if TYPE_CHECKING:
    from transformer_vq.run.export import Carried

LicenceOption = Annotated[
    str, option("licence of the model, for its card: mit, cc-by-4.0, ...", "NAME", default="none")
]
OverwriteOption = Annotated[bool, option("take the place of a model that was exported there")]


@dataclass
class Export:
    """Write a trained model as a folder that stands by itself, to carry, keep or publish.

    It holds the arrays of one checkpoint (model.safetensors), what they are (config.json), the
    vocabulary, what the training measured, and a model card (README.md), and needs no optimizer
    state: a third of a checkpoint or less. Every command takes it for --run, and `load` in Python;
    published on the Hugging Face Hub, it is --run hf:OWNER/NAME.
    """

    examples: ClassVar[str] = """
  tvq export --run runs/book --out book-model
  tvq export --run runs/book --out book-model --checkpoint best --dtype bfloat16 --license mit
  tvq sample --run book-model --prompt 'It was'
"""

    run: RunFolder
    out: Annotated[Path, option("folder to write, new or empty", "DIR")]
    checkpoint: CheckpointOption = "latest"
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        option("of the arrays: bfloat16 is half of float32", default="as trained"),
    ] = None
    license: LicenceOption = ""
    overwrite: OverwriteOption = False

    def main(self) -> int:
        check_licence(self.license)

        from transformer_vq.run.export import gather, require_free

        require_free(self.out, overwrite=self.overwrite)
        carried = gather(self.run, self.checkpoint, self.dtype)
        write_out(carried, self.out, licence=self.license, overwrite=self.overwrite)
        if any(os.path.isabs(path) for path in carried.info.data.paths):
            tell(
                f"config.json names the data as the run has them, {carried.info.data.path}: edit "
                f'its "data" before you publish it, if nobody should read that'
            )
        return 0


def check_licence(licence: str) -> None:
    """Raise `UsageError` for what is no name of a licence."""
    if licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .+()/-]{0,99}", licence):
        raise UsageError(
            f"--license is {shown(licence)}: it must be the name of a licence, at most 100 letters "
            f"and numbers"
        )


def write_out(
    carried: "Carried", out: Path, *, licence: str, overwrite: bool, origin: str = ""
) -> None:
    """Write the folder with its card, and say what it is."""
    from transformer_vq.run.export import write
    from transformer_vq.show.card import model_card

    name = out.resolve().name
    card = model_card(name, carried.info, carried.records, licence=licence, origin=origin)
    bytes_ = write(carried, out, card, overwrite=overwrite)
    info = carried.info
    say(
        f"the model at step {info.step:,} is in {quoted(out)}: {size(bytes_)} in "
        f"{info.config.param_dtype}"
    )
    if not carried.is_finite:
        tell("the model holds numbers that are not finite: its training diverged")
    verb = "draw" if info.data.image_shape else "sample"
    say(f"  {cut(program())} {verb} --run {quoted(out)}")
