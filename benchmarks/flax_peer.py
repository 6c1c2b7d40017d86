"""A peer of `benchmarks.train_step`: the same training step with the Flax networks of transformers.

transformers 5 has no Flax networks, so this needs the environment of `python -m
benchmarks.make_peers`, with transformers 4.57 and our own versions of jax, flax and optax. B batch,
H W pixels, K classes.
"""

import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

_runs: dict[str, Callable[[], Any]] = {}  # functions for `run`, filled by `start`


def start(
    library: str, config: dict[str, Any], *, device: str, dtype: str, batch_size: int, lr: float,
    weight_decay: float, matmul_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Compiles the step, runs it once, and returns the peer's entries of the report.

    Args:
      library: "transformers", the only one.
      config: The fields of our network's config.
      device: "cpu".
      dtype: Dtype of the products, "float32" or "bfloat16".
      batch_size: Images per step.
      lr: Learning rate of AdamW.
      weight_decay: Weight decay of AdamW.
      matmul_size: Side of the square matrices whose product gives the limit.
    """
    assert jax.default_backend() == device
    model = make_model(config, dtype)
    begin = time.perf_counter()
    step, num_params = make_step(
        model, config, batch_size=batch_size, lr=lr, weight_decay=weight_decay
    )
    _runs["step"] = step
    _runs["matmul"] = make_matmul(matmul_size, dtype)
    repeat(step, 1)
    warm_up_secs = time.perf_counter() - begin
    repeat(_runs["matmul"], 1)
    packages = ("jax", "flax", library)
    return {
        "library": f"{library} Flax",
        "variant": "jit",
        "warm_up_secs": warm_up_secs,
        "num_params": num_params,
        "versions": {f"{name} of the peer": importlib.metadata.version(name) for name in packages},
    }


def run(name: str, num_calls: int) -> float:
    """Returns the seconds of `num_calls` calls of the function that `start` named `name`."""
    return repeat(_runs[name], num_calls)


def repeat(call: Callable[[], Any], num_calls: int) -> float:
    """Returns the seconds of `num_calls` calls, until the last one has ended."""
    begin = time.perf_counter()
    for _ in range(num_calls):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - begin


def make_step(
    model: nn.Module, config: dict[str, Any], *, batch_size: int, lr: float, weight_decay: float
) -> tuple[Callable[[], jax.Array], int]:
    """Returns a function that trains on a batch of random uint8 images, and the parameters' count.

    Args:
      model: The network, (B, H, W, 3) -> logits (B, K). The classes of transformers around it
        would only transpose the images.
      config: The fields of our network's config.
      batch_size, lr, weight_decay: See `start`.
    """
    rng = np.random.default_rng(0)
    shape = (batch_size, *config["image_size"], 3)
    images = jax.device_put(rng.integers(0, 256, shape, np.uint8))
    labels = rng.integers(0, config["num_classes"], batch_size)
    targets = jax.device_put(np.eye(config["num_classes"], dtype=np.float32)[labels])
    key = jax.random.key(0)
    variables = jax.jit(model.init)(key, jnp.zeros((1, *shape[1:])))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    tx = optax.adamw(lr, weight_decay=weight_decay)

    def loss_fn(params, batch_stats, images, targets):
        inputs = {"params": params, "batch_stats": batch_stats}
        training = {"deterministic": False} if batch_stats else {}  # a ViT has no dropout here
        outputs, changed = model.apply(inputs, images, mutable=["batch_stats"], **training)
        loss = optax.softmax_cross_entropy(outputs.logits.astype(jnp.float32), targets).mean()
        return loss, changed.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images, targets):
        params, batch_stats, opt_state, key = state
        key, flip_key = jax.random.split(key)
        flip = jax.random.bernoulli(flip_key, shape=(batch_size, 1, 1, 1))
        images = (jnp.where(flip, images[:, :, ::-1], images) / 255 - 0.5) / 0.5
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, images, targets
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state, key), loss

    state = params, batch_stats, jax.jit(tx.init)(params), key

    def step():
        nonlocal state
        state, loss = train_step(state, images, targets)
        return loss

    return step, sum(leaf.size for leaf in jax.tree.leaves(params))


def make_matmul(size: int, dtype: str) -> Callable[[], jax.Array]:
    """Returns a function that multiplies two random (size, size) matrices."""
    x, kernel = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return functools.partial(jax.jit(jnp.matmul), kernel, x)


def make_model(config: dict[str, Any], dtype: str) -> nn.Module:
    """The Flax network of `transformers` with our config's sizes."""
    from transformers.models.resnet.modeling_flax_resnet import (
        FlaxResNetForImageClassificationModule,
    )
    from transformers.models.vit.modeling_flax_vit import FlaxViTForImageClassificationModule

    if config["family"] == "vit":
        height, width = config["image_size"]
        assert height == width, "FlaxViT has square images"
        return FlaxViTForImageClassificationModule(
            transformers.ViTConfig(
                image_size=height,
                patch_size=config["patch_size"][0],
                hidden_size=config["width"],
                num_hidden_layers=config["depth"],
                num_attention_heads=config["num_heads"],
                intermediate_size=config["mlp_dim"],
                num_labels=config["num_classes"],
            ),
            dtype=jnp.dtype(dtype),
        )
    return FlaxResNetForImageClassificationModule(
        transformers.ResNetConfig(
            embedding_size=config["embedding_size"],
            hidden_sizes=list(config["hidden_sizes"]),
            depths=list(config["depths"]),
            layer_type=config["layer_type"],
            num_labels=config["num_classes"],
        ),
        dtype=jnp.dtype(dtype),
    )
