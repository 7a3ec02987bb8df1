"""An answer, and what of the prompt its retrieval heads looked at: one HTML page.

watch     prompt -> AnswerView: tokens, selections, covered mass, what full attention would have said
render    AnswerView -> the page; nothing is fetched, and without scripts it still reads as text
"""

from .page import render
from .watch import AnswerView, TokenView, watch

__all__ = ["AnswerView", "TokenView", "render", "watch"]
