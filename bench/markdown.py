"""What the sections of a results page share: tables, and where rows were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.report import Row

NOT_YET = "*Not yet measured.*"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def provenance_line(rows: Sequence[Row]) -> str:
    """Machines, versions and dates of the rows."""

    def machine(row: Row) -> str:
        where = row["machine"]
        parts = [where["gpu"]] if "gpu" in where else []
        cpu = f"{where['cpu']} ({where['isa']})" if "isa" in where else where["cpu"]
        parts += [cpu, f"{where['threads']} thread(s) a run"]
        parts += [f"{row['jobs']} run(s) at a time"] if "jobs" in row else []
        return ", ".join(parts)

    def distinct(of: Callable[[Row], str]) -> str:
        return "; ".join(dict.fromkeys(map(of, rows)))

    versions = distinct(lambda row: ", ".join(f"{k} {v}" for k, v in row["versions"].items()))
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured {when} on {distinct(machine)}; {versions}."
