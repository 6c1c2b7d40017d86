import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vitcls.errors import UserError
from vitcls.pretrained import keys
from vitcls.pretrained.files import formats
from vitcls.pretrained.keys import Key

TABLE = [
    Key("patches/kernel", ("conv.weight",), keys.patch_kernel((2, 4))),
    Key("qkv/kernel", ("q.weight", "k.weight", "v.weight"), keys.LINEAR),
    Key("qkv/bias", ("q.bias", "k.bias", "v.bias"), keys.BIAS),
    Key("norm/scale", ("norm.weight",), keys.SAME),
    Key("norm/mean", ("norm.running_mean",), keys.SAME, "batch_stats"),
    Key("conv/kernel", ("conv2.weight",), keys.CONV),
]
SHAPES = {
    "params/patches/kernel": (24, 5),
    "params/qkv/kernel": (5, 12),
    "params/qkv/bias": (12,),
    "params/norm/scale": (5,),
    "batch_stats/norm/mean": (5,),
    "params/conv/kernel": (3, 2, 5, 7),
}


def random_variables():
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return unflatten_dict(flat, sep="/")


def load(tmp_path, tensors, ignored=()):
    formats.write(tmp_path / formats.SINGLE, tensors)
    weights = formats.Weights(tmp_path)
    return keys.load(weights, TABLE, shapes=random_variables(), ignored=ignored, source="here")


def test_load_undoes_dump(tmp_path):
    variables = random_variables()
    loaded = flatten_dict(load(tmp_path, keys.dump(variables, TABLE)), sep="/")
    assert loaded.keys() == SHAPES.keys()
    for name, leaf in flatten_dict(variables, sep="/").items():
        np.testing.assert_array_equal(loaded[name], leaf)


def test_a_convolution_kernel_is_transposed():
    variables = random_variables()
    tensor = keys.dump(variables, TABLE)["conv2.weight"]
    assert tensor.shape == (7, 5, 3, 2)
    assert tensor[6, 4, 2, 1] == variables["params"]["conv"]["kernel"][2, 1, 4, 6]


def test_fused_products_stay_the_products_they_were():
    x = np.random.default_rng(1).normal(size=(3, 5))
    variables = random_variables()
    params, tensors = variables["params"], keys.dump(variables, TABLE)
    fused = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    apart = [x @ tensors[f"{p}.weight"].T + tensors[f"{p}.bias"] for p in "qkv"]
    np.testing.assert_allclose(fused, np.concatenate(apart, axis=-1), atol=1e-6)


def test_a_patch_kernel_is_the_convolution_it_was():
    variables = random_variables()
    params, conv = variables["params"], keys.dump(variables, TABLE)["conv.weight"]
    assert conv.shape == (5, 3, 2, 4)
    patch = np.random.default_rng(1).normal(size=(2, 4, 3))
    expected = np.einsum("pqc,dcpq->d", patch, conv)
    np.testing.assert_allclose(patch.reshape(-1) @ params["patches"]["kernel"], expected, atol=1e-5)


def test_one_error_names_all_that_is_wrong(tmp_path):
    tensors = keys.dump(random_variables(), TABLE)
    tensors["norm.renamed"] = tensors.pop("norm.weight")
    tensors["k.weight"] = tensors["k.weight"][:, :-1]
    del tensors["v.bias"]
    with pytest.raises(UserError) as error:
        load(tmp_path, tensors)
    assert str(error.value) == (
        "The tensors in 'here' do not fit the network that its config describes:\n"
        "  2 missing: norm.weight, v.bias\n"
        "  1 not known to this network: norm.renamed\n"
        "  1 of another shape: k.weight is (4, 4), not (4, 5)"
    )


def test_long_lists_are_cut(tmp_path):
    tensors = keys.dump(random_variables(), TABLE) | {f"x{i:02d}": np.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match=r"20 not known to this network: x00, .*, x07, \.\.\.$"):
        load(tmp_path, tensors)


def test_ignored_tensors_may_be_there_and_change_nothing(tmp_path):
    tensors = keys.dump(random_variables(), TABLE) | {"pooler": np.zeros(1)}
    loaded = load(tmp_path, tensors, ignored={"pooler", "absent"})
    jax.tree.map(np.testing.assert_array_equal, loaded, random_variables())
