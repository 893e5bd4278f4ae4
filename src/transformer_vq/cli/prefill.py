"""`tvq prefill`: a prompt is read once, and the state that it leaves is kept."""

import time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from transformer_vq.cli.common import CheckpointOption, size
from transformer_vq.cli.models import (
    FarOptions,
    RunFolder,
    StateOption,
    WeightsOption,
    check_save_state,
    local,
    open_model,
    open_run,
    prompt_tokens,
    read,
    require_probabilities,
)
from transformer_vq.cli.parse import UsageError, option
from transformer_vq.cli.text import printable


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
    state: StateOption = None
    weights: WeightsOption = "as-saved"
    far: FarOptions = field(default_factory=dict)

    def main(self) -> int:
        check_save_state(self.save_state)

        from transformer_vq import costs
        from transformer_vq.io.state import save_state

        folder = local(self.run)
        info, tokenizer = open_run(folder, self.checkpoint)
        if info.data.image_shape:
            raise UsageError(f"the run in {self.run} draws pictures, which have no prompt")
        prompt = prompt_tokens("", self.prompt_file, tokenizer)
        if not prompt:
            raise UsageError("--prompt-file is empty: give a prompt of one byte or more")
        model, given = open_model(folder, info, self.far, self.state, self.weights)
        began = time.monotonic()
        state = read(model, prompt, given, room=256)
        seconds = time.monotonic() - began
        require_probabilities(state, self.run, info.step)
        save_state(self.save_state, state, model)
        print(f"read {len(prompt):,} tokens, {len(prompt) / seconds:,.0f} tokens/s")
        print(
            f"the state is in {printable(self.save_state)}: "
            f"{size(costs.state_bytes(model.config))} for a sequence, now "
            f"{int(state.position[0]):,} tokens long"
        )
        return 0
