"""What tests against `transformers` in torch share."""

import functools
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file

from vitcls.pretrained import keys
from vitcls.pretrained.reading import FAMILIES

# Compiling takes most of the time of small networks; less of it computes the same, more slowly.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@torch.no_grad()
def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model with noise on all parameters, so large that every one of them matters."""
    torch.manual_seed(0)
    for param in model.parameters():
        param.add_(0.2 * torch.randn_like(param))
    return model.eval()


def random_images(image_size: tuple[int, int], batch: int = 3) -> np.ndarray:
    """Float32 (B, H, W, 3)."""
    return np.random.default_rng(0).normal(size=(batch, *image_size, 3)).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) -> (B, 3, H, W)."""
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def _outputs(model: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, images, train=False)


# apply(model, variables, images): our outputs, with exact products.
apply = jax.jit(_outputs, static_argnums=0, compiler_options=QUICK)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def on_disk_names(torch_model: torch.nn.Module, folder: Path) -> dict[str, torch.nn.Parameter]:
    """The model's parameters under the names that its file has: matched by their values."""
    stored = {tensor.tobytes(): name for name, tensor in tensors(folder).items()}
    return {stored[p.detach().numpy().tobytes()]: p for p in torch_model.parameters()}


def check_gradients(
    model: nn.Module,
    variables: dict,
    images: np.ndarray,
    *,
    torch_model: torch.nn.Module,
    torch_outputs: Callable[[np.ndarray], torch.Tensor],
    folder: Path,
) -> None:
    """Fails unless gradients through a random head equal torch's.

    Args:
      model: Ours, as `variables` were loaded from `folder`.
      variables: Its parameters.
      images: (B, H, W, 3).
      torch_model: The model that `folder` was saved from.
      torch_outputs: What `model` computes from images, by `torch_model`.
      folder: Names the parameters.
    """
    num_outputs = jax.eval_shape(lambda: _outputs(model, variables, images)).shape[-1]
    head = np.random.default_rng(1).normal(size=(num_outputs, 5)).astype(np.float32)
    labels = np.arange(len(images))

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def ours(params):
        logits = _outputs(model, {"params": params}, images) @ head
        return -jax.nn.log_softmax(logits)[jnp.arange(len(images)), labels].mean()

    torch_model.zero_grad()
    logits = torch_outputs(images) @ torch.from_numpy(head)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    expected = {
        name: param.grad.numpy()
        for name, param in on_disk_names(torch_model, folder).items()
        if param.grad is not None  # of parameters that the outputs do not read
    }
    family = FAMILIES[model.config.family]
    table = family.key_table(model.config, family.prefix_of(set(expected)))
    found = keys.dump({"params": ours(variables["params"])}, table)
    assert found.keys() == expected.keys()
    scale = np.sqrt(sum(np.square(grad).sum() for grad in expected.values()))
    for name, grad in expected.items():
        if found[name].shape != grad.shape:  # of another image size
            assert "position_embedding" in name
            continue
        largest = max(np.linalg.norm(grad), 1e-3 * scale)
        assert np.linalg.norm(found[name] - grad) < 1e-3 * largest, name
