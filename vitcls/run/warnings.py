"""What leads to a bad result, or to another than was planned."""

import json
import math
from pathlib import Path

from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.checks import cycle_lengths
from vitcls.config.saved import read_saved_config
from vitcls.models import vit_config
from vitcls.run.program import learning_rate, with_fields

# What `traps` warns of: fewer images that select, and of Adam on all of a ViT of this width or
# more, a higher rate.
_FEW_IMAGES, _SMALL_WIDTH, _MOST_LR = 100, 192, 3e-4

# Of a run that should be saved before its end.
_MANY_STEPS = 1000


def rate_changes(config: ConfigDict, path: Path, *, step: int) -> list[str]:
    """Returns a warning for each way in which a continued run has another rate than was planned.

    Args:
      config: The run's, as `resolve` returns it.
      path: Its config as it was saved.
      step: The last step that was saved.
    """
    changes, total_steps, saved = [], config.train.total_steps, read_saved_config(path)
    planned, restarts = saved.train.total_steps, tuple(saved.optim.restarts)
    before = with_fields(config, {"train.total_steps": planned, "optim.restarts": restarts})
    # The field came along with the change.
    is_old = "restarts" not in json.loads(path.read_text())["optim"]
    if is_old and config.optim.schedule == "step" and config.optim.warmup_steps and step < planned:
        changes.append(
            "optim.schedule='step' divides at 30, 60 and 90 % of all steps; this run began when it "
            f"did so at those of what follows the warm-up. It continues with a learning rate of "
            f"{float(learning_rate(before)(step)):.2g}."
        )
    last = float(learning_rate(before)(step - 1))
    rate = float(learning_rate(config)(step))
    if planned >= total_steps or (config.optim.restarts == restarts and rate == last):
        return changes
    if config.optim.restarts != restarts:
        how = f"optim.restarts={config.optim.restarts} begins optim.schedule anew"
    else:
        how = (
            f"optim.schedule={config.optim.schedule!r} is laid out anew over all steps. Given in "
            f"the first longer start, --config.optim.restarts='{(*restarts, planned)}' begins it "
            f"anew after step {planned} instead, with its warm-up"
        )
    return [
        *changes,
        f"train.total_steps={total_steps} lengthens a run of {planned} steps: the learning rate "
        f"goes from {last:.2g} in step {step} to {rate:.2g} in the next. {how}.",
    ]


def traps(config: ConfigDict, model_config: pretrained.Config, *, num_select: int) -> list[str]:
    """Returns a warning, with its reason, for each known way to a bad result.

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
        and "adam" in optim.name and optim.lr > _MOST_LR
    ):  # fmt: skip
        found.append(
            f"optim.lr={optim.lr:g} is high for {optim.name} on all of a pretrained ViT: a step "
            "moves every weight by about the rate, however small its gradient, and so soon away "
            "from what was pretrained. Try 1e-5 to 1e-4, or adapt.layer_decay."
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
            f"Nothing of the {config.train.total_steps} steps is saved before the end, unless a "
            "signal stops them: a crash loses all. Set checkpoint.every_steps."
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
            "adapt.l2_sp draws weights to the pretrained ones and optim.weight_decay draws the "
            "same weights to 0. Set optim.weight_decay=0."
        )
    return found
