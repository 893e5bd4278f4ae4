"""`tvq bench compile`: what programs need on devices that are not here."""

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from transformer_vq import costs
from transformer_vq.cli.common import number, size
from transformer_vq.cli.parse import as_usage, option, overrides, require_whole
from transformer_vq.config import MeshConfig, ModelConfig, TrainConfig
from transformer_vq.presets import PRESETS

if TYPE_CHECKING:
    ConfigOptions = dict[str, Any]
    TrainOptions = dict[str, Any]
    MeshOptions = dict[str, Any]
else:
    ConfigOptions = overrides(ModelConfig, "ConfigOptions", lambda f: "(default: the preset's)")
    TrainOptions = overrides(TrainConfig, "TrainOptions", lambda f: "(default: the preset's)")
    MeshOptions = overrides(MeshConfig, "MeshOptions", lambda f: f"(default: {f.default})")


@dataclass
class Compile:
    """Compile programs for devices that are not here, and tell what they need of each.

    Seconds, memory, what devices exchange, and copies of a whole state in the loop of decoding.
    Takes the extra `tpu` (libtpu) for TPUs, no accelerator, and no memory for the model. For CUDA,
    programs are lowered and not compiled: that nothing of them is missing there.
    """

    examples: ClassVar[str] = """
  tvq bench compile --topology v5e:1x1 v5e:2x4 --preset pg19 --programs decode prefill
  tvq bench compile --topology v5e:16x16 --preset pg19 --programs train --mesh.fsdp 16
  tvq bench compile --topology cuda:8 --preset small --json
"""

    topology: Annotated[
        tuple[str, ...],
        option("devices: v5e:2x4, v5p:2x2x1 and the like; cuda[:N], cpu[:N]", "NAME..."),
    ]
    preset: Annotated[str, option(f"model: {', '.join(PRESETS)}; --config.* change it", "NAME")] = (
        "small"
    )
    programs: Annotated[
        tuple[Literal["decode", "sample", "prefill", "train"], ...],
        option("what to compile", "NAME..."),
    ] = ("decode", "prefill", "train")
    batch: Annotated[
        int, option("rows of a device, in all but train: see --train.batch-size", "INT")
    ] = 8
    json: Annotated[bool, option("print JSON: one object for each program and topology")] = False
    config: tyro.conf.FlagConversionOff[ConfigOptions] = field(default_factory=dict)
    train: tyro.conf.FlagConversionOff[TrainOptions] = field(default_factory=dict)
    mesh: tyro.conf.FlagConversionOff[MeshOptions] = field(default_factory=dict)

    def main(self) -> int:
        require_whole("--batch", self.batch, high=10**6)
        try:
            config = ModelConfig.preset(self.preset, **self.config)
        except ValueError as error:
            raise as_usage(error, "--config.", ModelConfig) from None
        try:
            train = TrainConfig.preset(self.preset, **self.train)
        except ValueError as error:
            raise as_usage(error, "--train.", TrainConfig) from None
        try:
            mesh = MeshConfig(**self.mesh)
        except ValueError as error:
            raise as_usage(error, "--mesh.", MeshConfig) from None

        # Before JAX is imported: it is to look for no device, and to ask nobody for one.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        from transformer_vq.measure import compile
        from transformer_vq.measure.memory import trim_after_compiling

        trim_after_compiling()
        targets = [compile.target(topology, mesh) for topology in self.topology]
        about = {"preset": self.preset, "parameters": costs.parameter_count(config)}
        about |= compile.versions()
        if not self.json:
            print(
                f"{self.preset}: {number(about['parameters'])} parameters, {config.compute_dtype}; "
                f"jax {about['jax']}, libtpu {about['libtpu'] or '(none)'}"
            )
        failed = False
        for target in targets:
            if not self.json:
                print(_target_line(target), flush=True)
            for record in compile.compile_programs(
                config, train, target, self.programs, rows=self.batch
            ):
                failed |= "failed" in record
                print(json.dumps(about | record) if self.json else _line(record), flush=True)
        return int(failed)


def _target_line(target: Any) -> str:
    axes = ", ".join(f"{name} {count}" for name, count in target.mesh.shape.items())
    return f"{target.topology}: {target.mesh.size} x {target.kind}; mesh {axes}"


def _line(record: dict[str, Any]) -> str:
    """A program in a few lines."""
    head = f"  {record['program']:<8}{record['rows']:g} rows a device: "
    if "operations" in record:
        return (
            f"{head}lowered in {record['lowered_seconds']:.1f} s, "
            f"{record['operations']:,} operations; not compiled"
        )
    if "failed" in record:
        return f"{head}{record['failed']}"
    lines = [f"{head}compiled in {record['compile_seconds']:.1f} s"]
    if memory := record.get("memory"):
        parts = (f"{name} {size(count)}" for name, count in memory.items() if name != "total")
        lines.append(f"memory {size(memory['total'])}: {', '.join(parts)}")
    exchanged = (
        f"{kind} {size(x['bytes'])} in {x['times']:,}" for kind, x in record["collectives"].items()
    )
    lines.append(f"exchanged: {', '.join(exchanged) or 'nothing'}")
    if record.get("flops"):
        lines.append(f"{number(record['flops'])}FLOP by formula")
    if record.get("xla_flops"):
        lines.append(f"{number(record['xla_flops'])}FLOP by XLA, which counts a loop once")
    if copies := record.get("copies"):
        wasted = copies["copies"] + copies["returns"]
        lines.append(
            f"copies of {size(copies['least_bytes'])} or more in a step: {wasted or 'none'}"
            + f" ({copies['returns']} back from the chip's own memory)" * (wasted > 0)
            + f"; {copies['reads']} read ahead" * (copies["reads"] > 0)
        )
    return "\n          ".join(lines)
