"""The text of compiled programs: what loops copy and devices exchange, on recorded text; and copies
on programs that XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest

from transformer_vq.measure import hlo

# As a TPU has it, with the details cut that nothing looks at. S(1): the memory beside the units.
TEXT = """\
HloModule jit_program, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%turned (param_0: f32[8,128]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.9 = f32[8,128]{0,1:T(8,128)} copy(%param_0)
}

%added (param_0.1: f32[8,128], param_1: f32[8,128]) -> f32[8,128] {
  %param_0.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %copy.8 = f32[8,128]{1,0:T(8,128)} copy(%param_1)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%param_0.1, %copy.8)
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.2 = f32[] add(%x, %y)
}

%summed_and_cut (param_0.2: bf16[64,16]) -> bf16[8,16] {
  %param_0.2 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%param_0.2), channel_id=3, to_apply=%sum
  ROOT %dynamic-slice.1 = bf16[8,16]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.3, %c, %c)
}

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %table = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %ahead = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%table)
  %there = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%ahead)
  %back = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%there)
  %here = f32[8,128]{1,0:T(8,128)} copy-done(%back)
  %copy.1 = f32[8,128]{1,0:T(8,128)} copy(%here), metadata={op_name="a) = b(c"}
  %small = f32[4,128]{1,0:T(8,128)} copy(%rows)
  %fusion.1 = f32[8,128]{0,1:T(8,128)} fusion(%copy.1), kind=kLoop, calls=%turned
  %fusion.2 = f32[8,128]{1,0:T(8,128)} fusion(%copy.1, %fusion.1), kind=kLoop, calls=%added
  %gathered = (f32[1,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%row), dimensions={0}
  %row = f32[1,128]{1,0} slice(%fusion.2), slice={[0:1], [0:128]}
  %gathered.1 = f32[8,128]{1,0} all-gather-done(%gathered)
  ROOT %tuple = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %gathered.1)
}

%condition (arg.1: (s32[], f32[8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%counted (arg.2: (s32[], f32[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7), metadata={op_name="jit(f)"}
  %arg.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%permuting (arg.3: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %here = f32[8,128]{1,0} get-tuple-element(%arg.3), index=1
  %sent = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[]) collective-permute-start(%here)
  %received = f32[8,128]{1,0} collective-permute-done(%sent)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %received)
}

%up_to_8 (arg.4: (u32[], f32[8,128])) -> pred[] {
  %constant.2 = u32[]{:T(128)} constant(8)
  %arg.4 = (u32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.4 = u32[]{:T(128)} get-tuple-element(%arg.4), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%i.4, %constant.2), direction=LT
}

%wide.windowed_dot_general_body_ag.1 (arg.5: (u32[], f32[8,128])) -> (u32[], f32[8,128]) {
  %arg.5 = (u32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.5 = u32[]{:T(128)} get-tuple-element(%arg.5), index=0
  %part = f32[8,128]{1,0} get-tuple-element(%arg.5), index=1
  %sent.1 = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[]) collective-permute-start(%part)
  %received.1 = f32[8,128]{1,0} collective-permute-done(%sent.1)
  %sent.2 = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[]) collective-permute-start(%received.1)
  %received.2 = f32[8,128]{1,0} collective-permute-done(%sent.2)
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i.5, %two), metadata={op_name="jit(f)"}
  ROOT %tuple.2 = (u32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %received.2)
}

ENTRY %main (p: f32[8,128], q: bf16[64,16]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(1)
  %once = f32[8,128]{1,0:T(8,128)} copy(%p)
  %fusion.3 = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%summed_and_cut
  %fusion.4 = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%summed_and_cut
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %while.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%while.1), condition=%counted, \
body=%permuting
  %while.3 = (u32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%while.2), condition=%up_to_8, \
body=%wide.windowed_dot_general_body_ag.1
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_copies_of_a_loop():
    """Copies, what goes back, what is read ahead; neither what is small, nor once, nor fused with
    arithmetic."""
    program = hlo.Program.parse(TEXT)
    found = hlo.large_copies(program, 8 * 128 * 4)
    assert found == hlo.Copies(copies=2, returns=1, reads=1, largest=4096)
    assert found.wasted == 3
    assert hlo.large_copies(program, 8 * 128 * 4 + 1) == hlo.Copies(0, 0, 0, 0)
    assert hlo.large_copies(program, 1).copies == 3  # the small one


def test_what_devices_exchange():
    """By kind, as often as loops run; of a result that names its operand; in fusions too, of which
    those with one channel are parts of one. A ring around a product counts by itself, and its loop
    by what it adds to its counter."""
    found = hlo.collectives(hlo.Program.parse(TEXT))
    assert found == {
        "all-gather": hlo.Traffic(count=1, times=24, bytes=24 * 8 * 128 * 4),
        "all-reduce": hlo.Traffic(count=1, times=1, bytes=64 * 16 * 2),
        "collective-matmul": hlo.Traffic(count=2, times=8, bytes=8 * 8 * 128 * 4),  # two a time
        "collective-permute": hlo.Traffic(count=1, times=7, bytes=7 * 8 * 128 * 4),
    }
    apart = hlo.collectives(hlo.Program.parse(TEXT.replace("channel_id=3, ", "")))
    assert apart["all-reduce"] == hlo.Traffic(count=2, times=2, bytes=2 * 64 * 16 * 2)


def test_arrays_of_types():
    types = "(s4[2,3]{1,0:T(8,128)S(1)}, pred[<=5]{0}, f8e4m3fn[7], token[], bf16[])"
    assert [(a.dtype, a.shape, a.space, a.bytes) for a in hlo.arrays_of(types)] == [
        ("s4", (2, 3), 1, 3),
        ("pred", (5,), 0, 5),
        ("f8e4m3fn", (7,), 0, 7),
        ("token", (), 0, 0),
        ("bf16", (), 0, 2),
    ]


def test_text_of_something_else():
    with pytest.raises(ValueError, match="no compiled program: it has no ENTRY"):
        hlo.Program.parse("module @jit_f {\n}\n")


@pytest.mark.parametrize("copied", [False, True])
def test_a_loop_of_this_machine(copied):
    """A table that is read after it is written is written in place; one of which the old version is
    still needed is copied."""

    def body(i, carry):
        table, total = carry
        new = table.at[i % 64].add(total[0, 0])
        return new, total + (table if copied else new) @ total

    def loop(table, total):
        return jax.lax.fori_loop(0, 9, body, (table, total))

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(shape, shape).compile()
    found = hlo.large_copies(hlo.Program.parse(compiled.as_text()), 64 * 64 * 4)
    assert (found.copies > 0) == copied
