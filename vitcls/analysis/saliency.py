"""Computes where a network looks: how much each place of an image contributes to the answer.

B batch, H W pixels, h w grid of patches or of the last feature map, N tokens, Q query tokens of
attention, D width or channels, A heads, d width of one head, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls.errors import UserError
from vitcls.models import resnet, vit, vit_config

PyTree = Any

# (model, variables, images, classes) -> (relevance, logits), see `compute_relevance`
_Method = Callable[[nn.Module, PyTree, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def compute_maps(
    model: nn.Module, variables: PyTree, images: jax.Array, classes: jax.Array, *, method: str
) -> tuple[jax.Array, jax.Array]:
    """Computes maps over the images, from 0 (least relevant) to 1 (most relevant).

    Args:
      model: A network with classes.
      variables: Its variables.
      images: (B, H, W, 3) float, normalised.
      classes: int32 (B,), the class to explain; negative: the likeliest.
      method: What `choose_method` returns.

    Returns:
      The maps, float32 (B, H, W), all 0 if all places are equally relevant, and the logits,
      float32 (B, K).
    """
    found, logits = compute_relevance(model, variables, images, classes, method=method)
    drawn = _enlarge(found, model.config)
    low, high = (reduce(drawn, (1, 2), keepdims=True) for reduce in (jnp.min, jnp.max))
    # 0 if all places are alike. NaN stays NaN: it must not look like such a map.
    scaled = jnp.where(high > low, (drawn - low) / jnp.where(high > low, high - low, 1), 0 * drawn)
    unseen = np.subtract(images.shape, (*drawn.shape, 3))[1:3]  # beyond the last whole patch
    return jnp.pad(scaled, [(0, 0), (0, unseen[0]), (0, unseen[1])]), logits


def compute_relevance(
    model: nn.Module, variables: PyTree, images: jax.Array, classes: jax.Array, *, method: str
) -> tuple[jax.Array, jax.Array]:
    """As `compute_maps` on the network's grid: float32 (B, h, w), not negative, of any scale."""
    return METHODS[method](model, variables, images, classes)


def choose_method(model: nn.Module, method: str) -> str:
    """Returns `method`, or if that is "" the default for this network.

    Raises:
      UserError: The method does not work with this network.
    """
    is_vit = isinstance(model, vit.ViT)
    method = method or ("gradient_rollout" if is_vit else "gradcam")
    if not is_vit and method != "gradcam":
        raise UserError(
            f"--method={method} follows attention, but a {model.config.family} has none; use "
            "--method=gradcam."
        )
    if is_vit and not model.config.depth:
        raise UserError(f"This {model.config.family} has no layers: there is nothing to explain.")
    return method


def _rollout(model, variables, images, classes):
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928, section 3), without classes.

    The paper's matrices (A + I) / 2 are A + I here: the scale does not matter.
    """
    del classes
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    attended = [_probabilities(layer).mean(axis=1) for layer in _sown(state)]
    return _roll(attended, model.config), logits


def _gradient_rollout(model, variables, images, classes):
    """Rollout of positive gradient x attention (Chefer et al. 2021, arXiv:2103.15679, eq. 5 and 6).

    The gradient of the class' logit with respect to attention probabilities P follows from the
    gradient with respect to attention's output, (P v) W. So the network needs no code for this.
    """
    names = [f"encoder/layer_{index}/attention" for index in range(model.config.depth)]
    logits, _, gradients, state = _differentiate(model, variables, images, classes, names)
    attended = []
    for name, layer in zip(names, _sown(state), strict=True):
        index = name.split("/")[1]
        kernel = variables["params"]["encoder"][index]["attention"]["output"]["kernel"]  # (D, D)
        mixed = jnp.einsum("bqe,de->bqd", gradients[name], kernel)
        mixed = mixed.reshape(layer["q"].shape)  # (B, Q, A, d)
        gradient = jnp.einsum("bqad,bnad->baqn", mixed, layer["v"])
        attended.append(jax.nn.relu(gradient * _probabilities(layer)).mean(axis=1))
    return _roll(attended, model.config), logits


def _gradcam(model, variables, images, classes):
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2).

    For a ResNet on its last stage. For a ViT on the patches as inputs of the last layer's
    attention: behind it a class token no longer reads them, and they have no gradient.
    """
    config = model.config
    is_vit = isinstance(model, vit.ViT)
    name = f"encoder/layer_{config.depth - 1}/layernorm_before" if is_vit else "encoder"
    logits, outputs, gradients, _ = _differentiate(model, variables, images, classes, [name])
    found, gradient = outputs[name], gradients[name]
    if is_vit:
        shape = (len(images), *config.grid, config.width)
        found, gradient = (x[:, config.num_prefix :].reshape(shape) for x in (found, gradient))
    weights = gradient.mean(axis=(1, 2))  # (B, D)
    return jax.nn.relu(jnp.einsum("bhwd,bd->bhw", found, weights)), logits


