"""Flags of samples, which workers set while ranks compare them."""

import torch

from llava_saep.data.ledger import SampleLedger
from llava_saep.data.records import UNREADABLE_IMAGE


def test_flags_of_other_ranks_do_not_undo_what_a_worker_noted_meanwhile():
    ledger, other = SampleLedger(4), SampleLedger(4)
    other.note_bad(0, UNREADABLE_IMAGE)
    snapshot = torch.maximum(ledger.flags, other.flags)
    ledger.note_bad(2, UNREADABLE_IMAGE)
    ledger.note_cut(3)
    ledger.take_over(snapshot)
    assert ledger.bad_indices() == {UNREADABLE_IMAGE: [0, 2]}
    assert ledger.cut_indices() == [3]
