"""MMBench in English."""

from ._mmbench import MMBenchTask


class MMBench(MMBenchTask):
    """dev has labels, test is scored by MMBench's server."""

    name = "mmbench"
    title = "MMBench"
    folder_name = "mmbench"
    language = "en"
    tables = {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"}
    splits = ("dev", "dev_all_rounds", "test", "test_all_rounds")
    hidden_label_splits = ("test", "test_all_rounds")


TASK = MMBench()
