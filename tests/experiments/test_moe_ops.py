"""Routing and sums for a vLLM without its kernels for experts."""

import torch

from experiments import moe_ops


def test_entries_are_sorted_by_expert_in_whole_blocks():
    ids = torch.tensor([[2, 0], [2, 5], [0, 2], [2, 5], [2, 0]], dtype=torch.int32)
    sorted_ids, experts, padded = (torch.full((size,), -7, dtype=torch.int32) for size in (40, 10, 1))
    assert set(moe_ops.install("lychee_test_moe")) == {"topk_softmax", "moe_align_block_size", "moe_sum"}
    torch.ops.lychee_test_moe.moe_align_block_size(ids, 8, 4, sorted_ids, experts, padded, None)
    assert int(padded) == 16
    blocks = sorted_ids.view(-1, 4)[:4].tolist()
    assert blocks == [[1, 4, 9, 10], [0, 2, 5, 6], [8, 10, 10, 10], [3, 7, 10, 10]]
    assert experts[:4].tolist() == [0, 2, 2, 5]
    assert moe_ops.install("lychee_test_moe") == []


def test_tokens_get_their_most_probable_experts():
    logits = torch.randn(6, 9)
    weights, ids = torch.empty(6, 3), torch.empty(6, 3, dtype=torch.int32)
    moe_ops.topk_softmax(weights, ids, ids, logits, True, None)
    for row, chosen, weight in zip(logits, ids, weights, strict=True):
        assert set(chosen.tolist()) == set(row.argsort(descending=True)[:3].tolist())
        torch.testing.assert_close(weight, row[chosen.long()].softmax(0))
    given, out = torch.randn(6, 3, 5), torch.empty(6, 5)
    moe_ops.moe_sum(given, out)
    torch.testing.assert_close(out, given.sum(1))
