"""The entry of each rank: a mistake is said once on each machine, by a rank that the launcher has not ended yet."""

import pytest

from llava_saep.train import run, train_mem

MISTAKE = ["--model_name_or_path", "lm", "--learning_rtae", "1"]


@pytest.fixture
def waited(monkeypatch):
    seconds = []
    monkeypatch.setattr(train_mem.time, "sleep", seconds.append)
    monkeypatch.setattr(train_mem.distributed, "configure_logging", lambda: None)
    monkeypatch.setattr(train_mem.distributed, "quieten_libraries", lambda: None)
    return seconds


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks"), [(0, 0, True), (8, 0, True), (1, 1, False), (9, 1, False), (1, None, False)]
)
def test_first_rank_of_each_machine_speaks_while_the_others_wait(rank, local_rank, speaks, waited, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert train_mem.main(MISTAKE) == 2
    assert ("error: " in capsys.readouterr().err) == speaks
    # A rank that ends first has its launcher end the one that is about to speak.
    assert waited == ([] if speaks else [train_mem.GRACE_SECONDS])


def test_rank_that_met_a_mistake_alone_says_so_at_once(waited, monkeypatch, capsys):
    def fail(config):
        raise run.RankError("rank 1: image 001.png is damaged")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(run, "train", fail)
    assert train_mem.main(["--model_name_or_path", "lm", "--data_path", "d", "--output_dir", "o"]) == 2
    assert "error: rank 1: image 001.png" in capsys.readouterr().err
    assert waited == []
