"""`tvq bench decode --profile`: what operations touch, whose they are, how long they took."""

import json
import re

import pytest

from tests.helpers import fails
from tests.measure.sizes import TINY
from transformer_vq.cli import main
from transformer_vq.measure import bench
from transformer_vq.measure.hlo import Program
from transformer_vq.measure.profile import by_layer

# From jaxlib 0.11 on Python 3.12, of its own types; as an error it would end the process.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")

# A table of 100 rows, of which a step reads one and writes one; and a product.
UNIT = "jit(f)/while/body/jit(g)/unit/in/dot_general"
AT = 'metadata={op_name="jit(f)/at"}'
TEXT = f"""HloModule jit_step, is_scheduled=true

%update (p.0: f32[100,8], p.1: f32[1,8], p.2: s32[]) -> f32[100,8] {{
  %p.0 = f32[100,8]{{1,0}} parameter(0)
  %p.1 = f32[1,8]{{1,0}} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{{1,0}} dynamic-slice(%p.0, %p.2, %zero), dynamic_slice_sizes={{1,8}}
  %sum = f32[1,8]{{1,0}} add(%row, %p.1)
  ROOT %out = f32[100,8]{{1,0}} dynamic-update-slice(%p.0, %sum, %p.2, %zero)
}}

ENTRY %main (table: f32[100,8], x: f32[1,8], w: f32[8,8], i: s32[]) -> f32[100,8] {{
  %table = f32[100,8]{{1,0}} parameter(0)
  %x = f32[1,8]{{1,0}} parameter(1)
  %w = f32[8,8]{{1,0}} parameter(2)
  %i = s32[] parameter(3)
  %dot.1 = f32[1,8]{{1,0}} dot(%x, %w), metadata={{op_name="{UNIT}"}}
  ROOT %update.1 = f32[100,8]{{1,0}} fusion(%table, %dot.1, %i), calls=%update, {AT}
}}
"""


def test_operations_by_layer_with_the_bytes_of_what_they_take():
    times = {"dot.1": (6, 3e-6), "update.1": (6, 9e-6), "elsewhere": (1, 1.0)}
    update, dot = by_layer(Program.parse(TEXT), times, 3)
    assert (dot.layer, dot.kind, dot.calls) == ("unit/in", "dot", 2)
    assert dot.seconds == pytest.approx(1e-6)
    assert dot.bytes == 2 * 4 * (8 + 64 + 8)
    assert (update.layer, update.kind) == ("other", "loop with dynamic-update-slice")
    assert update.bytes == 2 * (4 * 8 * 3 + 4)  # a row read, one written, what is added, an index


def test_a_product_without_a_name_is_of_the_layer_that_uses_it():
    text = re.sub(r"(%dot.1 .*), metadata.*", r"\1", TEXT).replace("jit(f)/at", "jit(f)/a/at")
    assert [row.layer for row in by_layer(Program.parse(text), {"dot.1": (1, 1e-6)}, 1)] == ["a"]


def test_what_takes_all_of_a_table_is_counted_whole():
    text = TEXT.replace("add(%row, %p.1)", "add(%row, %p.1), other={%p.0}").replace(
        "%sum = f32[1,8]{1,0} add(%row,", "%sum = f32[1,8]{1,0} reduce(%p.0, %row,"
    )
    (update,) = by_layer(Program.parse(text), {"update.1": (1, 1e-6)}, 1)
    assert update.bytes > 4 * 800


@pytest.mark.slow
def test_a_step_as_a_table_and_as_json(capsys, monkeypatch):
    monkeypatch.setenv("TVQ_CACHE", "")
    monkeypatch.setattr(bench, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(bench, "PROBE_SIZE", 128)
    arguments = ["bench", "decode", "--preset", "tiny", *TINY, "--batch", "1", "--profile"]
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    layers = {op["layer"] for op in row["operations"]}
    assert any("project_in" in layer for layer in layers) and any("draw" in x for x in layers)
    assert all(op["seconds"] >= 0 and op["calls"] > 0 for op in row["operations"])
    logits = [op for op in row["operations"] if op["layer"].startswith("logits")]
    assert sum(op["bytes"] for op in logits) > 4 * 16 * 256  # of their matrix alone
    said = fails(capsys, 2, "bench", "train", "--profile")
    assert "--draft and --weights are for tvq bench decode, and this is train" in said
