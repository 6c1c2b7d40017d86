"""The peer of `benchmarks.train_step` and `.forward`: the same step in PyTorch.

Runs in a separate process, so that the two share no thread pools or allocators.
B batch, H W pixels, K classes.
"""

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

_runs: dict[str, Callable[[], Any]] = {}  # functions for `run`, filled by `start`


def start(
    library: str, config: dict[str, Any], *, device: str, dtype: str, batch_size: int, lr: float,
    weight_decay: float, matmul_size: int, is_training: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Builds the step in every variant worth trying and keeps the fastest.

    Args:
      library: Library of the network: "transformers" or "timm".
      config: The fields of our network's config.
      device: "cpu" or "cuda".
      dtype: "float32" or "bfloat16", the latter by autocast.
      batch_size: Images per step.
      lr: Learning rate of AdamW.
      weight_decay: Weight decay of AdamW.
      matmul_size: Side of the square matrices whose product gives the limit.
      is_training: Whether to train; otherwise the step is a forward pass.

    Returns:
      The peer's entries of the report.
    """
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA does by default
    modes = ("default", "max-autotune") if device == "cuda" else (None,)
    # Convolutions on a GPU are faster with channels last. On a CPU it depends on the dtype.
    layouts = (False,)
    if config["family"] == "resnet":
        layouts = (True,) if device == "cuda" else (False, True)
    trial_steps = 10 if device == "cuda" else 1
    trials, best_secs = {}, float("inf")
    for mode, channels_last in itertools.product(modes, layouts):
        torch.manual_seed(0)
        model = MODELS[library](config)
        step = make_step(
            model, config, mode=mode, channels_last=channels_last, device=device, dtype=dtype,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, is_training=is_training,
        )  # fmt: skip
        variant = f"{mode or 'eager'}{', channels_last' if channels_last else ''}"
        warm_up_secs = repeat(step, 1)
        # The best of three: a disturbance must not decide.
        secs = min(repeat(step, trial_steps) for _ in range(3)) / trial_steps
        trials[variant] = secs
        if secs < best_secs:  # frees the memory of the others
            best_secs, best, _runs["step"] = secs, (variant, warm_up_secs), step
    variant, warm_up_secs = best
    _runs["matmul"] = make_matmul(matmul_size, device, getattr(torch, dtype))
    repeat(_runs["matmul"], 1)
    return {
        "library": library,
        "variant": variant,
        "trials": trials,
        "warm_up_secs": warm_up_secs,
        "num_params": sum(param.numel() for param in model.parameters()),
        "num_threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, library: importlib.metadata.version(library)},
    }


def run(name: str, num_calls: int) -> float:
    """Returns the seconds of `num_calls` calls of the function that `start` named `name`."""
    return repeat(_runs[name], num_calls)


def repeat(call: Callable[[], Any], num_calls: int) -> float:
    """Returns the seconds of `num_calls` calls, until the last one has ended."""
    begin = time.perf_counter()
    for _ in range(num_calls):
        call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def make_step(
    model: torch.nn.Module, config: dict[str, Any], *, mode: str | None, channels_last: bool,
    device: str, dtype: str, batch_size: int, lr: float, weight_decay: float, is_training: bool,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    """Returns a function of one batch of random uint8 images that trains and returns the loss.

    Args:
      model: The network, (B, 3, H, W) -> logits (B, K).
      config: The fields of our network's config.
      mode: Mode of `torch.compile`; None: not compiled.
      channels_last: The memory layout of images and convolutions.
      device, dtype, batch_size, lr, weight_decay, is_training: See `start`.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).train(is_training)
    images = torch.randint(0, 256, (batch_size, 3, *config["image_size"]), dtype=torch.uint8)
    images = images.to(device, memory_format=layout)
    labels = torch.randint(0, config["num_classes"], (batch_size,))
    targets = functional.one_hot(labels, config["num_classes"]).float().to(device)
    # One pass over parameters and moments; `foreach` makes temporaries of the parameters' size.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    autocast = functools.partial(
        torch.autocast, device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"
    )

    def loss_fn(images, targets):
        if is_training:
            flip = torch.rand(len(images), device=device) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        with autocast():
            outputs = model((images.float() / 255 - 0.5) / 0.5)
        return functional.cross_entropy(getattr(outputs, "logits", outputs).float(), targets)

    if mode:
        loss_fn = torch.compile(loss_fn, mode=mode)

    if not is_training:
        return torch.inference_mode()(lambda: loss_fn(images, targets))

    def step():
        loss = loss_fn(images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def make_matmul(size: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a function that multiplies two random (size, size) matrices."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    kernel = (torch.randn(size, size, device=device) / size**0.5).to(dtype)
    out = torch.empty_like(x)
    return lambda: torch.matmul(x, kernel, out=out)


def transformers_model(config: dict[str, Any]) -> torch.nn.Module:
    """The network of `transformers` with our config's sizes, attention by torch's fused kernels."""
    import transformers

    if config["family"] == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=list(config["image_size"]),
                patch_size=list(config["patch_size"]),
                hidden_size=config["width"],
                num_hidden_layers=config["depth"],
                num_attention_heads=config["num_heads"],
                intermediate_size=config["mlp_dim"],
                num_labels=config["num_classes"],
                attn_implementation="sdpa",
            )
        )
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=config["embedding_size"],
            hidden_sizes=list(config["hidden_sizes"]),
            depths=list(config["depths"]),
            layer_type=config["layer_type"],
            num_labels=config["num_classes"],
        )
    )


def timm_model(config: dict[str, Any]) -> torch.nn.Module:
    """The network of `timm` with our config's sizes."""
    from timm.models import resnet, vision_transformer

    if config["family"] == "vit":
        return vision_transformer.VisionTransformer(
            img_size=tuple(config["image_size"]),
            patch_size=tuple(config["patch_size"]),
            embed_dim=config["width"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            mlp_ratio=config["mlp_dim"] / config["width"],
            num_classes=config["num_classes"],
        )
    block = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[config["layer_type"]]
    return resnet.ResNet(
        block,
        layers=config["depths"],
        channels=tuple(size // block.expansion for size in config["hidden_sizes"]),
        num_classes=config["num_classes"],
    )


MODELS = {"transformers": transformers_model, "timm": timm_model}
