"""Divides the batch of a step into passes."""

from ml_collections import ConfigDict

from vitcls.errors import UserError


def group_size(config: ConfigDict) -> int:
    """Neighbours that a pass keeps together: pairs are mixed."""
    return 2 if config.augment.mixup or config.augment.cutmix else 1


def pass_sizes(config: ConfigDict, num_devices: int) -> list[int]:
    """Returns the sizes of passes, on each device, that divide a step's batch; largest first."""
    num_rows = config.train.global_batch_size // num_devices
    return _divisors(num_rows, group_size(config))[::-1]


def _divisors(num_rows: int, group_size: int) -> list[int]:
    sizes = range(group_size, num_rows + 1, group_size)
    return [size for size in sizes if num_rows % size == 0]


def pass_size(num_rows: int, micro_batch: int | None, *, group_size: int = 1) -> int:
    """Returns how many of a device's rows are one pass.

    Args:
      num_rows: Images that the device has of a batch.
      micro_batch: Limit on the size of a pass; None: one pass takes all rows.
      group_size: Neighbours that a pass keeps together.

    Raises:
      UserError: the rows cannot be divided so, or only into much smaller passes.
    """
    if num_rows % group_size or (micro_batch is not None and micro_batch < group_size):
        raise UserError(
            f"augment.mixup and augment.cutmix mix pairs, which {num_rows} images on each device "
            f"in passes of {micro_batch or num_rows} cannot hold together. Set "
            "train.global_batch_size to an even number per device, and train.micro_batch to 2 or "
            "more, or switch both off."
        )
    if micro_batch is None:
        return num_rows
    sizes = _divisors(num_rows, group_size)
    size = max(size for size in sizes if size <= micro_batch)
    if size < min(num_rows, micro_batch) / 2:
        larger = min(size for size in sizes if size > micro_batch)
        raise UserError(
            f"train.micro_batch={micro_batch} does not suit the {num_rows} images that each device "
            f"has of a batch: they divide into passes of {size} or {larger}. Set one of these, or "
            "another train.global_batch_size."
        )
    return size
