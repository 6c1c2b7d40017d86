"""Counts the bytes of a training step between a TPU and its memory, without the TPU.

    python -m benchmarks.tpu_bytes --model=vit_b16 --batch_size=128 --topology=v5e:1x1

Compiles the step of configs/vit_b16.py or configs/resnet50.py in bfloat16 for a slice that need not
exist (Linux on x86-64, pip install 'jax[tpu]') and sums the bytes of every instruction, by kind;
see vitcls/costs/traffic.py. A fusion counts for the operation in its name, one of several that it
does. These are the compiler's decisions, not measurements. A compilation takes minutes.
"""

import argparse
import re
from importlib import import_module

from vitcls.costs import chips

# The first pattern that an instruction's name matches counts.
KINDS = {
    "products q, k and v": r"/attention/qkv/",
    "product after attention": r"/attention/output/",
    "attention and its copies": r"/attention/",
    "mlp": r"/mlp/",
    "embeddings": r"/embeddings/",
    "gradients of kernels": r"bhwc,bhwd->cd",
    "convolutions": r"/convolution/",
    "other layers": r"jvp\(",
    "optimizer and the rest": r"",
}
# Early copies between memory and fast memory name no operation.
MOVES = ("copy-start", "copy-done", "slice-start", "slice-done")


def kind_of(name: str, opcode: str) -> str:
    """Returns the kind of an instruction."""
    if opcode in MOVES:
        return "to and from fast memory"
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def report(text: str) -> str:
    """Returns the table of a compiled program."""
    from vitcls.costs.traffic import find_traffic

    found = find_traffic(text)
    rows = {}
    for one in found:
        row = rows.setdefault(kind_of(one.name, one.opcode), [0.0] * 4)
        is_backward = "transpose(" in one.name
        row[is_backward] += (one.read + one.written) * one.times / 1e9
        row[2] += (one.read + one.written) * one.times / 1e9
        row[3] += one.padding * one.times / 1e9
    rows["in all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'GB':26}{'forwards':>10}{'backwards':>11}{'both':>9}{'padding':>9}"]
    for kind, (forwards, backwards, both, padding) in sorted(
        rows.items(), key=lambda item: item[1][2]
    ):
        lines.append(f"{kind:26}{forwards:10.2f}{backwards:11.2f}{both:9.2f}{padding:9.2f}")
    return "\n".join(lines)


def main() -> None:
    """Compiles the step and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vit_b16", help="an architecture (default: vit_b16)")
    add("--image_size", type=int, default=224, help="height and width (default: 224)")
    add("--batch_size", type=int, default=128, help="images on each device (default: 128)")
    add("--topology", default="v5e:1x1", help="slice of TPUs (default: v5e:1x1)")
    args = parser.parse_args()
    chips.prepare_environment()
    from vitcls.errors import UserError
    from vitcls.plan import planning, slices
    from vitcls.run.program import with_fields

    recipe = "resnet50" if args.model.startswith("resnet") else "vit_b16"
    config = import_module(f"configs.{recipe}").get_config("data=tfds:imagenet2012")
    try:
        where = slices.open_slice(args.topology, dtype="bfloat16")
        fields = {
            "data.image_size": (args.image_size,) * 2,
            "data.resize": 8 * args.image_size // 7,
            "train.global_batch_size": args.batch_size * len(where.devices),
        }
        config = with_fields(config, fields)
        options = dict(arch=args.model, num_classes=1000, num_images=1_281_167)
        plans = planning.Plans(config, where, **options)
    except UserError as error:
        parser.error(str(error))  # exits with 2
    compiled = plans.program(plans.asked).lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(f"{args.model} at {args.image_size} px, {args.batch_size} images, {args.topology}")
    print(report(text))
    print(
        f"temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB; the compiler's 'bytes accessed', "
        f"with its fast memory: {compiled.cost_analysis()['bytes accessed'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