METHODS: dict[str, _Method] = {
    "rollout": _rollout,
    "gradient_rollout": _gradient_rollout,
    "gradcam": _gradcam,
}


def _differentiate(
    model: nn.Module, variables: PyTree, images: jax.Array, classes: jax.Array, names: Sequence[str]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array], PyTree]:
    """Returns the outputs of modules, and the gradients of each image's logit with respect to them.

    Args:
      model: The network.
      variables: Its variables.
      images: (B, H, W, 3).
      classes: int32 (B,), the class whose logit counts; negative: the likeliest.
      names: The modules, such as "encoder/layer_0".

    Returns:
      Logits (B, K), outputs and gradients by module name, and the state with the sown values.
    """

    # A zero is added to each output: the gradient of the zero is that of the output.
    def run(shifts):
        outputs = {}

        def shift(call, args, kwargs, context):
            out = call(*args, **kwargs)
            name = "/".join(context.module.path)
            if name in shifts and context.method_name == "__call__":
                out = outputs[name] = out + shifts[name]
            return out

        with nn.intercept_methods(shift):
            logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        chosen = jnp.where(classes < 0, logits.argmax(axis=-1), classes)
        # Images do not see each other: the sum has the gradient of each.
        total = jnp.take_along_axis(logits, chosen[:, None], axis=-1).sum()
        return total, (logits, outputs, state)

    _, (_, shapes, _) = jax.eval_shape(run, dict.fromkeys(names, 0.0))
    shifts = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    gradients, (logits, outputs, state) = jax.grad(run, has_aux=True)(shifts)
    return logits, outputs, gradients, state


def _sown(state: PyTree) -> list[dict[str, jax.Array]]:
    """The values that each layer's attention sows, in the order of layers."""
    layers = state["intermediates"]["encoder"]
    return [
        {name: leaf for name, (leaf,) in layers[f"layer_{index}"]["attention"].items()}
        for index in range(len(layers))
    ]


def _probabilities(layer: dict[str, jax.Array]) -> jax.Array:
    """Attention from a layer's sown queries and keys, for any kernel: float32 (B, A, Q, N)."""
    q, k = layer["q"], layer["k"]  # (B, Q, A, d), (B, N, A, d)
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bqad,bnad->baqn", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1)


def _roll(attended: Sequence[jax.Array], config: vit_config.ViTConfig) -> jax.Array:
    """The share of each patch in the pooled tokens, (B, h, w), if layers compute x + attended x.

    Pooling reads one row of the product of all matrices, so that row is multiplied from the left.

    Args:
      attended: (B, Q, N) of each layer; Q < N only in the last, whose other tokens nothing reads.
      config: Config of the network, with the pooled tokens.
    """
    batch, _, num_tokens = attended[0].shape
    row = jnp.broadcast_to(_pooled_shares(config, num_tokens), (batch, num_tokens))
    for matrix in reversed(attended):
        row = row + jnp.einsum("bq,bqn->bn", row[:, : matrix.shape[1]], matrix)
    return row[:, config.num_prefix :].reshape(-1, *config.grid)


def _pooled_shares(config: vit_config.ViTConfig, num_tokens: int) -> np.ndarray:
    """The share of each token in what the head reads, float32 (1, N)."""
    shares = np.zeros((1, num_tokens), np.float32)
    if num_pooled := vit_config.POOLS[config.pool]:
        shares[:, :num_pooled] = 1 / num_pooled
        return shares
    shares[:, config.num_prefix :] = 1 / (num_tokens - config.num_prefix)
    if config.pool == "cls_mean":  # half of the features each
        shares /= 2
        shares[:, 0] += 0.5
    return shares


def _enlarge(found: jax.Array, config: vit_config.ViTConfig | resnet.ResNetConfig) -> jax.Array:
    """(B, h, w) -> (B, H, W), linear between the pixels at which the values of the grid lie.

    A ViT's values lie at the centres of patches; pixels beyond the last whole patch are left out. A
    ResNet's convolutions are padded equally on every side: its first values lie at pixel 0.
    """
    if isinstance(config, vit_config.ViTConfig):
        places = [
            (np.arange(num * step) + 0.5) / step - 0.5
            for num, step in zip(config.grid, config.patch_size, strict=True)
        ]
    else:
        step = 2 ** (len(config.depths) + 1 + config.downsample_in_first_stage)
        places = [np.arange(side) / step for side in config.image_size]
    grid = jnp.meshgrid(*map(jnp.float32, places), indexing="ij")

    def sample(one):
        return jax.scipy.ndimage.map_coordinates(one, grid, order=1, mode="nearest")

    return jax.vmap(sample)(found)
