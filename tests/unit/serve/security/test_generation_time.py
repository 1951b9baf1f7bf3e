"""The model works on an answer for a limited time; what it has written by then is kept, and the client is told."""

from starlette.testclient import TestClient

from llava_saep.generation import LocalEngine
from llava_saep.serve.api import ApiSettings, create_app
from llava_saep.serve.limits import Limits
from tests.fixtures.model import write_model
from tests.fixtures.requests import ask, question


def test_an_answer_is_cut_off_after_the_time(tmp_path):
    engine = LocalEngine.from_pretrained(write_model(tmp_path), device="cpu", model_id="scripted")
    settings = ApiSettings(limits=Limits(max_generation_seconds=1))
    object.__setattr__(settings.limits, "max_generation_seconds", 1e-3)  # a flag may say 1 and more
    with TestClient(create_app({"scripted": engine}, settings)) as client:
        answer = ask(client, question(max_tokens=200, temperature=0)).json()
    engine.close()
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["finish_details"]) == ("length", "time_limit")
    assert 1 <= answer["usage"]["completion_tokens"] < 200


def test_the_limit_reaches_every_engine(open_client, engine):
    ask(open_client(ApiSettings(limits=Limits(max_generation_seconds=17))), question())
    assert engine.asked[0][2] == 17
