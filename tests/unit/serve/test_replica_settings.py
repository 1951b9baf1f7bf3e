"""--replicas and its flags: what is refused, and what the rest becomes."""

import inspect
import sys
from types import SimpleNamespace

import pytest

from llava_saep.errors import UserError
from llava_saep.generation import EngineSettings, LocalEngine, Predictor
from llava_saep.program import AbbreviatingParser
from llava_saep.serve import deployment
from llava_saep.serve.deployment import _deployment_options, _environment, _import_ray, _replica_resources
from llava_saep.serve.replica_settings import ReplicaSettings, add_replica_flags, replica_settings_from


def settings_from(*flags, max_queue=16):
    parser = AbbreviatingParser(prog="test")
    add_replica_flags(parser)
    return replica_settings_from(parser.parse_args(flags), max_queue=max_queue)


def test_without_flags_there_are_no_replicas():
    assert settings_from() is None


def test_flags_of_replicas_need_their_number():
    with pytest.raises(UserError, match="--max-replicas is for several replicas; add --replicas N"):
        settings_from("--max-replicas", "3")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--replicas", "0"], "--replicas must be at least 1, got 0"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas must be at least 3, got 2"),
        (["--replicas", "1", "--max-ongoing-requests", "0"], "--max-ongoing-requests must be at least 1"),
        (["--replicas", "1", "--num-gpus-per-replica", "nan"], "--num-gpus-per-replica must be at least 0, got nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(flags, expected):
    with pytest.raises(UserError, match=expected):
        settings_from(*flags)


def test_as_many_questions_wait_as_the_front_end_lets_in():
    settings = settings_from("--replicas", "2", "--max-replicas", "3", max_queue=5)
    assert settings.max_queued_requests == 5 + 3
    options = _deployment_options(settings)
    assert options["autoscaling_config"]["min_replicas"] == 2
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert "num_replicas" not in options
    assert _deployment_options(ReplicaSettings(replicas=2))["num_replicas"] == 2


def test_every_replica_gets_a_gpu_where_there_are_any_and_none_is_promised_twice():
    settings = ReplicaSettings(replicas=2)
    assert _replica_resources({"CPU": 2.0}, settings, 1, None)["num_gpus"] == 0
    cluster = {"CPU": 8.0, "GPU": 2.0}
    assert _replica_resources(cluster, settings, 1, None)["num_gpus"] == 1
    assert _replica_resources(cluster, settings, 1, "cpu")["num_gpus"] == 0
    with pytest.raises(UserError, match="4 replicas with 1 GPUs each need 4, Ray has 2"):
        _replica_resources(cluster, settings, 2, None)
    half = ReplicaSettings(replicas=2, num_gpus_per_replica=0.5)
    assert _replica_resources(cluster, half, 2, None)["num_gpus"] == 0.5


def test_own_ray_reports_to_nobody_and_is_this_programs_alone():
    environment = _environment({})
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_AUTH_TOKEN"] != _environment({})["RAY_AUTH_TOKEN"]
    assert _environment({"RAY_ADDRESS": "head:6379"}) == {"RAY_USAGE_STATS_ENABLED": "0"}
    assert "RAY_AUTH_TOKEN" not in _environment({"RAY_AUTH_MODE": "disabled"})


def test_missing_ray_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[serve\]"'):
        _import_ray()


def test_replicas_load_the_model_with_the_programs_own_arguments(monkeypatch):
    bound = []
    application = SimpleNamespace(bind=lambda *arguments: bound.append(arguments))
    handle = SimpleNamespace(describe=SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda: "description")))
    serve = SimpleNamespace(
        start=lambda **kwargs: None,
        deployment=lambda *args, **kwargs: application,
        run=lambda *args, **kwargs: handle,
        delete=lambda name: bound.append(name),
        shutdown=lambda: None,
    )
    ray = SimpleNamespace(
        init=lambda **kwargs: None, cluster_resources=lambda: {"CPU": 2.0}, serve=serve, shutdown=lambda: None
    )
    monkeypatch.setattr(deployment, "_import_ray", lambda: ray)
    monkeypatch.setitem(sys.modules, "llava_saep.serve.replica", SimpleNamespace(ModelReplica=None))
    arguments = {"device": "cpu", "settings": EngineSettings(), "template": None}
    with deployment.deployed({"model": "folder"}, ReplicaSettings(replicas=2), **arguments) as engines:
        assert engines["model"].description == "description"
    assert bound == [("folder", "model", arguments, 4), "llava-saep-model"], "and they end afterwards"
    assert set(arguments) <= accepted_by(LocalEngine.from_pretrained) | accepted_by(Predictor.from_pretrained)


def accepted_by(function):
    return set(inspect.signature(function).parameters)
