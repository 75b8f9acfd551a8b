"""Rows of the benchmarks: the file, comparison, tables, plots, and the documents made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import compare
from fastlora.cli.bench import rows, table
from fastlora.cli.bench.case import Case, Layer

# ---- rows --------------------------------------------------------------------------------------


def a_row(
    provider: str, ms: list[float], peft: list[float] | None = None, **cells: str
) -> rows.Row:
    """A row as a worker makes it."""
    layer = Layer(64, 128, 16, quant="nf4", dropout=0.05)
    shared = {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "device": "cpu",
        "cpu_isa": "avx2",
        "threads": "1",
        "allocator": "glibc",
    }
    what = rows.case_row(Case(layer, 16, "step"), provider, "fp32")
    seconds = [m * 1e-3 for m in ms]
    columns = rows.timing_columns(seconds, None if peft is None else [m * 1e-3 for m in peft])
    return {**dict.fromkeys(rows.COLUMNS, ""), **shared, **what, **columns, **cells}


PEFT_MS = [10.0, 20.0, 12.0]
OURS_MS = [5.0, 4.0, 4.0]


def test_ratio_is_taken_round_by_round() -> None:
    peft, ours = a_row("peft", PEFT_MS, PEFT_MS), a_row("fastlora", OURS_MS, PEFT_MS)
    # The ratios are 2, 5 and 3; the ratio of the medians would be the same 3, that of means 3.2.
    assert rows.ratio(ours, peft) == pytest.approx((2.4, 3.0, 4.2))
    assert (ours["ratio_p20"], ours["ratio_p50"], ours["ratio_p80"]) == ("2.4", "3", "4.2")
    with pytest.raises(ValueError, match="not of the same rounds"):
        rows.ratio(ours, {**peft, "date": "2026-01-02T00:00:00+00:00"})


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    written = [a_row("peft", PEFT_MS, PEFT_MS), a_row("fastlora", OURS_MS, PEFT_MS)]
    rows.append(path, written[:1])
    rows.append(path, written[1:])
    assert rows.read(path) == written
    assert path.read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    assert len(path.read_text().splitlines()) == 3
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        rows.append(tmp_path / "other.csv", written)
    with pytest.raises(ValueError, match="lacks date"):
        rows.read(tmp_path / "other.csv")


# ---- comparing, tables, plots ------------------------------------------------------------------


def compared(tmp_path: Path, before: rows.Row, after: rows.Row, *options: str) -> int:
    for name, row in (("before", before), ("after", after)):
        (tmp_path / f"{name}.csv").unlink(missing_ok=True)
        rows.append(tmp_path / f"{name}.csv", [row])
    return compare.main([str(tmp_path / "before.csv"), str(tmp_path / "after.csv"), *options])


def test_compare_finds_a_slow_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = [10.0, 10.0, 10.0]
    before = a_row("fastlora", [5.0, 5.1, 4.9], steady)
    slower = a_row("fastlora", [6.0, 6.1, 5.9], steady)
    assert compared(tmp_path, before, slower) == 1
    assert "1 compared, 1 slower by more than 10%" in capsys.readouterr().out
    assert compared(tmp_path, before, slower, "--threshold", "1.3") == 0
    assert compared(tmp_path, slower, before) == 0


def test_compare_knows_noise_and_slow_days(tmp_path: Path) -> None:
    steady = [10.0, 10.0, 10.0]
    before = a_row("fastlora", [5.0, 5.1, 4.9], steady)
    # The median is 20 % up, but two rounds in five were as fast as before.
    assert compared(tmp_path, before, a_row("fastlora", [6, 6.1, 6, 4.9, 5], [10.0] * 5)) == 0
    # Everything takes twice the time today: the ratio to the baseline stands.
    today = a_row("fastlora", [10.0, 10.2, 9.8], [20.0, 20.0, 20.0])
    assert compared(tmp_path, before, today) == 0
    assert compared(tmp_path, before, today, "--by", "time") == 1


def test_compare_counts_what_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = a_row("fastlora", [5.0])
    rows.append(tmp_path / "before.csv", [row, {**row, "M": "17"}, {**row, "provider": "peft"}])
    rows.append(tmp_path / "after.csv", [row])
    assert compare.main([str(tmp_path / "before.csv"), str(tmp_path / "after.csv")]) == 0
    assert "1 rows of" in capsys.readouterr().out.replace("\n", " ")


def test_compare_needs_something_to_compare(tmp_path: Path) -> None:
    before = a_row("fastlora", [5.0])
    with pytest.raises(SystemExit, match="2"):
        compared(tmp_path, before, {**before, "M": "17"})


def many_rows() -> list[rows.Row]:
    made = []
    for M in ("1", "16", "64"):
        for mode in ("forward", "step"):
            for allocator in ("glibc", "tcmalloc"):
                cells = {"M": M, "mode": mode, "allocator": allocator}
                for provider, ms in (("frozen", 3.0), ("peft", 9.0), ("fastlora", 2.0)):
                    memory = {"peak_mb": "80", "saved_bytes": "2.02"} if M == "64" else {}
                    samples = [ms, 1.1 * ms]
                    made.append(a_row(provider, samples, [9.0, 9.9], **cells, **memory))
    return made


def test_ratio_table_has_a_line_for_each_allocator_and_pass() -> None:
    (grid_,) = table.ratios(many_rows())
    assert grid_.markdown().splitlines() == [
        "**time of peft / time of fastlora: 64 x 128, nf4 nested in bf16, r = 16, dropout 0.05**",
        "",
        "| | M = 1 | M = 16 | M = 64 |",
        "|---|---:|---:|---:|",
        *(
            f"| {label} | 4.50 (4.50-4.50) | 4.50 (4.50-4.50) | 4.50 (4.50-4.50) |"
            for label in (
                "glibc, forward",
                "glibc, forward + backward",
                "tcmalloc, forward",
                "tcmalloc, forward + backward",
            )
        ),
    ]
    assert not table.ratios(many_rows(), "fastlora", "compile")


def test_newest_measurement_counts() -> None:
    old = [a_row("peft", [9.0], [9.0]), a_row("fastlora", [3.0], [9.0])]
    new = [{**row, "date": "2027-01-01T00:00:00+00:00"} for row in old]
    new[1] = {**new[1], **rows.timing_columns([1e-3], [9e-3])}
    (grid_,) = table.ratios(new + old)
    assert grid_.lines == [("glibc, forward + backward", [table.Cell("9.00", "9.00-9.00")])]


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are matplotlib's")
    from fastlora.cli.bench.plot import write_plots

    written = write_plots(many_rows(), tmp_path / "plots")
    assert sorted(path.name.split("-")[0] for path in written) == [
        *("bars", "bars", "memory", "memory", "time", "time")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# ---- documents ---------------------------------------------------------------------------------


def test_the_tables_of_the_documents_are_those_of_the_results() -> None:
    """They are what `python -m benchmarks.report.performance` writes from the rows in git."""
    from benchmarks.report import performance
    from benchmarks.report.document import fill

    measured = rows.read(performance.RESULTS)
    text = performance.DOCS.read_text()
    assert fill(text, performance.tables(measured)) == text
    readme = performance.README.read_text()
    assert fill(readme, performance.readme_tables(measured)) == readme
    with pytest.raises(ValueError, match="lacks <!-- nf4 -->"):
        fill("no marks", {"nf4": "a table"})


def test_rows_of_uncommitted_changes_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.report import performance

    made = [a_row("peft", [4.0]), {**a_row("fastlora", [2.0]), "commit": "0123abc-dirty"}]
    rows.append(tmp_path / "rows.csv", made)
    assert performance.main([str(tmp_path / "rows.csv"), "--print"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: 1 of 2 rows were measured on uncommitted changes")
    assert warning.endswith(": 0123abc-dirty\n")
    assert performance.dirty(made[:1]) is None


def test_the_tables_of_peft_are_those_of_their_results() -> None:
    """They are what the programs in benchmarks/measure write from the rows in git."""
    from benchmarks.measure import fuse, merging
    from benchmarks.report.document import fill

    text = merging.PAGE.read_text()
    assert fill(text, {"merging": merging.table(), "fuse": fuse.table()}) == text


def test_the_limit_counts_products_and_bytes() -> None:
    from benchmarks.report.performance import BANDWIDTH, PEAK_BF16, PEAK_FP32, limit_ms

    row = {"M": "2048", "N": "4096", "K": "1024", "R": "16", "mode": "step", "dtype": "bf16"}
    row["quant"] = "nf4 nested"
    base = 2 * (2 * 2048 * 4096 * 1024) / PEAK_BF16
    lora = 3 * (2 * 2048 * 16 * (4096 + 1024)) / PEAK_FP32
    assert limit_ms(row) == pytest.approx((base + lora) * 1e-6)
    few = {**row, "M": "1", "mode": "inference", "quant": "none"}
    assert limit_ms(few) == pytest.approx(4096 * 1024 * 2 / BANDWIDTH * 1e-6)
