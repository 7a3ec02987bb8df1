"""What a decode step may do instead of following its plan, for comparison: a dataclass each, over the same operations.

    make          name -> what decodes (a `DecodeAttention`) and the settings that `Engine` needs
    match_bytes   name -> the budget at which it reads as many bytes as the plan does

All of them decode after the same dense prefill, keep the whole cache, and attend to sinks and recent tokens as the
config says. Equal budgets are not equal work: what a policy reads to find its tokens counts, too.

>>> from lycheedecode import HybridConfig
>>> from lycheedecode.policies import OwnTopK
>>> OwnTopK(config=HybridConfig(budget_tokens=1024, completion="centroid")).config.completion
'centroid'
"""

from .base import Decoding, PlanPolicy, Policy, PolicyError
from .bytes import STEPS, bytes_at, match_bytes
from .duo import Duo
from .full import Full
from .hybrid import Hybrid
from .kascade import Kascade
from .names import CORRECTION_EVERY, NAMES, POLICIES, check_name, has_blocks, has_budget, make, needs_plan
from .own_topk import OwnTopK
from .paper import Paper
from .quest import Quest
from .random_roles import RandomRoles
from .same_index import SameIndex
from .streaming import Streaming
from .tidaldecode import TidalDecode

__all__ = [
    "CORRECTION_EVERY",
    "NAMES",
    "POLICIES",
    "STEPS",
    "Decoding",
    "Duo",
    "Full",
    "Hybrid",
    "Kascade",
    "OwnTopK",
    "Paper",
    "PlanPolicy",
    "Policy",
    "PolicyError",
    "Quest",
    "RandomRoles",
    "SameIndex",
    "Streaming",
    "TidalDecode",
    "bytes_at",
    "check_name",
    "has_blocks",
    "has_budget",
    "make",
    "match_bytes",
    "needs_plan",
]
