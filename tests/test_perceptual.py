"""LPIPS, FID and CLIP score with stand-in networks against values computed by hand, and the reasons for skips."""

from __future__ import annotations

import math
import urllib.error
from pathlib import Path

import pytest
import torch
from metric_networks import Features, LogitsOrFeatures, distance, save_networks
from scipy.linalg import sqrtm
from transformers import CLIPModel, CLIPProcessor

from optimum_segquant.evaluation import image_metrics, networks, perceptual_metrics
from optimum_segquant.evaluation.networks import Unavailable, find_weights, load_network

PROMPTS = [
    "a red circle",
    "a blue square above a small green triangle",
    "a large red triangle",
    "a green circle",
    "a square",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(5, 3, 24, 16, generator=generator)
    return (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clamp(0, 1), reference


def test_lpips_of_a_local_network(pair, weights):
    images, reference = pair
    result = perceptual_metrics(images, reference, PROMPTS, metrics=["lpips"], weights=weights)["lpips"]
    with torch.no_grad():  # networks read [-1, 1]
        expected = distance()(2 * images - 1, 2 * reference - 1).reshape(-1)
    assert result.per_image == pytest.approx(expected.tolist(), rel=1e-5)
    assert result.value == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result.value > 1e-3
    assert result.network == "lpips.pt"
    equal = perceptual_metrics(reference, reference, PROMPTS, metrics=["lpips"], weights=weights)["lpips"]
    assert equal.value == 0.0


@pytest.mark.parametrize("kind", ["inception.pt", "inception-2015-12-05.pt", "module", "inception.pt2"])
def test_fid_by_hand(pair, tmp_path, kind):
    images, reference = pair
    source = Features()
    if kind == "inception-2015-12-05.pt":
        source = tmp_path / kind
        torch.jit.script(LogitsOrFeatures()).save(str(source))
    elif kind == "inception.pt":
        source = tmp_path / kind
        torch.jit.script(Features()).save(str(source))
    elif kind == "inception.pt2":
        source = tmp_path / kind
        batch = {"images": {0: torch.export.Dim.DYNAMIC}}
        torch.export.save(
            torch.export.export(Features(), (torch.zeros(2, 3, 24, 16, dtype=torch.uint8),), dynamic_shapes=batch),
            source,
        )
    result = perceptual_metrics(images, reference, PROMPTS, metrics=["fid"], weights={"fid": source})["fid"]

    a, b = (Features()((t * 255).round().to(torch.uint8)).double() for t in (images, reference))
    product = sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * product.trace()
    assert result.value == pytest.approx(float(expected), rel=1e-4, abs=1e-8)
    assert result.value > 1e-5
    assert "5 images" in result.note
    assert "too small" not in result.note


def test_clip_score_by_hand(pair, weights):
    images, reference = pair
    result = perceptual_metrics(images, reference, PROMPTS, metrics=["clip_score"], weights=weights)["clip_score"]
    model, processor = CLIPModel.from_pretrained(weights / "clip"), CLIPProcessor.from_pretrained(weights / "clip")
    for part, found in ((images, result.per_image), (reference, result.reference_per_image)):
        batch = processor(
            text=PROMPTS, images=list((part * 255).round().byte()), return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            output = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
        cosines = 100 * (output.image_embeds * output.text_embeds).sum(-1)
        assert found == pytest.approx(cosines.clamp(min=0).tolist(), abs=1e-3)
    assert result.value == pytest.approx(sum(result.per_image) / 5)
    assert result.reference == pytest.approx(sum(result.reference_per_image) / 5)
    assert result.value != result.reference


def test_all_metrics_in_order(pair, weights):
    images, reference = pair
    results = perceptual_metrics(images, reference, PROMPTS, weights=weights)
    assert list(results) == ["psnr", "ssim", "lpips", "fid", "clip_score"]
    assert results["psnr"].value == image_metrics(images, reference).psnr
    assert results["ssim"].per_image == image_metrics(images, reference).ssim_per_image
    assert all(not result.skipped and math.isfinite(result.value) for result in results.values())
    assert set(results["psnr"].to_dict()) == {"value", "per_image"}
    assert results["lpips"].to_dict()["network"] == "lpips.pt"


def test_what_is_not_installed_is_skipped_with_the_remedy(pair, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    results = perceptual_metrics(*pair, PROMPTS, metrics=["psnr", "lpips", "fid"])
    assert results["psnr"].value > 10
    for name, package, file in (
        ("lpips", "torchvision", "lpips.pt"),
        ("fid", "torch-fidelity", "inception.pt"),
    ):
        result = results[name]
        assert result.value is None
        assert result.per_image == ()
        assert result.skipped.startswith(f"{package} is not installed: pip install 'optimum-segquant[perceptual]'")
        assert f"put {file} or" in result.skipped
        assert result.to_dict() == {"skipped": result.skipped}


def test_a_hub_that_does_not_answer_is_skipped_at_once(pair, monkeypatch):
    def offline(self, name, timeout):
        assert timeout == 10
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    result = perceptual_metrics(*pair, PROMPTS, metrics=["clip_score"])["clip_score"]
    assert result.value is None
    assert "openai/clip-vit-large-patch14 is not in the Hugging Face cache" in result.skipped
    assert "ConnectionError" in result.skipped
    assert "put clip/ into a weights directory" in result.skipped


def test_a_failed_download_is_skipped():
    with pytest.raises(Unavailable, match=r"could not be downloaded \(<urlopen error.*put lpips.pt"):  # noqa: SIM117
        with networks._reasons("torchvision", "lpips.pt"):
            raise urllib.error.URLError("no route")


def test_torch_hub_finds_a_local_file(tmp_path):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({"weight": torch.arange(3.0)}, path)
    before = torch.hub.get_dir()
    with networks._cached_by_hub(path, "as-torchvision-names-it.pth"):
        state = torch.hub.load_state_dict_from_url("https://nowhere.invalid/as-torchvision-names-it.pth")
    assert torch.equal(state["weight"], torch.arange(3.0))
    assert torch.hub.get_dir() == before
    assert find_weights(tmp_path) == {"lpips": path}


def test_missing_and_damaged_files_are_errors(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*should hold lpips.pt, .*clip/"):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds none of lpips.pt, "):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match="'dists' is no metric with a network; use lpips, fid, clip_score"):
        find_weights({"dists": weights})
    with pytest.raises(FileNotFoundError, match=r"weights for fid: there is no \./inception\.pt"):
        find_weights({"fid": "./inception.pt"})
    assert find_weights({"clip_score": "openai/clip-vit-base-patch32", "fid": None}) == {
        "clip_score": "openai/clip-vit-base-patch32"
    }
    (tmp_path / "lpips.pt").write_bytes((weights / "lpips.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"lpips.pt is damaged or no TorchScript file .*torch.jit.trace"):
        load_network("lpips", tmp_path / "lpips.pt")
    (tmp_path / "clip").mkdir()
    with pytest.raises(ValueError, match=r"clip holds no CLIP model .*save_pretrained"):
        load_network("clip_score", tmp_path / "clip")
    with pytest.raises(ValueError, match=r"expected a path or a torch.nn.Module, got int"):
        load_network("fid", 3)


def test_a_network_that_fails_costs_only_its_own_metric(pair, weights):
    class Picky(torch.nn.Module):
        def forward(self, images, reference):
            raise RuntimeError("needs 64 x 64")

    class Infinite(torch.nn.Module):
        def forward(self, images, reference):
            return torch.full((len(images),), math.nan)

    metrics = ["psnr", "lpips"]
    found = perceptual_metrics(*pair, PROMPTS, metrics=metrics, weights={"lpips": Picky()})
    assert found["psnr"].value > 10
    assert found["lpips"].skipped == "Picky failed on these images: RuntimeError: needs 64 x 64"
    found = perceptual_metrics(*pair, PROMPTS, metrics=metrics, weights={"lpips": Infinite()})
    assert found["lpips"].skipped == "Infinite gave nan for these images: check its weights"


def test_one_image_has_no_distribution(pair, weights):
    images, reference = pair
    found = perceptual_metrics(images[:1], reference[:1], PROMPTS[:1], metrics=["fid", "lpips"], weights=weights)
    assert "at least two prompts" in found["fid"].skipped
    assert len(found["lpips"].per_image) == 1


def test_small_images_have_no_ssim():
    images = torch.rand(2, 3, 8, 8)
    found = perceptual_metrics(images, images, PROMPTS[:2], metrics=["ssim"])["ssim"]
    assert found.value is None
    assert "at least 11 x 11" in found.skipped


def test_wrong_arguments(pair):
    with pytest.raises(ValueError, match="'lpip' is unknown; use some of psnr, ssim, lpips, fid, clip_score"):
        perceptual_metrics(*pair, PROMPTS, metrics=["lpip"])
    with pytest.raises(ValueError, match=r"expected two tensors \(1, 3, height, width\)"):
        perceptual_metrics(*pair, PROMPTS[:1])
