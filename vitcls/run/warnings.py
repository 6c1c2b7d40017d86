"""Warns of the known ways to a bad result."""

import logging
import math

from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.checks import cycle_lengths
from vitcls.models import vit_config
from vitcls.run.opened import Run

log = logging.getLogger("vitcls")

# Fewer images choose a checkpoint by chance. On all of a ViT of this width or more, a higher rate
# of Adam destroys what was pretrained.
_FEW_IMAGES, _SMALL_WIDTH, _MAX_LR = 100, 192, 3e-4

# A run of so many steps should be saved before its end.
_MANY_STEPS = 1000


def warn_of_traps(run: Run) -> None:
    """Logs a warning, with its reason, for each known way to a bad result."""
    select = run.config.eval.select_split
    num_select = len(run.eval_splits[select]) if select else 0
    for trap in traps(run.config, run.model_config, num_select=num_select):
        log.warning("%s", trap)


def traps(config: ConfigDict, model_config: pretrained.Config, *, num_select: int) -> list[str]:
    """Returns these warnings.

    Args:
      config: The run's, as `resolve` returns it.
      model_config: The network's.
      num_select: Images that choose the checkpoint; 0: none does.
    """
    optim, adapt, found = config.optim, config.adapt, []
    is_whole = adapt.train in ("", "all") and not (adapt.freeze or adapt.lora_rank)
    is_vit = isinstance(model_config, vit_config.ViTConfig) and model_config.width >= _SMALL_WIDTH
    if (
        config.model.pretrained and is_vit and is_whole and adapt.layer_decay == 1
        and "adam" in optim.name and optim.lr > _MAX_LR
    ):  # fmt: skip
        found.append(
            f"optim.lr={optim.lr:g} is high for {optim.name} on all of a pretrained ViT: a step "
            "moves every weight by about the rate, however small its gradient, so that the "
            "pretrained weights are soon lost. Try 1e-5 to 1e-4, or adapt.layer_decay."
        )
    if 0 < num_select < _FEW_IMAGES:
        error = 100 * math.sqrt(0.9 * 0.1 / num_select)
        found.append(
            f"eval.select_split={config.eval.select_split!r} has {num_select} images: an accuracy "
            f"of 90 % has a standard error of {error:.1f} points there, so the checkpoint is "
            "chosen largely by chance. Hold out more (data.holdout), or set eval.select_split=''."
        )
    shortest = min(cycle_lengths(config))
    if optim.schedule != "constant" and optim.warmup_steps > shortest / 2:
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} is most of the {shortest} steps of "
            f"optim.schedule={optim.schedule!r}, which hardly falls before the end. Set it to a "
            "tenth, or train for longer."
        )
    is_saved = config.checkpoint.every_steps or config.eval.every_steps
    if not is_saved and config.train.total_steps >= _MANY_STEPS:
        found.append(
            f"No checkpoint is saved before the end of the {config.train.total_steps} steps, "
            "unless a signal stops the run: a crash loses all. Set checkpoint.every_steps."
        )
    corrections = {
        "loss.class_weights": config.loss.class_weights != "none",
        "loss.logit_adjustment": config.loss.logit_adjustment,
        "data.sampling": config.data.sampling != "uniform",
    }
    corrections = [field for field, is_set in corrections.items() if is_set]
    if len(corrections) > 1:
        found.append(
            f"{' and '.join(corrections)} each correct for rare classes: together they correct "
            "more than once. Set one of them."
        )
    if adapt.l2_sp and optim.weight_decay:
        found.append(
            "adapt.l2_sp pulls weights to the pretrained ones, and optim.weight_decay pulls the "
            "same weights to 0. Set optim.weight_decay=0."
        )
    return found
