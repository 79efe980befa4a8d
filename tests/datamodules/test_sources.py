import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from lit_adv.datamodules.sources import to_pixels


def test_import_is_cheap() -> None:
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lit_adv.datamodules\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'sklearn', 'torchvision', 'PIL', 'scipy'}), 'sklearn' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["[]", "False"]


def test_to_pixels() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert torch.equal(to_pixels(Image.fromarray(array)), torch.from_numpy(array.transpose(2, 0, 1).copy()))
    assert to_pixels(Image.new("L", (5, 3), 9)).tolist() == [[[9] * 5] * 3] * 3
