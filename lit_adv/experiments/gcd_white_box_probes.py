"""What the audit's own attacks broke: its records lie beside those of the attacks that it audits."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from lit_adv.archive import Archive, fingerprint, weights_hash
from lit_adv.datamodules import Batch
from lit_adv.metrics import Records


def probed(folder: Path, model: nn.Module, batch: Batch) -> list[Records]:
    """Records of the audit's attacks on this very network and these very images, one for each attack.

    Args:
        folder: of the audit. batch: all images that are attacked.
    """
    prints = {int(i): fingerprint(x, int(y)) for x, y, i in zip(batch.image, batch.label, batch.index, strict=True)}
    weights, found = weights_hash(model), []
    for path in sorted(folder.glob("*/*/identity.rank0.json")):
        known_by = json.loads(path.read_text())
        if known_by.get("weights") != weights:
            continue
        rows = Archive(path.parent.parent, known_by).load()
        same = [row for index, row in sorted(rows.items()) if row.get("image") == prints.get(index, "")]
        if same:
            found.append(Records.from_rows(same))
    return found
