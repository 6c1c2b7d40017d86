"""Measures how close our networks are to the reference, for every family, at published sizes.

    python -m benchmarks.parity --output=docs/checkpoints.md

The reference is `transformers` in torch: a network of the checkpoint's sizes with random weights,
no parameter at its initial value, saved with `save_pretrained` and read with
`vitcls.pretrained.load`. The logits of random images are compared at the checkpoint's usual size
and at another one, in float32 at the highest precision of products. For the smaller network of each
family the gradient of a cross-entropy is also compared. Nothing is downloaded. Needs torch,
transformers and up to 10 GB of memory.

timm's networks are compared with outputs that timm computed in a separate environment, which
`tests/golden/make_timm_outputs.sh` makes. Their weights are made again from the names of tensors.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import platform
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.files import expand
from vitcls.pretrained import keys
from vitcls.pretrained.files import formats
from vitcls.pretrained.reading import FAMILIES

TOLERANCE = 1e-4  # for logits, which are about 1
GRADIENT_TOLERANCE = 1e-3  # for a tensor, relative to its norm or a thousandth of the whole norm
BEGIN, END = "<!-- begin of what benchmarks.parity writes -->", "<!-- end -->"
NUM_CLASSES, BATCH_SIZE = 100, 2

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TIMM = sorted(path.stem for path in (GOLDEN / "timm").glob("*.npz") if path.stem != "pixels")

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
      name: The checkpoint of the hub with these sizes.
      kind: Class of `transformers`, which tells the class of its config.
      fields: Fields of its config that differ from the defaults.
      native: Its usual image size.
      other: Another image size.
      gradient: Whether the gradient is also compared.
      dtype: Dtype in which gradients are compared. If a ReLU's input is near zero, torch in float32
        is as far from torch in float64 as we are.
    """

    name: str
    kind: str
    fields: dict[str, Any]
    native: Size
    other: Size
    gradient: bool = False
    dtype: str = "float32"


def _vit(width: int, depth: int, heads: int, **fields: Any) -> dict[str, Any]:
    return dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, **fields) | (
        {} if "mlp_ratio" in fields else {"intermediate_size": 4 * width} | fields
    )


