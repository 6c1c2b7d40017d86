"""Writes a checkpoint for programs without vitcls, and compares the result with the original.

  python -m vitcls.export --checkpoint=runs/quickstart --format=huggingface --output=exported

--format=huggingface: a folder that `transformers` loads unchanged, with a model card.
--format=stablehlo: one program for CPU, CUDA and TPU and any batch size, from uint8 images to
probabilities. It needs jax and safetensors only.

docs/export.md describes both. A checkpoint's decision.json, which says when the network should not
answer (docs/decision.md), is written too, and the card says how to apply it.

The outputs of the exported network are compared with those of the original; export.json has the
largest difference. The folder appears after this comparison. If anything fails, nothing is left.
"""

from absl import flags

from vitcls import cli

_CHECKPOINT = cli.define_checkpoint()
_FORMAT = flags.DEFINE_enum("format", None, ["huggingface", "stablehlo"], "What to write.")
_OUTPUT = cli.define_new_folder()


def main() -> None:
    """Checks the flags, then exports."""
    checkpoint, format_, output = map(cli.required, (_CHECKPOINT, _FORMAT, _OUTPUT))
    from vitcls.export import formats  # imports jax, so it follows the checks of the flags

    cli.prepare_jax()
    record = formats.export(checkpoint, format=format_, output=output)
    print(
        f"largest difference {record['largest_difference']:.1e} on {record['num_images']} images, "
        f"checked with {' and '.join(record['checked_with'])} -> {output}"
    )


if __name__ == "__main__":
    cli.run(main)
