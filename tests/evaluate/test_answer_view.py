"""The page of an answer: what it says is what the steps did, and a browser shows it."""

import re
import shutil
import subprocess

import pytest
import tiny
import torch
from typer.testing import CliRunner

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.cli import app
from lycheedecode.evaluate.answer_view import AnswerView, TokenView, render, watch
from lycheedecode.evaluate.variants import variants

CONFIG = HybridConfig(budget_tokens=32, block_size=8, sink_tokens=4, recent_tokens=4)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def watched(plan=None, config=CONFIG, length=120, tokens=12):
    engine = Engine(tiny.model(), tiny.byte_tokenizer(), plan=plan or tiny.plan(), config=config)
    [prompt] = tiny.prompts(length)
    return engine, prompt, watch(engine, prompt, tokens, ignore_eos=True)


def test_the_answer_is_the_engines():
    engine, prompt, view = watched()
    [made] = engine.generate([prompt], 12, ignore_eos=True)
    assert "".join(token.text for token in view.tokens) == made.text
    assert len(view.tokens) == len(made.token_ids) == 12
    assert len(view.prompt) == 15
    assert view.heads == (8, 4)


def test_heads_of_sliding_layers_are_not_counted():
    """They are their own donors, and attend to their window."""
    engine = Engine(tiny.model("gemma3"), tiny.byte_tokenizer(), plan=tiny.plan((1, 3)), config=CONFIG)
    assert watch(engine, tiny.prompts(60)[0], 2, ignore_eos=True).heads == (4, 2)
    [_, hybrid] = variants(["hybrid"], {"mine": tiny.plan((1, 3))}, CONFIG)
    assert hybrid.describe(CONFIG, engine.shape)["retrieval_heads"] == 2


def test_selections_stay_within_the_budget_and_hold_what_is_forced():
    _, _, view = watched()
    assert view.tokens[0].blocks is None
    for step, seen in enumerate(token.blocks for token in view.tokens[1:]):
        assert 0 in seen  # sinks
        assert seen[0] == tiny.LAYERS * tiny.KV_HEADS  # of every head
        assert max(seen) <= 14
        assert sum(seen.values()) <= 8 * 4, step


def test_everything_is_covered_when_the_budget_covers_the_prompt():
    _, _, view = watched(config=HybridConfig(budget_tokens=256, block_size=8))
    for item in view.tokens[1:]:
        assert item.covered == pytest.approx(1.0, abs=1e-4)
        assert len(item.blocks) == 15
    assert all(item.otherwise is None for item in view.tokens)


def test_full_attentions_choice_is_shown_where_it_differs():
    engine, prompt, view = watched(plan=HeadPlan.same_index([], tiny.LAYERS, tiny.KV_HEADS), tokens=40)
    full = Engine(engine.model)
    context = full.prefill([prompt])
    [made] = engine.generate([prompt], 40, ignore_eos=True)
    logits = torch.cat([context.logits[:, None], full.score(context, [made.token_ids])[:, :-1]], 1)[0]
    for token, chance, other, row in zip(
        made.token_ids,
        [item.chance for item in view.tokens],
        [item.otherwise for item in view.tokens],
        logits.softmax(-1),
        strict=True,
    ):
        assert chance == pytest.approx(float(row[token]), rel=1e-3)
        assert (other is None) == (int(row.argmax()) == token)
    assert any(item.otherwise for item in view.tokens)


def test_the_page_reads_without_scripts_and_fetches_nothing():
    _, _, view = watched()
    page = render(view, "a <title>")
    assert "a &lt;title&gt;" in page
    assert not re.search(r"(src|href)=|@import|url\(|https?:", page)
    body = page[: page.index("<script>")]
    assert body.count('class="b"') == 15
    assert body.count('class="t') == 12


def test_the_page_of_a_long_prompt_stays_small():
    """32K tokens in blocks of 16 and 200 answer tokens, each of which read everything: below 5 MB."""
    readers = {block: block % 90 + 1 for block in range(2048)}
    blocks = tuple(f"{block:04d} is the text of a block of some 64 bytes, with <b>&amp;</b>" for block in range(2048))
    looks = tuple(TokenView(" token", readers, 0.87654321, 0.12345678, (" other", 0.5)) for _ in range(200))
    page = render(AnswerView(blocks, looks, 16, 4096, (90, 14)))
    assert len(page.encode()) < 5e6
    assert page.count('class="b"') == 2048


def test_full_attention_has_nothing_to_show():
    with pytest.raises(ValueError, match="has selections to show"):
        watch(Engine(tiny.model(), tiny.byte_tokenizer()), [5, 6], 2)


@pytest.mark.skipif(BROWSER is None, reason="There is no Chromium here.")
def test_a_browser_shows_the_blocks_of_a_token(tmp_path):
    _, _, view = watched()
    page = tmp_path / "view.html"
    page.write_text(render(view), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"{page.as_uri()}#t3"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    marked = {int(m[1]): int(m[2]) for m in re.finditer(r'id="b(\d+)"[^>]*data-readers="(\d+)"', done.stdout)}
    assert marked == view.tokens[3].blocks
    assert "of 15 blocks" in done.stdout


def test_the_command_writes_the_page(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    tiny.plan().save(tmp_path / "plan.json")
    words = [
        "generate",
        "x" * 200,
        "--model",
        str(tmp_path / "model"),
        "--plan",
        str(tmp_path / "plan.json"),
        "-n",
        "4",
    ]
    words += ["--budget-tokens", "96", "--block-size", "8", "--ignore-eos", "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "view.html")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert 'id="t3"' in (tmp_path / "view.html").read_text(encoding="utf-8")
