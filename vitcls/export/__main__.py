"""Writes a checkpoint for programs that know nothing of vitcls, and checks what it wrote.

  python -m vitcls.export --checkpoint=runs/quickstart --format=huggingface --output=exported

--format=huggingface: a folder that `transformers` loads unchanged, with a model card.
--format=stablehlo: one program for CPU, CUDA and TPU and any batch size, uint8 images in,
probabilities out; jax and safetensors are all that running it needs.

docs/export.md says more of both.

The answers of what was written are compared with the network's own; export.json has the largest
difference. The folder appears when that is done; when anything fails, nothing is left.
"""

from absl import flags

from vitcls import cli

_CHECKPOINT = cli.define_checkpoint()
_FORMAT = flags.DEFINE_enum("format", None, ["huggingface", "stablehlo"], "What to write.")
_OUTPUT = cli.define_new_folder()


def main() -> None:
    """Checks the flags, then exports."""
    checkpoint, format_, output = map(cli.required, (_CHECKPOINT, _FORMAT, _OUTPUT))
    from vitcls.export import formats  # imports jax: only once the flags are known to be right

    cli.prepare_jax()
    record = formats.export(checkpoint, format=format_, output=output)
    print(
        f"largest difference {record['largest_difference']:.1e} on {record['num_images']} images, "
        f"checked with {' and '.join(record['checked_with'])} -> {output}"
    )


if __name__ == "__main__":
    cli.run(main)
