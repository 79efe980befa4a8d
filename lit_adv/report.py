"""Report of attacks: a table over attacks, the worst case per image, curves and pictures as HTML, JSON and
CSV."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_adv.audit import Audited, complete
from lit_adv.checks import of_records
from lit_adv.metrics import Records
from lit_adv.metrics import summary as definitions
from lit_adv.metrics.summary import Summary, mcnemar, summarize, worst_case
from lit_adv.outcome import Comparison, Outcome, Verdict
from lit_adv.pictures import Examples, Line, curves_png, examples_png, image_grid, panels, png
from lit_adv.tables import FIGURES, Row, columns, csv_bytes, interval, markdown, p_value, percent, threat

if TYPE_CHECKING:
    from rich.table import Table

_FEW, _UNLIKELY = 10, 0.05  # more paired tests than these are printed only where p is below

__all__ = ["Comparison", "Examples", "Outcome", "Report", "Verdict", "image_grid"]


class Report:
    """Gathers what several attacks achieved and writes it down.

    Args:
        outcomes: One per attack and model.
        model: The model's name; that of every outcome which names none.
        data: The data set's name and split.
        facts: Further facts to print, as versions and date, by name.
        probed: What the audit's probes have found about the models; None: nothing was probed.

    Attributes:
        audits: What speaks for and against believing the figures, for each model and threat model.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        model: str,
        data: str,
        facts: Mapping[str, str] | None = None,
        probed: Sequence[Audited] = (),
    ) -> None:
        self.model, self.data, self.facts = model, data, dict(facts or {})
        self.outcomes = [replace(outcome, model=outcome.model or model) for outcome in outcomes]
        several = len({outcome.model for outcome in self.outcomes}) > 1
        self.labels = _distinct(f"{o.name} on {o.model}" if several else o.name for o in self.outcomes)
        self.summaries = [summarize(outcome.records) for outcome in self.outcomes]
        groups: dict[tuple[str | None, str, float], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.model, outcome.norm, outcome.eps), []).append(outcome)
        self._groups = list(groups.values())
        self.verdicts = [_verdict(group) for group in self._groups]
        self.probed = [replace(each, model=each.model or model) for each in probed]
        self.audits = [_audited(group, self.probed) for group in self._groups]

    def warnings(self) -> list[str]:
        """Return what the audit warns of, each with its setting, its figures and what to run next."""
        return [warning for audit in self.audits for warning in audit.warnings]

    def remarks(self) -> list[str]:
        """Return what the figures leave open."""
        return [
            f"{first.model}, {threat(first.norm, first.eps)}: no attack saw gradients, a white-box one may do better."
            for first, *others in self._groups
            if all(outcome.access != "gradient" for outcome in (first, *others))
        ]

    def comparisons(self) -> list[Comparison]:
        """Return McNemar's test for each two attacks on one model, and each two models under one attack.

        Only attacks under one threat model are compared.
        """
        pairs = itertools.combinations(zip(self.labels, self.outcomes, strict=True), 2)
        return [
            Comparison(first, second, mcnemar(a.records, b.records))
            for (first, a), (second, b) in pairs
            if (a.norm, a.eps) == (b.norm, b.eps) and (a.model == b.model or a.name == b.name)
        ]

    def rows(self) -> list[Row]:
        """Return the table's rows: one per outcome, then the worst case of each model and threat model."""
        rows = [
            Row(o.model or "", o.name, threat(o.norm, o.eps), o.access, o.budget, summary, o.draws)
            for o, summary in zip(self.outcomes, self.summaries, strict=True)
        ]
        return rows + [_worst_row(verdict) for verdict in self.verdicts if len(verdict.attacks) > 1]

    def show(self) -> None:
        """Print facts, table, verdicts and warnings; a narrow terminal gets the columns that matter most."""
        from rich.console import Console

        console = Console()
        for name, fact in self.facts.items():
            if " " in name:
                console.print(f"{name}: {fact}", highlight=False)
        console.print(self.table(brief=console.width < 200))
        for line in self._closing(brief=True):
            console.print(line, highlight=False, markup=False)

    def table(self, brief: bool = False) -> Table:
        """Return the table for the terminal, in its most important columns only if ``brief``."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = self.rows()
        chosen = columns(rows, brief)
        title = f"{self.model} on {self.data}"
        if not any(column.head == "threat" for column in chosen):
            title += f", {rows[0].threat}"
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for column in chosen:
            head = column.brief if brief else "\n".join(textwrap.wrap(column.group, 9) + textwrap.wrap(column.head, 9))
            justify: Literal["left", "right"] = "right" if column.number else "left"
            table.add_column(
                Text(head), justify=justify, vertical="bottom", overflow="fold", no_wrap=brief and column.number
            )
        for row in rows:
            table.add_row(*(Text(column.cell(row)) for column in chosen))
        return table

    def __str__(self) -> str:
        """Return the table, the verdicts and the audit as plain text."""
        from rich.console import Console

        console = Console(width=400, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join(lines + self._closing())

    def markdown(self) -> str:
        """Return success, distortion and queries of every attack as a table in Markdown, verdicts and notes below."""
        rows = self.rows()
        threats = {row.threat for row in rows}
        wanted = {"model", "threat"} if len(threats) > 1 else {"model"}
        chosen = [column for column in columns(rows) if column.head in wanted]
        lines = [markdown(rows, [*chosen, *FIGURES]), *(f"* {line}" for line in self._closing())]
        title = f"# {self.model} on {self.data}" + (f", {threats.pop()}" if len(threats) == 1 else "")
        return f"{title}\n\n" + "\n".join(lines) + "\n"

    def _closing(self, brief: bool = False) -> list[str]:
        """Return the lines below the table; ``brief`` leaves out what the audit has nothing to say against."""
        lines = [f"{verdict.setting}: {verdict.sentence}" for verdict in self.verdicts] + self.remarks()
        lines += self._compared()
        lines += [f"{label}: {note}" for label, o in zip(self.labels, self.outcomes, strict=True) for note in o.notes]
        for audit in self.audits:
            lines += [f"WARNING: {warning}" for warning in audit.warnings]
            lines += [audit.summary] if brief else audit.lines
        return lines

    def _compared(self) -> list[str]:
        """Return the paired tests in words; of many, those that tell two attacks apart."""
        tests = self.comparisons()
        told = [each for each in tests if len(tests) <= _FEW or (each.test.p is not None and each.test.p < _UNLIKELY)]
        lines = [f"{t.first} against {t.second}: McNemar's p {p_value(t.test.p)} (n {t.test.n:,})" for t in told]
        left = len(tests) - len(told)
        return lines + ([f"{left} further paired tests have p >= {_UNLIKELY:g}: report.json"] if left else [])

    def as_dict(self) -> dict[str, Any]:
        """Return everything but records and pictures, ready for strict JSON: infinite numbers become None."""
        outcomes = [
            {
                **_facts(outcome),
                "notes": outcome.notes,
                "counts": {name: {"happened": of[0], "times": of[1]} for name, of in outcome.counts.items()},
                "config": outcome.config,
                "summary": summary.as_dict(),
            }
            for outcome, summary in zip(self.outcomes, self.summaries, strict=True)
        ]
        found = {
            "model": self.model,
            "data": self.data,
            "facts": self.facts,
            "verdicts": [{**asdict(verdict), "sentence": verdict.sentence} for verdict in self.verdicts],
            "warnings": self.warnings(),
            "audit": [
                {"model": a.model, "norm": a.norm, "eps": a.eps, "findings": [f.as_dict() for f in a.findings]}
                for a in self.audits
            ],
            "remarks": self.remarks(),
            "outcomes": outcomes,
            "comparisons": [asdict(comparison) for comparison in self.comparisons()],
        }
        return {key: _jsonable(value) for key, value in found.items()}

    def write(self, dirpath: str | Path) -> dict[str, Path]:
        """Write the report's files, the records first; each appears whole or not at all.

        Returns the paths of report.html, report.json, report.md, report.csv and curves.png under html, json, md, csv
        and curves, and of each attack's files under records_NAME and examples_NAME.

        Args:
            dirpath: Folder to write to, made if missing.

        Raises:
            OSError: If a file cannot be written.
        """
        folder = Path(dirpath)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        paths: dict[str, Path] = {}
        for name, content in self._files():
            key = name.removeprefix("report.") if name.startswith("report.") else Path(name).stem
            paths[key] = folder / name
            _write(paths[key], content)
        return paths

    def _files(self) -> Iterator[tuple[str, bytes]]:
        stems = _distinct(re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "attack" for label in self.labels)
        for stem, outcome in zip(stems, self.outcomes, strict=True):
            yield (
                f"records_{stem}.csv",
                csv_bytes(outcome.records.rows(), [field.name for field in fields(Records)]),
            )
        rows = [_flat(outcome, summary) for outcome, summary in zip(self.outcomes, self.summaries, strict=True)]
        yield "report.csv", csv_bytes(rows, list(rows[0]) if rows else [])
        yield "report.md", self.markdown().encode()
        yield "report.json", _json(self.as_dict()).encode()
        yield "curves.png", curves_png(self._lines())
        for stem, outcome in zip(stems, self.outcomes, strict=True):
            if outcome.examples is not None and len(outcome.examples):
                yield f"examples_{stem}.png", examples_png(outcome.examples)
        yield "report.html", self._html().encode()

    def _lines(self) -> list[Line]:
        names = list(dict.fromkeys(o.name for o in self.outcomes))
        models = list(dict.fromkeys(o.model for o in self.outcomes))
        return [
            Line(label, o.records, names.index(o.name), models.index(o.model))
            for label, o in zip(self.labels, self.outcomes, strict=True)
        ]

    def _html(self) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
        page.trim_blocks = page.lstrip_blocks = True
        page.filters.update(percent=percent, interval=interval, p_value=p_value, uri=_uri, png=png, json=_json)
        rows = self.rows()
        heads = columns(rows)
        return page.get_template("report.html.jinja").render(
            report=self,
            rows=rows,
            columns=heads,
            groups=[(key, len(list(part))) for key, part in itertools.groupby(heads, lambda head: head.group)],
            curves=[curves_png(self._lines(), dark=dark) for dark in (False, True)],
            outcomes=list(zip(self.labels, self.outcomes, [_facts(o) for o in self.outcomes], strict=True)),
            panels=panels,
            definitions=_definitions(),
        )


def _verdict(group: Sequence[Outcome]) -> Verdict:
    first, names = group[0], tuple(outcome.name for outcome in group)
    summary = summarize(worst_case([outcome.records for outcome in group]))
    return Verdict(first.model or "", first.norm, first.eps, names, summary)


def _worst_row(verdict: Verdict) -> Row:
    # What the attack that won would have cost alone is not the price of running them all.
    costs = ("mean_queries", "median_queries", "mean_first_hit", "median_first_hit", "mean_checks",
             "mean_queries_of_attacked", "mean_checks_of_attacked")  # fmt: skip
    nothing: dict[str, Any] = dict.fromkeys(costs)
    summary = replace(verdict.summary, **nothing)
    name, kind = f"worst of {len(verdict.attacks)}", threat(verdict.norm, verdict.eps)
    return Row(verdict.model, name, kind, "", None, summary, worst=True)


def _audited(group: Sequence[Outcome], probed: Sequence[Audited]) -> Audited:
    """What probes and records tell of one model under one threat model."""
    first = group[0]
    key = first.model, first.norm, first.eps
    found = [finding for each in probed if (each.model, each.norm, each.eps) == key for finding in each.findings]
    return Audited(*key, complete([*found, *of_records(group)]))


def _facts(outcome: Outcome) -> dict[str, Any]:
    names = ("name", "model", "norm", "eps", "access", "budget", "draws", "seconds")
    return {name: getattr(outcome, name) for name in names}


def _flat(outcome: Outcome, summary: Summary) -> dict[str, Any]:
    """Return one row of report.csv: intervals in two columns, no quantiles."""
    flat = _facts(outcome) | summary.as_dict()
    for name in ("robust_interval", "success_interval"):
        ends = flat.pop(name) or {"low": None, "high": None}
        flat |= {f"{name}_{end}": value for end, value in ends.items()}
    del flat["query_quantiles"]
    return flat


def _definitions() -> list[str]:
    """Return the definitions that the summary module states."""
    parts = re.split(r"\n- ", definitions.__doc__ or "")[1:]
    return [re.sub(r"\*(.+?)\*|``(.+?)``", lambda m: m[1] or m[2], " ".join(part.split())) for part in parts]


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _json(value: Any) -> str:
    return json.dumps(_jsonable(value), indent=2, allow_nan=False, ensure_ascii=False)


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _distinct(names: Iterable[str]) -> list[str]:
    """Number repeated names, case aside, so that they can name files and lines."""
    taken: dict[str, None] = {}
    result = []
    for name in names:
        numbered = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        result.append(next(each for each in numbered if each.lower() not in taken))
        taken[result[-1].lower()] = None
    return result


def _write(path: Path, content: bytes) -> None:
    """Write under another name, then rename: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OSError:
    problem = f"cannot write the report ({error.strerror}); free some space or choose another folder"
    return OSError(error.errno, problem, str(path))
