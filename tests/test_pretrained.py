"""Loading pipelines and models by directory and hub name: what is found, what is damaged, what breaks off."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import constants
from tiny_pipelines import tiny_sd3_pipeline
from transformers import CLIPTextModelWithProjection

from optimum_segquant import SegQuantizer
from optimum_segquant.pretrained import load_pretrained

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_sd3_pipeline().save_pretrained(directory)
    return directory


def test_pipelines_and_models_are_told_apart(saved: Path):
    pipeline = load_pretrained(saved, torch_dtype=torch.bfloat16)
    assert type(pipeline) is StableDiffusion3Pipeline
    assert pipeline.text_encoder_3 is None  # saved as empty, and not asked for
    assert pipeline.transformer.dtype == torch.bfloat16
    assert type(load_pretrained(str(saved / "transformer"))) is SD3Transformer2DModel
    encoder = load_pretrained(saved / "text_encoder")
    assert type(encoder) is CLIPTextModelWithProjection
    assert not encoder.training
    assert type(load_pretrained(saved, subfolder="transformer")) is SD3Transformer2DModel
    assert list(SegQuantizer.from_pretrained(saved).components) == ["transformer"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "weights truncated": (
        lambda d: truncate(d / WEIGHTS),
        "can't be loaded: .*a file is missing, damaged or of another",
    ),
    "weights of an encoder truncated": (lambda d: truncate(d / "text_encoder/model.safetensors"), "can't be loaded: "),
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), "can't be loaded: OSError: Error no file named"),
    "config missing": (lambda d: (d / "transformer/config.json").unlink(), "can't be loaded: .*config.json"),
    "folder missing": (lambda d: shutil.rmtree(d / "vae"), r"has no folder vae, which its model_index\.json names"),
    "index damaged": (lambda d: truncate(d / "model_index.json"), r"model_index\.json is no JSON \(.*\): copy or down"),
    "no index": (lambda d: (d / "model_index.json").unlink(), r"holds neither model_index\.json .* nor config\.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_directories(kind: str, saved: Path, tmp_path: Path):
    damage, message = DAMAGE[kind]
    directory = tmp_path / "damaged"
    shutil.copytree(saved, directory)
    damage(directory)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(directory)
    assert str(caught.value).startswith(str(directory))
    assert "\n" not in str(caught.value)


def test_what_is_no_directory(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "./some/where", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=f"there is no directory .* \\(relative to {tmp_path}\\); names on"):
            load_pretrained(name)
    with pytest.raises(ValueError, match=r"model_index\.json is a file: give the directory of a saved pipeline"):
        load_pretrained(saved / "model_index.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(ValueError, match=r"names no model class of the installed diffusers or transformers \(NoSuchM"):
        load_pretrained(tmp_path / "model")


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's HTTP for one public model; ``cut`` breaks off the bodies of some files halfway."""

    directory: ClassVar[Path]
    cut: ClassVar[set[str]] = set()
    served: ClassVar[list[str]] = []
    commit = "0" * 40

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny"):
            names = [
                file.relative_to(self.directory).as_posix() for file in self.directory.rglob("*") if file.is_file()
            ]
            info = {"id": "someone/tiny", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            self._send(json.dumps(info).encode(), body)
            return
        marker = "/someone/tiny/resolve/"
        name = path[len(marker) :].partition("/")[2] if path.startswith(marker) else ""
        if not name or not (self.directory / name).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name else "RepoNotFound")
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (self.directory / name).read_bytes()
        if body:
            self.served.append(name)
        self._send(content, body, cut=name in self.cut)

    def _send(self, content: bytes, body: bool, cut: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def move_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does to a process that starts with it."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.directory, Hub.cut, Hub.served = saved, set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    move_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's own attempts
    yield Hub
    server.shutdown()


def test_a_download_that_breaks_off_goes_on(hub: type[Hub], tmp_path: Path):
    hub.cut = {WEIGHTS}
    with pytest.raises(
        OSError, match="someone/tiny is no local directory and could not be loaded from the hub: "
    ) as caught:
        SegQuantizer.from_pretrained("someone/tiny", cache_dir=tmp_path)
    assert "then start again: files that are complete are kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    complete = [name for name in hub.served if not name.startswith(WEIGHTS)]
    assert "model_index.json" in complete

    hub.cut, hub.served[:] = set(), []
    quantizer = SegQuantizer.from_pretrained("someone/tiny", cache_dir=tmp_path)
    assert type(quantizer.model) is StableDiffusion3Pipeline
    assert hub.served == [WEIGHTS]  # what was complete is not fetched again
    expected = tiny_sd3_pipeline().transformer.state_dict()
    found = quantizer.model.transformer.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    model = load_pretrained("someone/tiny", subfolder="transformer", cache_dir=tmp_path)
    assert type(model) is SD3Transformer2DModel


def test_names_that_the_hub_does_not_know(hub: type[Hub], tmp_path: Path):
    with pytest.raises(
        OSError, match=r"no/such is no local directory .*RepositoryNotFoundError.*check the name"
    ) as caught:
        load_pretrained("no/such", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_network(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load_pretrained("someone/tiny", cache_dir=tmp_path)
    move_hub(monkeypatch, "http://127.0.0.1:9")
    # What is in the cache is used.
    assert type(load_pretrained("someone/tiny", cache_dir=tmp_path)) is StableDiffusion3Pipeline
    with pytest.raises(
        OSError, match=r"someone/other is no local directory and could not be loaded from the hub: .*Conn"
    ):
        load_pretrained("someone/other", cache_dir=tmp_path)
