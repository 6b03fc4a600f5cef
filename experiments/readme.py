"""Are the tables of README.md and docs/ what results/ says? Each stands below a line
<!-- table: NAME --> and is rebuilt from the tables in results/ as tables.json says. A second.

    python -m experiments.readme            # rebuilds them
    python -m experiments.readme --check    # names those that differ; exit 1 if there are any

In tables.json a table has a head, "from" if results/ calls its columns otherwise, and rows. There
a text stands for itself, and [NAME, first cell] for that row of results/NAME.md, in all columns but
one for each part that follows. NAME:i is the ith such row, from 0 on; {1337,1,2} are three rows,
shown as mean ± standard deviation, in three decimals or as a third part says.
"""
import csv
import json
import re
from functools import cache
from statistics import mean, stdev

from config import HERE, check, run

PAGES = [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]
TABLES = json.loads((HERE / "experiments/tables.json").read_text(encoding="utf-8"))


def progress():
    """Yields rows of the default run, from its log."""
    with (HERE / "results/masked.csv").open(newline="", encoding="utf-8") as f:
        log = {int(row["step"]): row for row in csv.DictReader(f)}
    for step in (100, 800, 1600, 2800):
        seconds = float(log[step]["seconds"])
        bound = f"{float(log[step]['bound']):.2f}"
        if step == 100:
            yield ["100 steps, first sample", f"{seconds:.0f} s", bound]
        else:
            yield [f"{step:,} steps", f"{seconds / 60:.1f} min", bound]


TABLES["progress"]["rows"] += progress()


@cache
def printed_rows(name):
    """[(first cell, {column: cell}), ...]: the rows of all tables in results/NAME.md."""
    text = (HERE / f"results/{name}.md").read_text(encoding="utf-8")
    text = text.replace("judge, nats/char", "generative NLL, nats/char")
    rows = []
    head = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        else:
            rows.append((cells[0], dict(zip(head, cells, strict=True))))
    return rows


def found(source, first, *columns):
    """Cells of the row of results/NAME.md that begins with `first`; source: NAME, or NAME:i."""
    name, _, i = source.partition(":")
    cells = []
    for column in columns:
        rows = [row for title, row in printed_rows(name) if title == first and column in row]
        if len(rows) <= int(i or 0):
            raise KeyError(f"results/{name}.md: no row {first!r} with {column}")
        cells.append(rows[int(i or 0)][column])
    return cells


def averaged(cells, decimals):
    """Mean ± standard deviation of the numbers that begin cells; a single cell as it is, and a
    whole number that all have in common."""
    is_whole = "." not in cells[0]
    if len(cells) == 1 or is_whole and len(set(cells)) == 1:
        return cells[0]
    values = [float(cell.split()[0].replace(",", "")) for cell in cells]
    if is_whole:
        decimals = 0
    return f"{mean(values):,.{decimals}f} ± {stdev(values):,.{decimals}f}"


def filled(row, columns):
    """The cells of a row of tables.json."""
    cells = []
    for i, part in enumerate(row):
        if isinstance(part, str):
            cells.append(part)
            continue
        source, first, decimals = [*part, 3][:3]
        n_after = len(row) - 1 - i
        names = columns[len(cells):len(columns) - n_after]
        before, options, after = re.fullmatch(r"([^{]*)\{?([^}]*)\}?(.*)", first).groups()
        runs = [found(source, before + x + after, *names) for x in options.split(",")]
        cells += [averaged(same, decimals) for same in zip(*runs, strict=True)]
    return cells


def markdown(name):
    """The table NAME as a page shows it."""
    table = TABLES[name]
    head = table["head"]
    rows = [filled(row, table.get("from", head)) for row in table["rows"]]
    if name == "four":             # README shows no errors
        rows = [[cell.partition(" ±")[0] for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |\n" for row in [head, *rows]]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1) + "\n")
    return "".join(lines)


def rebuilt(text):
    """text with its tables as they should be, and the names of those that were not."""
    differ = []

    def rebuild(match):
        name = match[1]
        table = markdown(name)
        if table != match[2]:
            differ.append(name)
        return f"<!-- table: {name} -->\n{table}"
    return re.sub(r"<!-- table: (\S+) -->\n((?:\|.*\n)*)", rebuild, text), differ


def main(argv):
    check(argv in ([], ["--check"]), __doc__)
    differ = []
    for path in PAGES:
        try:
            text, names = rebuilt(path.read_text(encoding="utf-8"))
        except KeyError as error:
            raise SystemExit(f"{error}") from None
        differ += [f"{path.name}: {name}" for name in names]
        if names and not argv:
            path.write_text(text, encoding="utf-8")
    names = ", ".join(differ)
    check(not differ or not argv, f"not what results/ says: {names}")
    print(f"rebuilt {names or 'nothing: all as it should be'}")


if __name__ == "__main__":
    run(main)
