import pytest

from benchmarks import tpu_bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jit(train_step)/jvp(ViT)/encoder/layer_3/attention/qkv/dot_general", "q, k and v"),
        ("transpose(jvp(ViT))/encoder/layer_3/attention/while/body/sub", "attention and its"),
        ("transpose(jvp(ViT))/encoder/layer_3/attention/output/add", "after attention"),
        ("transpose(jvp(ResNet))/layer_0/convolution/bhwc,bhwd->cd/dot_general", "gradients of"),
        ("jit(train_step)/jvp(ResNet)/embedder/normalization/reduce_sum", "other layers"),
        ("jit(train_step)/select_n", "the rest"),
    ],
)
def test_instructions_are_sorted_by_what_they_compute(name, kind):
    assert kind in tpu_bytes.kind_of(name, "fusion")
    assert tpu_bytes.kind_of(name, "copy-start") == "to and from fast memory"


def test_the_table_adds_up():
    text = """
ENTRY %main (x: f32[1000000,100]) -> f32[1000000,100] {
  %x = f32[1000000,100]{1,0:T(8,128)} parameter(0)
  %near = f32[8,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %a = f32[1000000,100]{1,0:T(8,128)} negate(%x), metadata={op_name="jvp(ViT)/layer_1/mlp/neg"}
  %b = bf16[1000000,128]{1,0:T(8,128)(2,1)} convert(%a), metadata={op_name="transpose(jvp)/mlp/c"}
  ROOT %c = f32[8,128]{1,0:T(8,128)S(1)} add(%near, %near)
}
"""
    rows = [line.rsplit(maxsplit=4) for line in tpu_bytes.report(text).splitlines()[1:]]
    # 512 MB with padding of float32, twice, then once and 256 MB of bfloat16.
    figures = ["1.02", "0.77", "1.79", "0.34"]
    assert rows == [["mlp", *figures], ["in all", *figures]]
