"""Maps equal what torch's attention, gradients and hooks give, and depend on the weights."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from tests.torch_reference import QUICK, random_images, randomized, to_torch
from vitcls import errors, pretrained
from vitcls.analysis import saliency
from vitcls.models.resnet import ResNet, resnet_config
from vitcls.models.vit import ViT
from vitcls.models.vit_config import vit_config

ASSET = Path(__file__).parents[2] / "assets" / "vit-nano-glyphs"
_SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8,
    num_labels=5, attn_implementation="eager",
)  # fmt: skip
# name -> (a model of transformers, how many prefix tokens, which tokens its head reads)
VITS = {
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**_SMALL, intermediate_size=24)
        ),
        1,
        [[0]],
    ),
    "two heads": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(**_SMALL, intermediate_size=24)
        ),
        2,
        [[0], [1]],
    ),
    "registers": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**_SMALL, mlp_ratio=2, num_register_tokens=3)
        ),
        4,
        [[0], range(4, 13)],
    ),
    "mean": (
        lambda: transformers.SiglipForImageClassification(
            transformers.SiglipConfig(
                vision_config=_SMALL | {"intermediate_size": 24}, num_labels=5,
                attn_implementation="eager",
            )
        ),
        0,
        [range(9)],
    ),
}  # fmt: skip
CLASSES = np.array([3, -1, 4], np.int32)  # -1: the likeliest


def chosen(logits: torch.Tensor) -> np.ndarray:
    return np.where(CLASSES < 0, logits.detach().numpy().argmax(1), CLASSES)


@functools.partial(jax.jit, static_argnums=0, static_argnames="methods", compiler_options=QUICK)
def relevances(model, variables, images, *, methods=tuple(saliency.METHODS)):
    """Method -> (relevance, logits), compiled together."""
    with jax.default_matmul_precision("highest"):
        return {
            method: saliency.compute_relevance(model, variables, images, CLASSES, method=method)
            for method in methods
        }


@pytest.fixture(scope="module", params=VITS)
def both(request, tmp_path_factory):
    """(torch model, number of prefix tokens, pooled tokens, our relevances)."""
    make, num_prefix, pooled = VITS[request.param]
    model = randomized(make())
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type":"ViTImageProcessor"}')
    ours, variables, _ = pretrained.load(folder, image_size=(24, 24))
    return model, num_prefix, pooled, relevances(ours, variables, random_images((24, 24)))


def check_equal(found, expected):
    expected = expected.reshape(found.shape)
    assert expected.std() > 0 and expected.min() >= 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def roll(matrices: list[np.ndarray]) -> np.ndarray:
    """The product of (B, N, N) matrices, the last first."""
    return functools.reduce(lambda product, matrix: matrix @ product, matrices)


def pooled_rows(matrix: np.ndarray, pooled: list, num_prefix: int) -> np.ndarray:
    """(B, N, N) -> what the pooled tokens have of the patches, (B, number of patches)."""
    return sum(matrix[:, list(rows), num_prefix:].mean(1) for rows in pooled) / len(pooled)


def test_rollout_is_the_product_of_torch_attention(both):
    torch_model, num_prefix, pooled, ours = both
    images = random_images((24, 24))
    with torch.no_grad():
        out = torch_model(pixel_values=to_torch(images), output_attentions=True)
    attentions = [layer.mean(1).numpy() for layer in out.attentions]
    rolled = roll([(layer + np.eye(layer.shape[-1])) / 2 for layer in attentions])
    found, logits = ours["rollout"]
    check_equal(found / 2 ** len(attentions), pooled_rows(rolled, pooled, num_prefix))
    np.testing.assert_allclose(logits, out.logits.numpy(), rtol=0, atol=1e-4)


def test_gradient_rollout_has_torch_gradients_of_attention(both):
    torch_model, num_prefix, pooled, ours = both
    images = random_images((24, 24))
    out = torch_model(pixel_values=to_torch(images), output_attentions=True)
    gradients = torch.autograd.grad(out.logits[range(3), chosen(out.logits)].sum(), out.attentions)
    matrices = [
        np.eye(layer.shape[-1]) + (gradient * layer).clamp(min=0).mean(1).detach().numpy()
        for layer, gradient in zip(out.attentions, gradients, strict=True)
    ]
    found, _ = ours["gradient_rollout"]
    check_equal(found, pooled_rows(roll(matrices), pooled, num_prefix))


def hooked(torch_model, module, images) -> tuple[np.ndarray, np.ndarray]:
    """What a module returns, and the gradient of the classes' logits with respect to it."""
    kept = []
    hook = module.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = torch_model(pixel_values=to_torch(images)).logits
    hook.remove()
    out = getattr(kept[0], "last_hidden_state", kept[0])
    (gradient,) = torch.autograd.grad(logits[range(3), chosen(logits)].sum(), out)
    return out.detach().numpy(), gradient.numpy()


