"""Known ways to a bad result are warned of."""

import pytest

from tests.run.configs import make_config
from vitcls.models import vit_config
from vitcls.run import warnings


@pytest.mark.parametrize(
    ("field", "value", "num_select", "message"),
    [
        ("optim.lr", 5e-4, 0, "optim.lr=0.0005 is high for adamw on all of a pretrained ViT"),
        ("train.seed", 1, 36, "has 36 images: an accuracy of 90 % has a standard error of 5.0 po"),
        (
            "loss.logit_adjustment",
            1.0,
            0,
            "loss.class_weights and loss.logit_adjustment each correct for rare classes: together",
        ),
        ("data.sampling", "sqrt", 0, "loss.class_weights and data.sampling each correct for rare"),
        ("optim.weight_decay", 0.1, 0, "pulls the same weights to 0. Set optim.weight_decay=0."),
        (
            "train.total_steps",
            1000,
            0,
            "No checkpoint is saved before the end of the 1000 steps, unless a",
        ),
        (
            "optim.warmup_steps",
            2,
            0,
            "optim.warmup_steps=2 is most of the 2 steps of optim.schedule='cosine', which hardly",
        ),
    ],
)
def test_known_traps_are_warned_of(field, value, num_select, message):
    model_config = vit_config.vit_config("vit_ti16", num_classes=2, image_size=(32, 32))
    config = make_config("x")
    config.optim.lr = 1e-4
    config.loss.class_weights = "balanced"
    config.adapt.l2_sp = 0.1
    assert warnings.traps(config, model_config, num_select=100) == []
    group, name = field.split(".")
    config[group][name] = value
    (warning,) = warnings.traps(config, model_config, num_select=num_select)
    assert message in warning
    if field == "optim.lr":
        for adaptation in ({"train": "head"}, {"layer_decay": 0.7}, {"lora_rank": 4}):
            spared = config.copy_and_resolve_references()
            spared.adapt.update(adaptation)
            assert warnings.traps(spared, model_config, num_select=0) == []
