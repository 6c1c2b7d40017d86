"""The rule of an exported network: its file, and the lines that apply it without vitcls."""

import logging
from pathlib import Path
from typing import Any

from vitcls.decision import kept
from vitcls.files import write_json

log = logging.getLogger("vitcls")

_USAGE = """
### When it should not answer

`decision.json` has a threshold that was chosen on a hold-out. {promise}

```python
import json
import numpy as np

decision = json.load(open("{path}"))
logits = {logits}
score = {score}
is_answered = decision["threshold"] is not None and score >= decision["threshold"]
```
"""
_SCORES = {
    "probability": '1 / np.exp((logits - logits.max()) / decision["temperature"]).sum()',
    "energy": "logits.max() + np.log(np.exp(logits - logits.max()).sum())",
}


def write(directory: Path, decision: dict[str, Any] | None, *, has_logits: bool) -> str:
    """Writes `decision.json` and returns Markdown that says how to use it; "" without a rule.

    Args:
      directory: Folder of the exported network.
      decision: Content of the checkpoint's file; None: it has none.
      has_logits: Whether the exported network returns logits, or only probabilities.
    """
    if decision is None:
        return ""
    if decision["score"] == "energy" and not has_logits:
        log.warning(
            "decision.json is left out: its score is the energy, which needs logits, and this "
            "format has probabilities only. Choose again: python -m vitcls.analysis.decide WORKDIR "
            "--target_precision=0.95"
        )
        return ""
    write_json(directory / kept.NAME, decision)
    promise = kept.describe(decision)
    return _USAGE.format(
        promise=f"There, {promise}",
        path=f"FOLDER/{kept.NAME}" if has_logits else kept.NAME,
        logits="np.asarray(logits[0], np.float64)" if has_logits
        # Smaller numbers than this are zero in float32.
        else "np.log(np.maximum(np.asarray(probabilities[0], np.float64), 1e-38))",
        score=_SCORES[decision["score"]],
    )  # fmt: skip
