"""Small data sets in the formats that are published."""

import json
import pickle

import pytest

SUBJECTS = ("river", "castle", "engine", "garden", "island", "market")


def _dump(path, value):
    path.write_text("\n".join(map(json.dumps, value)) if path.suffix == ".jsonl" else json.dumps(value))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder with SQuAD, HotpotQA, three sets of LongBench, AIME and OlympiadBench, a few records each."""
    folder = tmp_path_factory.mktemp("data")
    squad = [
        {
            "title": subject,
            "paragraphs": [
                {
                    "context": f"The {subject} number {i} was named after Queen {subject.title()} {i}. " * 6,
                    "qas": [
                        {
                            "question": f"After whom was {subject} number {i} named?",
                            "answers": [{"text": f"Queen {subject.title()} {i}"}, {"text": f"{subject.title()} {i}"}],
                            "is_impossible": False,
                        },
                        {"question": "Who knows?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(3)
            ],
        }
        for subject in SUBJECTS
    ]
    _dump(folder / "squad.json", {"version": "v2.0", "data": squad})
    hotpot = [
        {
            "question": f"Which {subject} is older?",
            "answer": f"the {subject} of stone",
            "context": [
                [f"{subject.title()} {i}", [f"This is the {subject} of stone. ", "It is old. " * 9]] for i in range(4)
            ],
        }
        for subject in SUBJECTS
    ]
    _dump(folder / "hotpotqa.json", hotpot)
    for subset in ("hotpotqa", "trec", "lcc"):
        records = [
            {
                "input": f"What is {subject}?",
                "context": f"A {subject} is a thing. " * 4,
                "answers": [f"a {subject}"],
                "all_classes": [f"a {each}" for each in SUBJECTS] if subset == "trec" else None,
            }
            for subject in SUBJECTS
        ]
        _dump(folder / f"{subset}.jsonl", records)
    _dump(folder / "aime24.jsonl", [{"problem": f"What is {i} + 1?", "answer": f"{i + 1:03}"} for i in range(3)])
    problem = {"question": "Solve.", "final_answer": ["$1$", "2"], "error": "0.1"}
    _dump(folder / "olympiadbench.json", [problem])
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without a network, which need not be waited for."""

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)


@pytest.fixture
def no_hashing(monkeypatch):
    """Packages in a folder that is not called site-packages: `datasets` cannot hash a table there."""

    def refuse(*_):
        raise pickle.PicklingError("Can't pickle <class 'MonthDayNano'>: it's not found as builtins.MonthDayNano")

    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", refuse)
