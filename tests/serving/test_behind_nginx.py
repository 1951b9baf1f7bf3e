"""The configuration of docs/serving.md in a real nginx: TLS, pieces as they come, a page under a path."""

import os
import shutil
import ssl
import subprocess
import time
from types import SimpleNamespace

import httpx
import pytest

from llava_saep.generation import GenerationOptions
from llava_saep.serve.remote import Endpoint, remote_engines
from tests.browser.demo_page import DemoPage
from tests.fixtures.programs import ROOT, free_port, running, wait_for_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None or shutil.which("openssl") is None, reason="needs nginx and openssl"),
]

KEY = "a-key-of-the-tests-alone"
PASSWORD = "a password"
QUESTION = [{"role": "user", "content": "What is shown?"}]
MAIN = """daemon off; worker_processes 1; pid {folder}/pid; error_log stderr; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}"""


def site(folder, ports):
    """The configuration that people copy, with this test's ports and certificate."""
    text = (ROOT / "playground/serving/nginx.conf").read_text()
    certificates = "/etc/letsencrypt/live/llava.example.org"
    for old, new in {
        "listen 443 ssl;": f"listen 127.0.0.1:{ports.https} ssl;",
        "listen 80;": f"listen 127.0.0.1:{ports.http};",
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{ports.api};",
        "server 127.0.0.1:7860;": f"server 127.0.0.1:{ports.demo};",
        f"{certificates}/fullchain.pem": f"{folder}/certificate.pem",
        f"{certificates}/privkey.pem": f"{folder}/key.pem",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def ports():
    return SimpleNamespace(https=free_port(), http=free_port(), api=free_port(), demo=free_port())


@pytest.fixture(scope="module")
def nginx(tmp_path_factory, ports):
    """nginx on ports of its own; yields its folder, in which the certificate is."""
    folder = tmp_path_factory.mktemp("nginx")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    names = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    (folder / "site.conf").write_text(site(folder, ports))
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers could not write into this folder
    (folder / "main.conf").write_text(MAIN.format(folder=folder, user=user))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "main.conf"], stdout=log, stderr=log)
    try:
        wait_for_port(ports.https, process)
        yield folder
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def api(nginx, ports, model_folder, tmp_path_factory):
    """The HTTP interface behind nginx; yields its address there."""
    log = tmp_path_factory.mktemp("api") / "log"
    flags = ["--port", ports.api, "--device", "cpu", "--trusted-proxies", "127.0.0.1", "--max-requests-per-minute", 30]
    environment = {"LLAVA_SAEP_API_KEY": KEY}
    with running("serve", "--model-path", model_folder, *flags, log=log, environment=environment) as program:
        program.wait_for("Serving at", seconds=120)
        wait_for_port(ports.api, program.process)
        yield f"https://localhost:{ports.https}"


@pytest.fixture
def client(nginx):
    with httpx.Client(verify=ssl.create_default_context(cafile=nginx / "certificate.pem"), timeout=30) as client:
        yield client


def test_answers_arrive_piece_by_piece_through_tls(api, nginx, local_engine, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx / "certificate.pem"))
    engine = remote_engines(Endpoint(url=api, api_key=KEY))["model"]
    options = GenerationOptions(max_new_tokens=400)
    pieces, times, started = [], [], time.monotonic()
    for piece in engine.stream(QUESTION, options):
        pieces.append(piece)
        times.append(time.monotonic() - started)
    engine.close()
    assert pieces == list(local_engine.stream(QUESTION, options))
    assert times[0] < times[-1] / 2, "the pieces came together"


def test_certificate_that_nobody_vouches_for_is_refused(api, monkeypatch):
    from llava_saep.errors import UserError

    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(UserError, match="certificate cannot be verified"):
        remote_engines(Endpoint(url=api, api_key=KEY))


def test_key_and_body_limits_hold_and_numbers_stay_inside(api, client, ports):
    assert client.get(f"{api}/v1/models").status_code == 401
    assert client.get(f"{api}/health").status_code == 200
    headers = {"authorization": f"Bearer {KEY}"}
    assert client.get(f"{api}/metrics", headers=headers).status_code == 403
    photo = {"model": "model", "messages": QUESTION, "max_tokens": 1, "user": "x" * 5_000_000}
    assert client.post(f"{api}/v1/chat/completions", json=photo, headers=headers).status_code == 200
    refused = client.post(f"{api}/v1/chat/completions", content=b"x" * 70_000_000, headers=headers)
    assert refused.status_code == 413
    plain = httpx.get(f"http://127.0.0.1:{ports.http}/v1/models")
    assert (plain.status_code, plain.headers["location"]) == (301, "https://llava.example.org/v1/models")


def test_clients_are_told_apart_by_their_address_and_cannot_name_another(api, client):
    statuses = []
    for number in range(40):
        headers = {"x-forwarded-for": f"192.0.2.{number}", "authorization": "Bearer wrong"}
        statuses.append(client.get(f"{api}/v1/models", headers=headers).status_code)
    assert statuses.count(429) >= 9, "each forged address was another client"
    assert set(statuses) == {401, 429}


@pytest.fixture(scope="module")
def demo(nginx, ports, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    accounts = folder / "accounts"
    accounts.write_text(f"ann:{PASSWORD}\n")
    accounts.chmod(0o600)
    flags = ["--port", ports.demo, "--device", "cpu", "--auth-file", accounts, "--root-path", "/demo"]
    with running("demo", "--model-path", model_folder, *flags, log=folder / "log") as program:
        program.wait_for("The page is at", seconds=120)
        yield f"https://localhost:{ports.https}/demo"


def test_page_under_a_path_asks_who_is_there_and_names_its_own_addresses(demo, client):
    assert client.get(demo).headers["location"].endswith("/demo/")
    assert client.get(f"{demo}/config").status_code == 401
    login = client.post(f"{demo}/login", data={"username": "ann", "password": PASSWORD})
    assert login.status_code == 200
    assert client.get(f"{demo}/config").json()["root"] == demo


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_browser_shows_the_page_under_its_path(demo):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
    failed = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.set_default_timeout(30_000)
        page.goto(f"{demo}/")
        page.locator("input").first.fill("ann")
        page.locator("input[type=password]").fill(PASSWORD)
        failed.clear()
        page.get_by_role("button", name="Login").click()
        demo_page = DemoPage(page)
        try:
            demo_page.wait_until_ready()
            demo_page.ask("Say hello.")
            demo_page.wait_for_answers(1)
        finally:
            assert not failed
            browser.close()
