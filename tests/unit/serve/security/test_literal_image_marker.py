"""Markers that users type stay text: they show no image, and cost none of its tokens."""

import pytest
from starlette.testclient import TestClient

from llava_saep.generation import LocalEngine
from llava_saep.serve.api import create_app
from tests.fixtures.model import write_model
from tests.fixtures.requests import ask, question


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    engine = LocalEngine.from_pretrained(write_model(tmp_path_factory.mktemp("m")), device="cpu", model_id="scripted")
    with TestClient(create_app({"scripted": engine})) as client:
        yield client
    engine.close()


@pytest.mark.parametrize("marker", ["<image>", "<image>\n", "<image-placeholder>", "<im_start><image><im_end>", "</s>"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_typed_marker_is_no_image(client, marker, num_images):
    images = question()["messages"][0]["content"][:1] * num_images
    urls = [image["image_url"]["url"] for image in images]
    answer = ask(client, question(f"What does {marker} mean? {marker}", images=urls, max_tokens=2)).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 9 * num_images


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_nor_is_one_in_other_messages(client, role):
    fields = question(max_tokens=2)
    other = {"role": role, "content": "see <image>"}
    fields["messages"] = (
        [other, *fields["messages"]] if role == "system" else [*fields["messages"], other, *fields["messages"]]
    )
    answer = ask(client, fields).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == (9 if role == "system" else 18)
