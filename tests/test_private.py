"""What we take from private parts of other libraries is there; where it is not, the message names the version."""

from importlib import import_module
from importlib.metadata import version

import pytest

from lycheedecode.fusion import patterns
from lycheedecode.integrations import lm_eval_private
from lycheedecode.models import versions
from lycheedecode.ops import torch_private

MATCHER = tuple(
    f"torch._inductor.pattern_matcher.{name}" for name in ("CallFunction", "CallMethod", "MULTIPLE", "Match")
)


@pytest.mark.parametrize(
    ("package", "home", "path"),
    [
        *(("torch", torch_private, path) for path in torch_private.TAKEN),
        *(("torch", patterns, path) for path in MATCHER),
        *(("transformers", versions, path) for path in versions.TAKEN),
        *(("lm_eval", lm_eval_private, path) for path in lm_eval_private.TAKEN),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_is_taken_is_there(package, home, path):
    pytest.importorskip(package, reason=f"{package} is not installed.")
    assert resolve(path), f"{package} {version(package)} has no {path}, which {home.__name__} takes."


def resolve(path):
    """Whether a dotted path leads to something; as much of it as can be is imported."""
    words = path.split(".")
    for end in range(len(words) - 1, 0, -1):
        try:
            found = import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


def test_a_missing_name_is_noticed():
    assert not resolve("torch.ops.aten._no_such_operation")
    assert not resolve("lm_eval_of_another_name.tasks")
