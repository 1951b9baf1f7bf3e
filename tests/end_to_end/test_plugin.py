"""A stranger's package: really installed with pip beside this one, used by name, by class and by file, and removed.

Everything under test runs in child processes of an environment of its own, into which pip installs the example package
without any index: what it declares must be met by what is installed here.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import training_flags

pytestmark = pytest.mark.timeout(240)

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "playground" / "examples" / "my_projector"
RUN_COMMANDS = """
import contextlib, io, json, sys
from llava_saep.cli import main
results = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
LOAD_MODEL = """
import sys
from llava_saep.model.loading import load_model, load_processor
model = load_model(sys.argv[1], trust_projector_code=len(sys.argv) > 2)
load_processor(sys.argv[1], trust_projector_code=len(sys.argv) > 2)
projector = model.model.multi_modal_projector
print(type(projector).__name__, projector.config.factor, float(projector.sharpness.detach()))
"""


class Environment:
    """A virtual environment in which the packages of this one can be imported, and pip installs beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site_packages = Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
        )
        here = sysconfig.get_path("purelib")
        # addsitedir rather than a bare path: it also follows the path files there, such as that of an editable install.
        lines = [f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})", f"import site; site.addsitedir({here!r})"]
        (self.site_packages / "beside.pth").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        # PYTHONPATH is what each call says, or nothing: what is found is found because it is installed.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd or self.folder, env=inherited | environment, capture_output=True, text=True, timeout=200
        )

    def pip(self, *arguments: object) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        done = subprocess.run([*pip, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr

    def install_example(self) -> None:
        copy = self.folder / "source"  # building writes beside the sources
        shutil.copytree(EXAMPLE, copy)
        self.pip("install", "--no-index", "--no-build-isolation", copy)

    def commands(self, *argvs: list[str]) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each `llava-saep` command line, all run by one child."""
        done = self.run("-c", RUN_COMMANDS, json.dumps(argvs))
        assert done.returncode == 0, done.stderr[-4000:]
        return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install_example()
    return environment


def test_installed_package_is_listed_shown_and_conforms_like_a_built_in(installed):
    listing, table, shown, checked = installed.commands(
        ["projectors", "--json"],
        ["projectors"],
        ["projectors", "show", "edge_pool_coarse"],
        ["projectors", "check", "edge_pool"],
    )
    assert [result[0] for result in (listing, table, shown, checked)] == [0, 0, 0, 0]
    rows = {row["name"]: row for row in json.loads(listing[1])["projectors"]}
    assert rows["edge_pool"]["provider"] == "entry-point"
    assert rows["edge_pool"]["num_tokens"] == 144  # 24 x 24 patches in windows of 2 x 2
    assert rows["edge_pool_coarse"]["num_tokens"] == 36  # and of 4 x 4
    assert rows["saep"]["provider"] == "built-in"
    assert "edge_pool" in table[1] and "edge_pool_average" in table[1]
    assert "factor" in shown[1] and "edge_pool" in shown[1]
    assert "0 failed" in checked[1]


def test_package_that_cannot_be_imported_is_named_and_the_list_goes_on(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("broken"))
    info = environment.site_packages / "broken_lab-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-lab\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[llava_saep.projectors]\nlab_pool = broken_lab:LabPool\n")
    (environment.site_packages / "broken_lab.py").write_text("import no_such_library\n")
    listing, table, asked = environment.commands(
        ["projectors", "--json"], ["projectors"], ["projectors", "show", "lab_pool"]
    )
    assert (listing[0], table[0], asked[0]) == (0, 0, 2)
    rows = {row["name"]: row for row in json.loads(listing[1])["projectors"]}
    assert "no_such_library" in rows["lab_pool"]["error"] and "broken-lab 1.2" in rows["lab_pool"]["error"]
    assert rows["saep"]["error"] is None and rows["saep"]["num_tokens"] == 144
    assert "lab_pool" in table[1] and "no_such_library" in table[1]
    assert asked[2].count("\n") == 1 and "broken-lab 1.2" in asked[2]


@pytest.mark.slow
def test_packages_own_tests_pass_on_what_is_installed(installed):
    done = installed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=installed.folder / "source")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# Training with it, once per way of naming it


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("captions"), kind="captions", num_records=4)


def train(environment, bases, captions, output_dir, projector, **environment_variables):
    flags = training_flags(
        bases,
        captions,
        output_dir,
        mm_projector_type=projector,
        version="plain",
        tune_mm_mlp_adapter=True,
        per_device_train_batch_size=2,
        max_steps=2,
        # DeepSpeed broadcasts, flattens and partitions the parameters, which not every shape survives.
        deepspeed=REPOSITORY / "deepspeed_configs" / "zero2.json",
    )
    done = environment.run("-m", "llava_saep.cli", "train", "--num_processes", "1", *flags, **environment_variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((output_dir / "config.json").read_text())["projector"]


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoint_loads_where_the_package_is_installed_and_else_says_what_to_install(bases, captions, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install_example()
    stored = train(environment, bases, captions, tmp_path / "out", "edge_pool_coarse")
    assert (stored["name"], stored["provider"], stored["package"]) == ("edge_pool", "entry-point", "my-projector 0.1.0")
    assert (stored["options"]["factor"], stored["options"]["depth"]) == (4, 3)
    assert stored["options"]["vision_layers"] == [2, 3]  # the middle and the last but one of the tower's 4
    loaded = environment.run("-c", LOAD_MODEL, tmp_path / "out")
    name, factor, sharpness = loaded.stdout.split()
    assert (name, factor) == ("EdgePool", "4") and float(sharpness) != 1.0  # it was trained

    environment.pip("uninstall", "-y", "my-projector")
    refused = environment.run("-m", "llava_saep.cli", "chat", "--model_path", tmp_path / "out")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    for word in ("'edge_pool'", "my-projector 0.1.0", "the way it was installed before", "llava_saep.projectors"):
        assert word in refused.stderr, refused.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("spelling", ["class", "file"])
def test_checkpoint_of_a_named_class_or_file_loads_only_with_consent(spelling, bases, captions, tmp_path):
    environment, source = Environment(tmp_path / "environment"), EXAMPLE / "src"
    by_class = {"PYTHONPATH": str(source)} if spelling == "class" else {}
    place = "my_projector.edge_pool" if spelling == "class" else str(source / "my_projector" / "edge_pool.py")
    stored = train(environment, bases, captions, tmp_path / "out", f"{place}:EdgePool", **by_class)
    assert (stored["name"], stored["provider"]) == ("edge_pool", f"{place}:EdgePool")
    assert "package" not in stored
    refused = environment.run("-c", LOAD_MODEL, tmp_path / "out", **by_class)
    assert refused.returncode != 0 and "trust_projector_code" in refused.stderr
    loaded = environment.run("-c", LOAD_MODEL, tmp_path / "out", "trusted", **by_class)
    assert loaded.stdout.startswith("EdgePool 2 "), loaded.stderr[-2000:]