# Sizes from the config.json of each checkpoint. DINOv2's giant has two of its 40 layers.
_TI, _S, _B, _L = (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_DINO = dict(mlp_ratio=4, image_size=518, patch_size=14)
_TWO_HEADS, _DINOV2 = "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"
_REGISTERS = "Dinov2WithRegistersForImageClassification"
_CLIP, _SIGLIP = "CLIPForImageClassification", "SiglipForImageClassification"
_VIT, _RESNET = "ViTForImageClassification", "ResNetForImageClassification"
_B32 = dict(patch_size=32)
_SO400M = dict(intermediate_size=4304, image_size=384, patch_size=14)
_S224, _S384 = (224, 224), (384, 384)
CASES = [
    Case("WinKawaks/vit-tiny-patch16-224", _VIT, _vit(*_TI), _S224, _S384, gradient=True),
    Case("google/vit-base-patch16-224", _VIT, _vit(*_B), _S224, (256, 320)),
    Case("google/vit-large-patch32-384", _VIT, _vit(*_L, image_size=384, **_B32), _S384, _S224),
    Case("facebook/deit-tiny-patch16-224", "DeiTForImageClassification", _vit(*_TI), _S224, _S384),
    Case("facebook/deit-small-distilled-patch16-224", _TWO_HEADS, _vit(*_S), _S224, _S384, True),
    Case("facebook/deit-base-distilled-patch16-224", _TWO_HEADS, _vit(*_B), _S224, _S384),
    Case("facebook/dinov2-small", _DINOV2, _vit(*_S, **_DINO), _S224, (518, 518), gradient=True),
    Case("facebook/dinov2-base", _DINOV2, _vit(*_B, **_DINO), _S224, (280, 280)),
    Case(
        "facebook/dinov2-giant, 2 of 40 layers", _DINOV2,
        _vit(1536, 2, 24, use_swiglu_ffn=True, **_DINO), _S224, (280, 280),
    ),
    Case(
        "facebook/dinov2-with-registers-small", _REGISTERS, _vit(*_S, **_DINO), _S224, (560, 560),
        gradient=True,
    ),
    Case("facebook/dinov2-with-registers-base", _REGISTERS, _vit(*_B, **_DINO), _S224, (280, 280)),
    Case("google/siglip-base-patch16-224", _SIGLIP, _vit(*_B), _S224, _S384, gradient=True),
    Case(
        "google/siglip-so400m-patch14-384", _SIGLIP, _vit(1152, 27, 16, **_SO400M), _S384, _S224
    ),
    Case("openai/clip-vit-base-patch32", _CLIP, _vit(*_B, **_B32), _S224, _S384, gradient=True),
    Case("openai/clip-vit-large-patch14", _CLIP, _vit(*_L, patch_size=14), _S224, (280, 280)),
    Case(
        "microsoft/resnet-18", _RESNET,
        dict(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
        _S224, (256, 192), gradient=True, dtype="float64",
    ),
    Case("microsoft/resnet-50", _RESNET, {}, _S224, (256, 192)),
]  # fmt: skip


def reference(case: Case) -> torch.nn.Module:
    """The network in torch, with random weights that make logits of about 1."""
    kind = getattr(transformers, case.kind)
    config_class, fields = kind.config_class, case.fields
    if case.kind in (_CLIP, _SIGLIP):  # the text tower has only what a config needs
        fields = dict(vision_config=fields, text_config=dict(num_hidden_layers=0))
    torch.manual_seed(0)
    model = kind(config_class(**fields, num_labels=NUM_CLASSES)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.mul_(torch.rand_like(tensor) + 0.5)
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
        pixels = torch.from_numpy(_images(case.native)).permute(0, 3, 1, 2)
        scale = 1 / _torch_logits(model, pixels).std()
        for name, tensor in model.named_parameters():
            if "classifier" in name:
                tensor.mul_(scale)
    return model


def _torch_logits(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    family = model.config.model_type
    resizes = family in ("vit", "deit", "siglip", "clip")  # the others take any size
    options = {"interpolate_pos_encoding": True} if resizes else {}
    return model(pixel_values=pixels, **options).logits


def _images(size: Size) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH_SIZE, *size, 3)).astype(np.float32)


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Returns the largest differences between ours and the reference."""
    model = reference(case)
    model.save_pretrained(folder)
    height, width = case.native
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    result = {"num_params": sum(p.numel() for p in model.parameters()), "differences": {}}
    for size in (case.native, case.other):
        images = _images(size)
        ours, variables, _ = pretrained.load(folder, image_size=size)
        found = _apply(ours, variables, images)
        with torch.no_grad():
            expected = _torch_logits(model, torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        result["differences"][size] = float(np.abs(found - expected).max())
        result["largest_logit"] = float(np.abs(expected).max())
        del variables
    if case.gradient:
        result["gradient"] = _gradient_difference(case, model, folder)
    return result


def _gradient_difference(case: Case, model: torch.nn.Module, folder: Path) -> float:
    """The largest distance of a tensor's gradient from torch's, relative to its norm.

    A gradient that is zero in theory, as that of a key's bias, has no relative error. So norms
    below a thousandth of the whole gradient's norm count as this thousandth.
    """
    # At the size of the stored position embeddings, so that theirs is compared as well.
    size = (case.fields["image_size"],) * 2 if "image_size" in case.fields else case.native
    images, labels = _images(size), np.arange(BATCH_SIZE)
    model = model.to(getattr(torch, case.dtype))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(getattr(torch, case.dtype))
    logits = _torch_logits(model, pixels)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    with jax.enable_x64(case.dtype == "float64"):
        ours, variables, _ = pretrained.load(folder, image_size=size, dtype=jnp.dtype(case.dtype))
        variables = jax.tree.map(lambda leaf: leaf.astype(case.dtype), variables)

        def loss(params):
            logits = ours.apply(variables | {"params": params}, images, train=False)
            return -jax.nn.log_softmax(logits)[jnp.arange(BATCH_SIZE), labels].mean()

        with jax.default_matmul_precision("highest"):
            grads = jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))
    family = FAMILIES[ours.config.family]
    table = family.key_table(ours.config, family.written_prefix(ours.config))
    found = keys.dump({"params": grads}, [key for key in table if key.collection == "params"])
    # On disk a tensor has the name that it has had since the family was published, in memory the
    # one of the installed version: both are told apart by their values.
    weights = keys.dump(jax.device_get(variables), table)
    name_of = {_digest(weights[name]): name for name in found}
    expected = {
        name_of[_digest(param.detach().numpy())]: param.grad.numpy()
        for param in model.parameters()
        if _digest(param.detach().numpy()) in name_of
    }
    if expected.keys() != found.keys():
        raise ArithmeticError(f"{case.name}: no gradient for {found.keys() - expected.keys()}")
    whole = np.sqrt(sum(np.square(grad).sum() for grad in expected.values()))
    return max(
        float(np.linalg.norm(found[name] - grad) / max(np.linalg.norm(grad), 1e-3 * whole))
        for name, grad in expected.items()
    )


def _digest(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, np.float32).tobytes()


def compare_timm(name: str, folder: Path) -> dict[str, Any]:
    """The same for a network of timm, without a gradient."""
    make = runpy.run_path(str(GOLDEN / "timm_weights.py"))
    golden = np.load(GOLDEN / "timm" / f"{name}.npz")
    shapes = json.loads(str(golden["tensors"]))
    tensors = {key: make["make_tensor"](key, tuple(shape)) for key, shape in shapes.items()}
    formats.write(folder / formats.SINGLE, tensors)
    (folder / "config.json").write_text(str(golden["config"]))
    differences = {}
    for size, expected in (
        (pretrained.load(folder)[2].size, golden["outputs"]),
        (tuple(golden["other_size"].tolist()), golden["resized"]),
    ):
        model, variables, _ = pretrained.load(folder, image_size=size)
        found = _apply(model, variables, make["make_images"](size))
        differences[size] = float(np.abs(found - expected).max())
    return {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "differences": differences,
        "largest_logit": float(np.abs(golden["outputs"]).max()),
    }


def _apply(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, images))


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    sizes = " | ".join(
        f"{height} x {width}: {difference:.1e}"
        for (height, width), difference in result["differences"].items()
    )
    gradient = f"{result['gradient']:.1e}" if "gradient" in result else ""
    return (
        f"| {name} | {result['num_params'] / 1e6:.1f} M | {sizes} | "
        f"{result['largest_logit']:.1f} | {gradient} |"
    )


def report(rows: list[str]) -> str:
    """The table, with device and versions."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "transformers")}
    versions |= {"torch": torch.__version__, "Python": platform.python_version()}
    device = jax.devices()[0].device_kind
    return "\n".join(
        [
            "| sizes of | parameters | largest difference, where it is used | at another size "
            "| largest logit | gradient |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Device: {device}. " + ", ".join(f"{name} {v}" for name, v in versions.items()) + ".",
        ]
    )


def is_close(result: dict[str, Any]) -> bool:
    """Whether a case is within both tolerances."""
    return (
        max(result["differences"].values()) <= TOLERANCE
        and result.get("gradient", 0.0) <= GRADIENT_TOLERANCE
    )


def replace_between_marks(path: Path, text: str) -> None:
    """Puts `text` between the two marks of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"--output={path} has no lines {BEGIN!r} and {END!r} to write between.")
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    aside.replace(path)


def main() -> None:
    """Reads the command line, compares, prints and writes; exits with 1 beyond the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="compare networks with this in their names only")
    parser.add_argument("--output", type=expand, help="page whose table is replaced; all networks")
    args = parser.parse_args()
    comparisons = {case.name: functools.partial(compare, case) for case in CASES}
    comparisons |= {f"timm's {name}": functools.partial(compare_timm, name) for name in TIMM}
    chosen = [name for name in comparisons if args.only in name]
    if not chosen:
        parser.error(f"--only={args.only} is in no name; there are: {', '.join(comparisons)}")
    if args.output and args.only:
        parser.error("--output needs all networks: omit --only.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, failed = [], []
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            result = comparisons[name](Path(folder))
        rows.append(row(name, result))
        print(rows[-1], flush=True)
        if not is_close(result):
            failed.append(name)
    if failed:
        sys.exit(f"Beyond {TOLERANCE} or, for gradients, {GRADIENT_TOLERANCE}: {failed}")
    if args.output:
        replace_between_marks(args.output, report(rows))


if __name__ == "__main__":
    main()
