import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from vitcls.errors import UserError
from vitcls.pretrained import formats, keys
from vitcls.pretrained.keys import Key

TABLE = [
    Key("patches/kernel", ("conv.weight",), keys.patch_kernel((2, 4))),
    Key("qkv/kernel", ("q.weight", "k.weight", "v.weight"), keys.LINEAR),
    Key("qkv/bias", ("q.bias", "k.bias", "v.bias"), keys.BIAS),
    Key("norm/scale", ("norm.weight",), keys.SAME),
]
SHAPES = {
    "patches/kernel": (24, 5),
    "qkv/kernel": (5, 12),
    "qkv/bias": (12,),
    "norm/scale": (5,),
}


def random_params():
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return unflatten_dict(flat, sep="/")


def load(tmp_path, tensors, ignored=()):
    formats.write(tmp_path / formats.SINGLE, tensors)
    weights = formats.Weights(tmp_path)
    return keys.load(weights, TABLE, shapes=random_params(), ignored=ignored, source="here")


def test_load_undoes_dump(tmp_path):
    params = random_params()
    loaded = load(tmp_path, keys.dump(params, TABLE))
    assert loaded.keys() == params.keys()
    for module, leaves in params.items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(loaded[module][name], leaf)


def test_fused_products_stay_the_products_they_were():
    x = np.random.default_rng(1).normal(size=(3, 5))
    params = random_params()
    tensors = keys.dump(params, TABLE)
    fused = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    apart = [x @ tensors[f"{p}.weight"].T + tensors[f"{p}.bias"] for p in "qkv"]
    np.testing.assert_allclose(fused, np.concatenate(apart, axis=-1), atol=1e-6)


def test_a_patch_kernel_is_the_convolution_it_was():
    params = random_params()
    conv = keys.dump(params, TABLE)["conv.weight"]
    assert conv.shape == (5, 3, 2, 4)
    patch = np.random.default_rng(1).normal(size=(2, 4, 3))
    expected = np.einsum("pqc,dcpq->d", patch, conv)
    np.testing.assert_allclose(patch.reshape(-1) @ params["patches"]["kernel"], expected, atol=1e-5)


def test_one_error_names_all_that_is_wrong(tmp_path):
    tensors = keys.dump(random_params(), TABLE)
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
    tensors = keys.dump(random_params(), TABLE) | {f"x{i:02d}": np.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match=r"20 not known to this network: x00, .*, x07, \.\.\.$"):
        load(tmp_path, tensors)


def test_ignored_tensors_may_be_there(tmp_path):
    tensors = keys.dump(random_params(), TABLE) | {"pooler": np.zeros(1)}
    load(tmp_path, tensors, ignored={"pooler", "absent"})