def test_gradcam_of_a_vit_equals_torch_hooks(both):
    torch_model, num_prefix, _, ours = both
    images = random_images((24, 24))
    names = dict(torch_model.named_modules())
    (name,) = [
        name for name in names if name.endswith(("1.layernorm_before", "1.norm1", "1.layer_norm1"))
    ]
    tokens, gradient = (x[:, num_prefix:] for x in hooked(torch_model, names[name], images))
    expected = np.maximum((tokens * gradient.mean(1, keepdims=True)).sum(-1), 0)
    found, _ = ours["gradcam"]
    check_equal(found, expected)


def test_gradcam_of_a_resnet_equals_torch_hooks(tmp_path):
    torch_model = randomized(
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5
            )
        )
    )
    torch_model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type":"ViTImageProcessor","size":{"height":40,"width":56}}'
    )
    images = random_images((40, 56))
    maps, gradient = hooked(torch_model, torch_model.resnet.encoder, images)
    expected = np.maximum((maps * gradient.mean((2, 3), keepdims=True)).sum(1), 0)
    model, variables, _ = pretrained.load(tmp_path)
    found, _ = relevances(model, variables, images, methods=("gradcam",))["gradcam"]
    assert found.shape == (3, 5, 7)
    check_equal(found, expected)


def random_variables(model):
    """Without what compiling the initialisation costs."""
    images = np.zeros((1, *model.config.image_size, 3), np.float32)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32), shapes)


def test_a_map_of_patches_is_drawn_as_torch_interpolates():
    config = vit_config("vit_mu4", num_classes=2, image_size=(12, 20))
    grid = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[:, None], size=(12, 20), mode="bilinear"
    )
    np.testing.assert_allclose(saliency._enlarge(grid, config), expected[:, 0], atol=1e-5)


