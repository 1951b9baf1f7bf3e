"""MMBench in Chinese."""

from ._mmbench import MMBenchTask


class MMBenchCN(MMBenchTask):
    """dev has labels, test is scored by MMBench's server."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    folder_name = "mmbench_cn"
    language = "cn"
    tables = {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"}
    splits = ("dev", "dev_all_rounds", "test", "test_all_rounds")
    hidden_label_splits = ("test", "test_all_rounds")


TASK = MMBenchCN()
