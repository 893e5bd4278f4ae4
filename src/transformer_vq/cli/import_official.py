"""`tvq import-official`: weights of the paper's own implementation as an exported model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from transformer_vq.cli.export import LicenceOption, OverwriteOption, check_licence, write_out
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.data import load_tokenizer
from transformer_vq.errors import shown

ORIGIN = (
    "Weights of the paper's own implementation (https://github.com/transformer-vq/transformer_vq), "
    "converted by `tvq import-official`."
)


@dataclass
class ImportOfficial:
    """Make an exported model of weights that the paper's own implementation trained.

    The weights are a checkpoint of flax (a file checkpoint_STEP, such a folder, or the folder of
    several: the newest) or an .npz with an array for each path. The configuration is JSON, or text
    with a line for each field, as d_model: 768 or --d_model=768: its scripts, what it prints when
    it starts, and the config.yaml of wandb will do. Its gated models are supported, those with
    sampling: MLPs, and the models of its later branch, are not.

    Where the tokens are bytes, it has three special ones before them; here they come after them,
    so that the model takes bytes as all others do.
    """

    examples: ClassVar[str] = """
  tvq import-official --weights checkpoint_125000 --config enwik8.json --out enwik8-model
  tvq import-official --weights ckpts/ --config lm_pg19.sh --tokenizer pg19.model --out pg19 \\
      --field block_len=512 mem_len=512 n_code=512 sequence_len=8192 \\
      --field agg_cache=1 grad_thru_cache=1 dtype=bfloat16
  tvq sample --run enwik8-model --prompt 'It was'
"""

    weights: Annotated[Path, option("checkpoint of flax, folder of such, or .npz", "PATH")]
    out: Annotated[Path, option("folder to write, new or empty", "DIR")]
    config: Annotated[
        Path | None, option("its configuration", "FILE", default="fields beside the weights")
    ] = None
    field: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        option("fields that the file lacks, or has otherwise", "NAME=VALUE...", default="none"),
    ] = ()
    tokenizer: Annotated[
        Path | None,
        option("its vocabulary, a .model of SentencePiece", "FILE", default="bytes"),
    ] = None
    license: LicenceOption = ""
    overwrite: OverwriteOption = False

    def main(self) -> int:
        check_licence(self.license)

        from transformer_vq.io.official_files import read_fields
        from transformer_vq.run.export import require_free
        from transformer_vq.run.official import import_official

        given = self._given()
        require_free(self.out, overwrite=self.overwrite)
        fields = {} if self.config is None else read_fields(self.config)
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        carried = import_official(self.weights, fields | given, tokenizer)
        write_out(carried, self.out, licence=self.license, overwrite=self.overwrite, origin=ORIGIN)
        return 0

    def _given(self) -> dict[str, Any]:
        """The fields of --field. Raises `UsageError` for what is none."""
        from transformer_vq.io.official_files import field_value

        fields = {}
        for text in (text for group in self.field for text in group):
            name, equals, value = text.partition("=")
            if not (equals and name.isidentifier() and value):
                raise UsageError(f"--field is {shown(text)}: it must be NAME=VALUE")
            fields[name] = field_value(value)
        return fields
