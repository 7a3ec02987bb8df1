"""Result files that tests of the report make, and what they look for in its page."""

import json


def write(folder, **files):
    """Result files by name."""
    for name, report in files.items():
        (folder / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")


def score(policy, kl, megabytes, **more):
    return {"policy": policy, "kl_mean": kl, "kv_bytes_per_token": megabytes * 1e6, "prompts": 9,
            "budget_tokens": 512, **more}  # fmt: skip


def part(text, title):
    """The text under a heading, up to the next of its level."""
    level = title.partition(" ")[0]
    return text.split(f"{title}\n", 1)[1].split(f"\n{level} ", 1)[0]
