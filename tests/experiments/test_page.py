"""Pages: a table as Markdown and CSV, and a figure."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lit_adv.experiments.page import Curve, Page, figure

ROWS = [["f_b, 1 epoch", "81.6", "12,3"], ["adv.\u00a0trained", "82.9", '0.272 "paper"']]


def page(**changed: object) -> Page:
    settings = {"delta": 0.2, "seeds": (0, 1)}
    given = {"title": "Choice of f_b", "settings": settings, "heads": ["f_b", "standard (paper)", "x"], "rows": ROWS}
    return Page(**{**given, **changed})  # type: ignore[arg-type]


def test_a_page_says_its_settings_and_draws_its_table(tmp_path: Path) -> None:
    files = page(notes=["n = 5", "one draw"]).write(tmp_path / "new" / "folder", "table")
    assert [file.name for file in files] == ["table.md", "table.csv"]
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["table.csv", "table.md"]
    lines = files[0].read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Choice of f_b"
    assert "Settings: delta 0.2, seeds (0, 1)." in lines
    assert lines[-2:] == ["* n = 5", "* one draw"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells == [["f_b", "standard (paper)", "x"], ["---"] * 3, *ROWS]
    with files[1].open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["f_b", "standard (paper)", "x"], *ROWS]


def test_a_page_is_written_over_whole(tmp_path: Path) -> None:
    page().write(tmp_path, "t")
    (first, _) = page(rows=[["a", "b", "c"]]).write(tmp_path, "t")
    text = first.read_text()
    assert "81.6" not in text
    assert text.endswith("| a | b | c |\n")  # no notes, no empty lines at the end


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a row has 2 cells for 3 columns: .*'a', 'b'"):
        page(rows=[["a", "b"]])


@pytest.mark.parametrize("log", [False, True])
def test_a_figure_is_a_picture(tmp_path: Path, log: bool) -> None:
    curves = [
        Curve("ours", [1, 10, 100], [0.5, 0.7, 0.8], low=[0.4, 0.6, 0.7], high=[0.6, 0.8, 0.9]),
        Curve("the paper's", [1, 100], [0.6, 0.9], paper=True),
    ]
    path = figure(tmp_path / "new" / "f.png", curves, "draws", "accuracy", "title", log)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 5000
    assert [file.name for file in path.parent.iterdir()] == ["f.png"]
