"""Bytes are those that a text, written by hand as TPUs' compiler writes it, says are moved."""

from vitcls.costs import traffic

TEXT = """
HloModule jit_step, is_scheduled=true

%sliced (param_0: bf16[4,6,130], param_1: s32[]) -> bf16[6,130] {
  %param_0 = bf16[4,6,130]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %dynamic-slice.1 = bf16[1,6,130]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,6,130}
  ROOT %bitcast.1 = bf16[6,130]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
}

%nested (param_0.1: bf16[4,6,130], param_1.1: s32[], param_2.1: bf16[130,64]) -> f32[6,64] {
  %param_0.1 = bf16[4,6,130]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %param_2.1 = bf16[130,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %fusion.1 = bf16[6,130]{1,0:T(8,128)(2,1)} fusion(%param_0.1, %param_1.1), kind=kLoop, calls=%sliced
  ROOT %convolution.1 = f32[6,64]{1,0:T(8,128)S(1)} convolution(%fusion.1, %param_2.1), dim_labels=bf_io->bf
}

%updated (param_0.2: f32[4,6,64], param_1.2: f32[6,64], param_2.2: s32[]) -> f32[4,6,64] {
  %param_0.2 = f32[4,6,64]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[6,64]{1,0:T(8,128)S(1)} parameter(1)
  %param_2.2 = s32[]{:T(128)} parameter(2)
  %bitcast.2 = f32[1,6,64]{2,1,0:T(8,128)} bitcast(%param_1.2)
  ROOT %dynamic-update-slice.1 = f32[4,6,64]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.2, %bitcast.2, %param_2.2)
}

%body (carry: (s32[], bf16[4,6,130], f32[4,6,64])) -> (s32[], bf16[4,6,130], f32[4,6,64]) {
  %carry = (s32[]{:T(128)S(6)}, bf16[4,6,130]{2,1,0:T(8,128)(2,1)}, f32[4,6,64]{2,1,0:T(8,128)}) parameter(0)
  %gte.0 = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %gte.1 = bf16[4,6,130]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %gte.2 = f32[4,6,64]{2,1,0:T(8,128)} get-tuple-element(%carry), index=2
  %near.1 = bf16[130,64]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.2 = f32[6,64]{1,0:T(8,128)S(1)} fusion(%gte.1, %gte.0, %near.1), kind=kOutput, calls=%nested, metadata={op_name="jit(step)/product"}
  %fusion.3 = f32[4,6,64]{2,1,0:T(8,128)} fusion(%gte.2, %fusion.2, %gte.0), kind=kLoop, calls=%updated
  ROOT %tuple.1 = (s32[]{:T(128)S(6)}, bf16[4,6,130]{2,1,0:T(8,128)(2,1)}, f32[4,6,64]{2,1,0:T(8,128)}) tuple(%gte.0, %gte.1, %fusion.3)
}

%condition (carry.1: (s32[], bf16[4,6,130], f32[4,6,64])) -> pred[] {
  %carry.1 = (s32[]{:T(128)S(6)}, bf16[4,6,130]{2,1,0:T(8,128)(2,1)}, f32[4,6,64]{2,1,0:T(8,128)}) parameter(0)
  %gte.3 = s32[]{:T(128)S(6)} get-tuple-element(%carry.1), index=0
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %compare.1 = pred[]{:T(512)S(6)} compare(%gte.3, %constant.1), direction=LT
}

ENTRY %main (x: bf16[4,6,130], y: f32[4,6,64], z: f32[128,8]) -> f32[4,6,64] {
  %x = bf16[4,6,130]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[4,6,64]{2,1,0:T(8,128)} parameter(1)
  %z = f32[128,8]{0,1:T(8,128)} parameter(2)
  %copy-start.1 = (f32[128,8]{0,1:T(8,128)S(1)}, f32[128,8]{0,1:T(8,128)}, u32[]{:S(2)}) copy-start(%z)
  %copy-done.1 = f32[128,8]{0,1:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[128,8]{0,1:T(8,128)}), f32[128,1]{0,1:T(1,128)S(1)}, s32[]{:S(2)}) slice-start(%z), slice={[0:128], [0:1]}
  %slice-done.1 = f32[128,1]{0,1:T(1,128)S(1)} slice-done(%slice-start.1)
  %negate.1 = f32[128,8]{0,1:T(8,128)} negate(%copy-done.1), metadata={op_name="jit(step)/neg"}
  %constant.2 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)S(6)}, bf16[4,6,130]{2,1,0:T(8,128)(2,1)}, f32[4,6,64]{2,1,0:T(8,128)}) tuple(%constant.2, %x, %y)
  %while.1 = (s32[]{:T(128)S(6)}, bf16[4,6,130]{2,1,0:T(8,128)(2,1)}, f32[4,6,64]{2,1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %gte.4 = f32[4,6,64]{2,1,0:T(8,128)} get-tuple-element(%while.1), index=2
}
"""  # noqa: E501


def test_bytes_are_those_to_and_from_the_memory_in_tiles():
    found = {(one.opcode, one.name): one for one in traffic.find_traffic(TEXT)}
    expected = {
        # (128, 8) float32 lies as 8 x 128; without padding.
        ("copy-start", ""): (128 * 8 * 4, 0, 0, 1),
        ("slice-start", ""): (128 * 4, 0, 0, 1),
        ("negate", "jit(step)/neg"): (0, 128 * 8 * 4, 0, 1),
        # One of four slices a round, each of 6 x 130 bfloat16 in tiles of 8 x 128.
        ("fusion", "jit(step)/product"): (8 * 256 * 2, 0, 8 * 256 * 2 - 6 * 130 * 2, 4),
        # The update alone is written: 6 x 64 float32 in a tile.
        ("compare", ""): (128 * 4, 0, 127 * 4, 4),  # with a constant that is in the memory
        ("fusion", ""): (0, 8 * 128 * 4, 8 * 128 * 4 - 6 * 64 * 4, 4),
    }
    assert {
        key: (one.read, one.written, one.padding, one.times) for key, one in found.items()
    } == expected


def test_products_in_loops_count_every_round():
    assert traffic.repeated_flops(TEXT) == 3 * 2 * 6 * 64 * 130  # the compiler counts the fourth
    assert traffic.repeated_flops(TEXT, num_passes=4) == 0  # who asks multiplies by four


def test_programs_for_tpus_alone_have_tiles():
    assert traffic.is_tiled(TEXT)
    assert not traffic.is_tiled("ROOT %add = f32[8,128]{1,0} add(%a, %b)")
