import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 passed, 1 skipped"), ("1", "1 passed, 1 error")])
def test_missing_data_are_counted_or_fail(tmp_path: Path, required: str, outcome: str) -> None:
    folder = tmp_path / "project" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "conftest.py", folder)
    (folder / "test_two.py").write_text("def test_a(data_root): pass\ndef test_b(generator): pass\n")
    environment = {**os.environ, "LIT_ADV_DATA": str(tmp_path / "absent"), "LIT_ADV_REQUIRE_DATA": required}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout
    assert outcome in output
    assert "no image data: LIT_ADV_DATA is not set" in output
    assert f"skipped for missing data: {1 - int(required)}" in output
