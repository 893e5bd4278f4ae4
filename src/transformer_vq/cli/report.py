"""`tvq report`: a run as one page to look at."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from transformer_vq.cli.common import check_file, quoted, run_data, say, size, tell
from transformer_vq.cli.models import RunFolder, local
from transformer_vq.cli.parse import DataPaths, UsageError, flat, option
from transformer_vq.data import DataError, run_tokenizer

if TYPE_CHECKING:
    from transformer_vq.ops.evaluate import Evaluation

EVAL_TOKENS = 65_536


@dataclass
class Report:
    """Write one HTML page about a run: curves, speed, codebooks, samples, configuration.

    The page needs nothing but a browser, offline, and may be made while the run is going on. For
    the loss by position in context, and what the far part of the model brings there, the newest
    checkpoint scores the start of the validation split.
    """

    examples: ClassVar[str] = """
  tvq report --run runs/book
  tvq report --run runs/book --out book.html --no-eval
"""

    run: RunFolder
    out: Annotated[str, option("where to write it", "FILE", default="report.html of the run")] = ""
    data: Annotated[
        DataPaths, option("where its data are now", "PATH", default="those of the run")
    ] = ()
    no_eval: Annotated[bool, option("do not score any text: an instant instead of seconds")] = False

    def main(self) -> int:
        from transformer_vq.atomic import write_whole
        from transformer_vq.cli.info import describe
        from transformer_vq.io.hub import is_remote
        from transformer_vq.run.log import damaged_lines, read_metrics
        from transformer_vq.show.report import page

        if is_remote(self.run) and not self.out:
            raise UsageError(f"--out is missing: say where to write the report of {self.run}")
        folder = local(self.run)
        path = Path(self.out) if self.out else folder / "report.html"
        run = describe(folder) | {"run": str(self.run)}
        metrics, samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        for damage in filter(None, map(damaged_lines, (metrics, samples))):
            tell(f"{damage}: left out")
        check_file("--out", path)  # before the work
        evaluation, reason = None, "left out (--no-eval)"
        if not self.no_eval:
            try:
                evaluation = self._evaluate(folder)
            except DataError as error:
                reason = f"not measured: {error}"
                say(f"no loss by position: {error}")
        text = page(
            run,
            read_metrics(metrics),
            [sample for sample in read_metrics(samples) if "text" in sample],
            _environment(folder / "config.json"),
            evaluation or reason,
        )
        content = text.encode("utf-8", errors="replace")  # names of files may be anything
        write_whole(path, content)
        print(f"the report is in {quoted(path)}, {size(len(content))}")
        return 0

    def _evaluate(self, folder: Path) -> "Evaluation":
        from transformer_vq.cli.evaluate import score
        from transformer_vq.ops.evaluate import has_far_part
        from transformer_vq.run.folder import load_run

        model, info = load_run(folder)
        source = run_data(info.data, flat(self.data), run_tokenizer(folder, info.tokenizer))
        far_gain = has_far_part(model.config)
        part = source.split("validation")
        return score(model, info, part, max_tokens=EVAL_TOKENS, far_gain=far_gain)


def _environment(path: Path) -> dict[str, Any]:
    """Versions by name, as config.json has them; nothing if it has none, and that is told."""
    try:
        found = json.loads(path.read_bytes())["environment"]
        return dict(found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        tell(f"{path} cannot be used ({why}): no versions of programs")
        return {}
