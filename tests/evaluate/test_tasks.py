"""evaluate tasks, from the command line to the record, through the real harness."""

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from lycheedecode import Engine, HeadPlan, HybridConfig
from lycheedecode.cli import app
from lycheedecode.cli import tasks as command
from lycheedecode.evaluate.tasks import TaskOptions, catalogue, evaluate_tasks
from lycheedecode.evaluate.tasks.summary import averages
from lycheedecode.integrations.lm_eval import LycheeLM

SHAPE = ("--block-size", "16", "--sink-tokens", "4", "--recent-tokens", "8")
runner = CliRunner()


@pytest.fixture(scope="module")
def llama():
    return tiny.model(max_position_embeddings=1536)


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    llama.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    tiny.plan().save(folder / "plan.json")
    model = ["--model", str(folder), "--plan", str(folder / "plan.json"), "--device", "cpu", "--dtype", "float32"]
    return ["evaluate", "tasks", *model, "--limit", "2", "--max-new-tokens", "6", "--batch-size", "2"]


@pytest.fixture
def engines(llama, byte_tokenizer):
    config = HybridConfig(budget_tokens=64, block_size=16, sink_tokens=4, recent_tokens=8)
    return {
        "full": Engine(llama, byte_tokenizer),
        "hybrid": Engine(llama, byte_tokenizer, plan=tiny.plan(), config=config),
    }