def test_a_map_of_a_resnet_is_drawn_where_its_features_look():
    """The middle of the pixels that one place of the feature map depends on."""
    config = resnet_config("resnet_mu", num_classes=2, image_size=(64, 64))
    model = ResNet(config)
    images = random_images((64, 64), batch=1)
    variables = random_variables(model)

    def feature(images):
        _, state = model.apply(
            variables, images, train=False, capture_intermediates=lambda m, _: m.name == "encoder"
        )
        return state["intermediates"]["encoder"]["__call__"][0][0, 3, 4].sum()

    is_seen = np.abs(jax.jit(jax.grad(feature))(images)[0]).sum(-1) > 0
    middle = [(at.min() + at.max()) / 2 for at in np.nonzero(is_seen)]
    one = np.zeros((1, 8, 8), np.float32)
    one[0, 3, 4] = 1
    drawn = np.asarray(saliency._enlarge(one, config)[0])
    assert drawn.max() == 1 and drawn.shape == (64, 64)
    np.testing.assert_allclose(np.argwhere(drawn == 1)[0], middle, atol=1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def maps(model, variables, images, classes):
    """Method -> maps, compiled together."""
    return {
        method: saliency.compute_maps(model, variables, images, classes, method=method)[0]
        for method in saliency.METHODS
    }


def characters() -> list[Image.Image]:
    """As the checkpoint knows them: 8 x 8 pixels, white on black."""
    images, font = [], ImageFont.load_default(48)
    for character in "2478AEFKRS":
        left, top, right, bottom = font.getbbox(character)
        image = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(image).text((-left, -top), character, 255, font)
        box = Image.new("L", (32, 32))
        box.paste(image.resize((20, 32)), (6, 0))
        images.append(box.resize((8, 8), Image.Resampling.BOX))
    return images


@functools.cache
def pretrained_network():
    """A network, its variables and images of ten classes."""
    model, variables, processor = pretrained.load(ASSET)
    return model, variables, processor(characters())


def test_other_weights_give_another_map():
    """Sanity check of Adebayo et al. 2018 (arXiv:1810.03292): a map that stays is of the image."""
    model, variables, images = pretrained_network()
    likeliest = np.full(10, -1, np.int32)
    before = maps(model, variables, images, likeliest)
    correlations = {method: [] for method in saliency.METHODS}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        shuffled = jax.tree.map(
            lambda leaf, rng=rng: rng.permutation(leaf.ravel()).reshape(leaf.shape), variables
        )
        after = maps(model, shuffled, images, likeliest)
        for method, found in correlations.items():
            for one, two in zip(*map(np.asarray, (before[method], after[method])), strict=True):
                if two.any():  # else nothing speaks for the class
                    found.append(scipy.stats.spearmanr(one.ravel(), two.ravel()).statistic)
    for method, found in correlations.items():
        assert len(found) > 20 and abs(np.mean(found)) < 0.3, method
        assert before[method].shape == (10, 24, 24) and before[method].dtype == np.float32
        np.testing.assert_allclose(before[method].min((1, 2)), 0)
        np.testing.assert_allclose(before[method].max((1, 2)), 1)


def test_the_class_decides_but_of_rollout():
    model, variables, images = pretrained_network()
    one, two, likeliest = (
        maps(model, variables, images, np.full(10, k, np.int32)) for k in (2, 8, -1)
    )
    for method in saliency.METHODS:
        assert np.array_equal(one[method], two[method]) == (method == "rollout")
        np.testing.assert_allclose(one[method][0], likeliest[method][0], atol=1e-5)  # it is a 2


def test_without_any_evidence_maps_are_zero_and_unseen_pixels_always():
    config = vit_config("vit_mu4", num_classes=2, image_size=(8, 8))
    model = ViT(dataclasses.replace(config, image_size=(10, 11)))
    variables = random_variables(model)
    variables["params"]["classifier"]["kernel"][:] = 0
    found = maps(model, variables, random_images((10, 11)), CLASSES % 2)
    for method in ("gradient_rollout", "gradcam"):
        np.testing.assert_array_equal(found[method], np.zeros((3, 10, 11)))
    seen = found["rollout"][:, :8, :8]
    assert seen.max() > 0.9 and found["rollout"].sum() == pytest.approx(float(seen.sum()))


def test_methods_are_chosen_by_the_network():
    network = ViT(vit_config("vit_mu4", num_classes=2, image_size=(8, 8)))
    convolutions = ResNet(resnet_config("resnet_mu", num_classes=2, image_size=(8, 8)))
    assert saliency.choose_method(network, "") == "gradient_rollout"
    assert saliency.choose_method(network, "rollout") == "rollout"
    assert saliency.choose_method(convolutions, "") == "gradcam"
    with pytest.raises(errors.UserError, match="--method=rollout follows attention, but a resnet "):
        saliency.choose_method(convolutions, "rollout")
    flat = ViT(dataclasses.replace(network.config, depth=0))
    with pytest.raises(errors.UserError, match="has no layers"):
        saliency.choose_method(flat, "")
