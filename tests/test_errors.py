"""Errors that a user can mend have one root."""

import ast
import re
from pathlib import Path

import pytest

import lycheedecode
from lycheedecode.errors import LycheeError, first_line

ROOT = Path(lycheedecode.__file__).parent
FOREIGN = {"ValueError", "RuntimeError", "Exception", "TypeError", "KeyError", "OSError"}


def test_every_error_of_ours_descends_from_the_root():
    """Those that end in a sentence; what begins with an underscore is caught where it is raised."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name[0] != "_":
                foreign = FOREIGN & {ast.unparse(base) for base in node.bases}
                assert not foreign or node.name == "LycheeError", f"{path}: {node.name}"


def test_sentences_are_errors_that_users_can_mend():
    """Operations and kernels check what they are handed; whoever meets that on the command line has found a bug."""
    inner = ("ops/", "fusion/", "identify/replay.py", "identify/train.py", "engine/cache.py")
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(inner):
            found = re.findall(r'raise ValueError\(\s*f?"[A-Z][^"]*', path.read_text(encoding="utf-8"))
            assert not found, f"{name}: derive it from LycheeError: {found[0]}"


def test_errors_are_value_errors_with_a_status():
    assert issubclass(LycheeError, ValueError)
    assert LycheeError.exit_status == 2
    assert issubclass(lycheedecode.PlanError, LycheeError)


@pytest.mark.parametrize(
    ("message", "line"),
    [("Broken.\nThen more.", "Broken"), ("\n  \n Late\n", "Late"), ("", "OSError"), ("x" * 300, "x" * 200)],
)
def test_the_first_line_of_somebody_elses_message_ends_a_sentence(message, line):
    assert first_line(OSError(message)) == line
