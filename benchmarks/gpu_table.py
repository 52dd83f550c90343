"""The results of gpu.py as Markdown."""

CHECK = "| check | passed | largest value | its bound | s |\n|---|---|---|---|---|"
CASE = (
    "| case | tokens/s | peak GiB | predicted GiB (dry run) | difference | roofline tokens/s (predicted) | MFU | s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(results: list[dict]) -> str:
    """Machine, checks, cases and failures. Of a part that ran several times the last result counts."""
    last = {result["part"]: result for result in results}
    machine = last.pop("machine", {})
    about = [f"{name}: {value}" for name, value in machine.items() if name not in ("part", "ok", "seconds")]
    checks = [_check(name, r) for name, r in last.items() if "checks" in r]
    cases = [_case(name, r) for name, r in last.items() if "checks" not in r and "error" not in r]
    failed = [f"- {name}: {r['error']}" for name, r in last.items() if "error" in r]
    parts = [
        "; ".join(about),
        "\n".join([CHECK, *checks]) if checks else "",
        "\n".join([CASE, *cases]) if cases else "",
    ]
    parts.append("\n".join(["Failed:", *failed]) if failed else "")
    return "\n\n".join(part for part in parts if part)


def _check(name: str, result: dict) -> str:
    checks = result["checks"]
    worst = max(checks, key=lambda key: checks[key][0] / checks[key][1] if checks[key][1] else checks[key][0])
    value, bound = checks[worst]
    return f"| {name} | {'yes' if result['ok'] else 'NO'} | {worst}: {value:.3g} | {bound:.3g} | {result['seconds']} |"


def _case(name: str, result: dict) -> str:
    if "skipped" in result:
        return f"| {name} | {result['skipped']} | | | | | | |"
    peak, predicted = result.get("peak_gib"), result.get("predicted_gib")
    difference = f"{peak / predicted - 1:+.0%}" if peak and predicted else ""
    speed = " / ".join(f"{value:,.0f}" for key, value in result.items() if key.endswith("tokens_per_second") and key != "roofline_tokens_per_second")  # fmt: skip
    cells = [speed, peak, predicted, difference, result.get("roofline_tokens_per_second"), result.get("mfu"), result["seconds"]]  # fmt: skip
    return f"| {name} | {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