def run(*arguments):
    done = runner.invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def refusal(*arguments) -> str:
    """The one line of a call that must fail as bad input."""
    done = runner.invoke(app, list(arguments))
    assert done.exit_code == 2, (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Loading", "Reading"))]
    assert len(lines) == 1, lines
    assert done.stdout == ""
    return lines[0].removeprefix("lycheedecode: ")


def records(path):
    first, *lines = map(json.loads, path.read_text().splitlines())
    assert set(first) == {"settings"}
    return lines


def test_help():
    assert "--policies" in run("evaluate", "tasks", "--help").stdout


# ---------------------------------------------------------------------- scores


def test_a_budget_that_covers_the_context_scores_what_full_attention_does(base, tmp_path):
    out = tmp_path / "result.json"
    command = [*base, "--tasks", "niah_single_1,vt", "--lengths", "1280,1024", "--budgets", "2048,64", *SHAPE, "--json"]
    printed = run(*command, str(out)).stdout
    report = json.loads(out.read_text())
    cells = report["result"]["tasks"]
    assert [(cell["task"], cell["length"]) for cell in cells] == [
        ("niah_single_1", 1280), ("vt", 1280), ("niah_single_1", 1024), ("vt", 1024)
    ]  # fmt: skip
    for cell in cells:
        full, roomy, tight = cell["scores"].values()
        assert list(cell["scores"]) == ["full", "hybrid, 2048 tokens", "hybrid, 64 tokens"]
        assert full["metrics"] == roomy["metrics"]
        assert full["items"] == 2
        assert roomy["difference"]["value"] == 0
        assert tight["kv_bytes_per_token"] < 0.6 * full["kv_bytes_per_token"] < roomy["kv_bytes_per_token"]
        assert full["tokens_per_answer"] == full["cut_off"] * 3 == 6  # random models do not stop
        room = 128 if cell["task"] == "niah_single_1" else 30
        assert cell["length"] - room - 40 < full["prompt_tokens"] <= cell["length"] - room
    lines = records(tmp_path / "result.items.jsonl")
    assert len(lines) == 2 * 4 * 3
    texts = {}
    for line in lines:
        texts.setdefault(line["policy"], {})[line["request"]] = line["text"]
        assert {"task", "length", "document", "prompt_hash", "prompt_tokens", "tokens", "score recall"} <= set(line)
    assert texts["full"] == texts["hybrid, 2048 tokens"] != texts["hybrid, 64 tokens"]
    assert report["settings"]["tasks"] == ["niah_single_1", "vt"]
    assert set(report["result"]["averages"]) == {
        "ruler, 1280 tokens, 2 of 13 tasks",
        "ruler, 1024 tokens, 2 of 13 tasks",
    }
    rows = report["result"]["rows"]
    assert len(rows) == 4 * 3
    assert (
        rows[1] | {"task": "niah_single_1", "length": 1280, "policy": "hybrid, 2048 tokens", "metric": "recall"}
        == rows[1]
    )
    assert rows[1]["difference_value"] == 0
    assert "difference_value" not in rows[0]
    assert "vt, 1024 tokens" in printed
    assert "mean of ruler, 1280 tokens" in printed


def test_a_run_that_is_cut_off_keeps_rows_of_the_tasks_that_it_finished(base, tmp_path, monkeypatch):
    complete, saved = command._complete, []

    def once(*arguments):
        if saved:
            raise KeyboardInterrupt
        saved.append(True)
        return complete(*arguments)

    monkeypatch.setattr(command, "_complete", once)
    out = tmp_path / "result.json"
    done = runner.invoke(app, [*base, "--tasks", "niah_single_1,vt", "--lengths", "1024", *SHAPE, "--json", str(out)])
    assert done.exit_code == 130
    result = json.loads(out.read_text())["result"]
    assert [(row["task"], row["policy"]) for row in result["rows"]] == [
        ("niah_single_1", "full"), ("niah_single_1", "hybrid")
    ]  # fmt: skip
    assert len(result["tasks"]) == 1


def test_a_right_answer_scores(engines, monkeypatch):
    """Whatever the model says, the score is about what was asked."""

    def knows(self, keys, prompts, *_):
        from lycheedecode.integrations.lm_eval import Answer

        for key in keys:
            for name in self.engines:
                doc = documents[key]
                self.answers[name, key] = Answer(1, text=doc["answers"][0] if name == "full" else "?")

    documents = {}
    unanswered = LycheeLM._unanswered

    def remember(self, keys):
        documents.update({key: request.doc for key, request in keys.items()})
        return unanswered(self, keys)

    monkeypatch.setattr(LycheeLM, "_generate", knows)
    monkeypatch.setattr(LycheeLM, "_unanswered", remember)
    options = TaskOptions(lengths=(1024,), limit=8)
    for cell in evaluate_tasks(engines, ["niah_single_2", "niah_multivalue"], options):
        full, hybrid = cell["scores"].values()
        asked = 4 if cell["task"] == "niah_multivalue" else 1
        assert full["metrics"]["recall"]["value"] == 1 / asked
        assert hybrid["metrics"]["recall"]["value"] == 0
        assert hybrid["difference"]["high"] == -1 / asked
        assert cell["task"] != "niah_single_2" or full["metrics"]["recall"]["low"] == pytest.approx(0.6756, abs=1e-3)


def test_policies_with_equal_bytes(base, tmp_path):
    out = tmp_path / "result.json"
    policies = ["--policy", "hybrid,streaming,kascade,paper", "--budget-tokens", "64", "--match-bytes", "900", *SHAPE]
    policies += ["--execution", "graph"]  # off a GPU the same steps without a graph
    run(*base, "--tasks", "niah_single_2", "--lengths", "1024", *policies, "--json", str(out))
    result = json.loads(out.read_text())["result"]
    read = {row["policy"]: row["kv_bytes_per_token"] for row in result["rows"]}
    assert read["streaming"] == pytest.approx(read["hybrid"], rel=0.1)
    assert read["streaming"] < read["full"]
    assert set(read) | set(result["left_out"]) == {"full", "hybrid", "streaming", "kascade", "paper"}
    assert "paper" in result["left_out"]


def test_sets_from_a_folder(base, data_folder, no_hashing, tmp_path):
    out = tmp_path / "result.json"
    names = "longbench_hotpotqa,longbench_trec,longbench_lcc,aime24,olympiadbench,qa_1,qa_2"
    run(
        *base,
        "--tasks",
        names,
        "--lengths",
        "1400",
        "--data",
        str(data_folder),
        "--samples",
        "3",
        *SHAPE,
        "--json",
        str(out),
    )
    cells = {cell["task"]: cell["scores"]["hybrid"] for cell in json.loads(out.read_text())["result"]["tasks"]}
    assert {name: list(entry["metrics"]) for name, entry in cells.items()} == {
        "qa_1": ["recall"],
        "qa_2": ["recall"],
        "longbench_hotpotqa": ["f1"],
        "longbench_trec": ["classified"],
        "longbench_lcc": ["edit_similarity"],
        "aime24": ["accuracy", "majority"],
        "olympiadbench": ["accuracy", "majority"],
    }
    lines = records(tmp_path / "result.items.jsonl")
    solutions = [line for line in lines if line["task"] == "aime24" and line["policy"] == "full"]
    numbers = sorted((line["document"], line["number"]) for line in solutions)
    assert numbers == [(i, j) for i in range(2) for j in range(3)]
    assert len({line["text"] for line in solutions}) == 6  # each is drawn anew
    assert cells["aime24"]["items"] == 2


def test_chat_templates_where_a_task_is_made_for_it(engines, data_folder, monkeypatch):
    seen = []
    generate = LycheeLM.generate_until

    def spy(self, requests):
        seen.append((requests[0].task_name, requests[0].args[0]))
        assert self.templated == requests[0].args[0].startswith("<user>")
        return generate(self, requests)

    monkeypatch.setattr(LycheeLM, "generate_until", spy)
    names = ["longbench_hotpotqa", "longbench_trec", "vt"]
    for chat in (None, False):
        evaluate_tasks(
            engines, names, TaskOptions(lengths=(1024,), limit=1, data=data_folder, max_new_tokens=2, chat=chat)
        )
    first = dict(seen[:6])
    assert {name: text.startswith("<user>") for name, text in first.items()} == {
        "vt": True, "longbench_hotpotqa": True, "longbench_trec": False
    }  # fmt: skip
    assert first["vt"].endswith(" are")
    assert first["longbench_trec"].endswith("\nWhat is river?")
    assert not any(text.startswith("<user>") for _, text in seen[6:])


# ---------------------------------------------------------------------- what is left out, and what is not done twice


def test_a_context_beyond_the_positions_is_skipped_with_a_reason(base, tmp_path):
    out = tmp_path / "result.json"
    done = run(*base, "--tasks", "niah_single_1", "--lengths", "1024,2048", "--json", str(out))
    cells = json.loads(out.read_text())["result"]["tasks"]
    assert cells[1]["skipped"] == "2048 tokens are more than the model's 1536 positions"
    assert "scores" not in cells[1]
    assert "2048 tokens: skipped" in done.stderr


def test_a_prompt_that_does_not_fit_does_not_count(engines, data_folder, tmp_path):
    rows = [json.loads(line) for line in (data_folder / "hotpotqa.jsonl").read_text().splitlines()]
    rows[1]["context"] = "long " * 400
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = TaskOptions(data=tmp_path, max_new_tokens=4, batch_size=3)
    [cell] = evaluate_tasks(engines, ["longbench_hotpotqa"], options)
    entry = cell["scores"]["hybrid"]
    assert entry["items"] == 5
    [left_out] = entry["skipped"]
    assert left_out["document"] == 1
    assert "the model has 1536 positions" in left_out["reason"]
    [cell] = evaluate_tasks(engines, ["aime24"], TaskOptions(data=data_folder))  # it asks for 32768 tokens
    assert cell["scores"]["full"]["metrics"] == {}
    assert len(cell["scores"]["full"]["skipped"]) == 3
    assert averages([cell]) == {}


def test_an_interrupted_run_goes_on(base, tmp_path, monkeypatch):
    out, record = tmp_path / "result.json", tmp_path / "result.items.jsonl"
    command = [*base, "--tasks", "niah_single_1,vt", "--lengths", "1024", "--json", str(out)]
    generate, left, decoded = LycheeLM._generate, [1], []

    def interrupted(self, keys, *rest):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        generate(self, keys, *rest)

    def counted(self, keys, *rest):
        decoded.extend(keys)
        generate(self, keys, *rest)

    monkeypatch.setattr(LycheeLM, "_generate", interrupted)
    begun = runner.invoke(app, [*command, "--resume"])
    assert begun.exit_code == 130
    assert f"There is nothing to resume in {record}: this call begins anew." in begun.stderr
    assert len(records(record)) == 4
    monkeypatch.setattr(LycheeLM, "_generate", counted)
    assert "nothing to resume" not in run(*command, "--resume").stderr
    assert len(decoded) == 2
    finished = json.loads(out.read_text())["result"]
    assert len(records(record)) == 8
    run(*command, "--resume")
    assert len(decoded) == 2
    assert json.loads(out.read_text())["result"] == finished
    run(*command, "--resume", "--policy", "streaming,hybrid", "--limit", "1")
    assert len(decoded) == 4  # one prompt of each task, for the new policy
    assert "had another --seed (0, not 1)" in refusal(*command, "--resume", "--seed", "1")
    assert "had no --budget-tokens" in refusal(*command, "--resume", "--budget-tokens", "128")
    run(*command)
    assert len(decoded) == 8
    out.unlink()  # the record alone has the answers, and knows whose plan they are from
    other = tmp_path / "other.json"
    HeadPlan.all_retrieval(tiny.LAYERS, tiny.KV_HEADS).save(other)
    assert "made with another policy" in refusal(*command, "--resume", "--plan", str(other))


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def small_harness(monkeypatch):
    """One folder of the harness's tasks: reading all of them takes seconds."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "hellaswag"  # alone under the tag multiple_choice
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(catalogue, "_harness_tasks", lambda: manager)
    catalogue._harness_task.cache_clear()


def test_bad_input_is_one_sentence(base, tmp_path, data_folder, no_hub, small_harness):
    assert "did you mean niah_single_1" in refusal(*base, "--tasks", "niah_singel_1")
    assert "did you mean hybrid" in refusal(*base, "--policy", "hybrit")
    assert "put squad.json and hotpotqa.json into" in refusal(*base, "--tasks", "ruler")
    assert f"put aime24.jsonl into {tmp_path}" in refusal(*base, "--tasks", "aime24", "--data", str(tmp_path))
    assert "put qasper.jsonl into" in refusal(*base, "--tasks", "longbench_qasper", "--data", str(data_folder))
    (tmp_path / "t.items.jsonl").mkdir()
    said = refusal(*base, "--tasks", "vt", "--json", str(tmp_path / "t.json"))
    assert said.startswith(f"The file '{tmp_path}/t.items.jsonl' cannot be written: name one in a folder")
    assert "There is no folder" in refusal(*base, "--data", str(tmp_path / "nothing"))
    assert "There is no text file" in refusal(*base, "--tasks", "vt", "--text", "nothing.txt")
    assert "--lengths must be whole numbers" in refusal(*base, "--lengths", "4k")
    assert "limit must be at least 1" in refusal(*base, "--limit", "0")
    assert "--match-bytes must be a whole number of at least 1" in refusal(*base, "--match-bytes", "0")
    assert "'fast' is not one of" in refusal(*base, "--tasks", "vt", "--execution", "fast")
    assert "not both" in refusal(*base, "--budgets", "64,128", "--budget-tokens", "64")
    assert "--resume needs --json FILE" in refusal(*base, "--tasks", "vt", "--resume")
    assert "did you mean hellaswag" in refusal(*base, "--tasks", "helaswag")
    for name in ("hellaswag", "multiple_choice"):
        assert f"The task {name!r} of the harness cannot be loaded" in refusal(*base, "--tasks", name)


def test_all_that_is_missing_is_said_before_the_weights_are_loaded(
    base, data_folder, no_hub, small_harness, monkeypatch
):
    monkeypatch.setattr(command, "load_model", None)
    said = refusal(*base, "--tasks", "vt,qa_1,hellaswag,gsm8k_many_shot")
    assert "The data of qa_1 and gsm8k_many_shot is neither on this machine" in said
    assert "put squad.json and gsm8k.jsonl into a folder and name it with --data; the task 'hellaswag' of" in said
    assert said.endswith("cannot be loaded: Couldn't reach the hub.")
    some = refusal(*base, "--tasks", "qa_1,longbench_qasper,longbench_lcc,aime24", "--data", str(data_folder))
    assert some.startswith("The data of longbench_qasper is neither")


@pytest.mark.parametrize("error", [ValueError("Couldn't find cache for it"), RuntimeError("scripts are not supported")])
def test_what_the_package_datasets_raises_is_one_sentence(base, error, small_harness, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert refusal(*base, "--tasks", "hellaswag").endswith(f"of the harness cannot be loaded: {error}.")


def test_a_length_without_room_is_said_before_other_tasks_run(base, monkeypatch):
    monkeypatch.setattr(LycheeLM, "generate_until", None)
    said = refusal(*base, "--tasks", "niah_single_1,vt", "--lengths", "1024,600")
    assert said.startswith("vt with 600 tokens has no room")


def test_the_harness_may_be_missing(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lycheedecode[eval]'" in refusal(*base)


def test_likelihoods_of_a_task_of_the_harness(engines, small_harness, monkeypatch):
    from datasets import Dataset

    row = {"ctx_b": "then", "activity_label": "Walking", "endings": list("abcd")}
    rows = [{**row, "ctx_a": f"A {who} goes", "label": str(i)} for i, who in enumerate(("man", "dog"))]
    data = {split: Dataset.from_list(rows) for split in ("train", "validation")}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    told = []
    report = lambda *numbers: told.append(numbers)  # noqa: E731
    [cell] = evaluate_tasks(engines, ["hellaswag"], TaskOptions(batch_size=2), report=report)
    full, hybrid = cell["scores"].values()
    assert set(full["metrics"]) == {"acc", "acc_norm"}
    assert full["metrics"] == hybrid["metrics"]  # so short a context lies within the budget
    assert full["items"] == 2
    assert told[-1] == ("hellaswag", 16, 16)


def test_groups():
    assert catalogue.expand(["vt", "ruler"])[0] == "vt"
    assert set(catalogue.expand(["ruler"])) == set(catalogue.RULER)
    assert set(catalogue.RULER) - set(catalogue.expand(["ruler_synthetic"])) == {"qa_1", "qa_2"}
    assert len(catalogue.expand(["longbench", "aime24"])) == 17
