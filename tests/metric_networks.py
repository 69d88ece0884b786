"""Stand-ins for the pretrained networks behind LPIPS, FID and CLIP score: same interfaces, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_pipelines import tiny_tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor


class Distance(nn.Module):
    """LPIPS in small: unit-length features of a backbone, weighted squared differences, averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
        self.head = nn.Conv2d(6, 1, 1, bias=False)
        self.head.weight.data.abs_()

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        a, b = self.backbone(images), self.backbone(reference)
        a = a / (a.square().sum(1, keepdim=True) + 1e-8).sqrt()
        b = b / (b.square().sum(1, keepdim=True) + 1e-8).sqrt()
        return self.head((a - b).square()).mean((2, 3))


class Features(nn.Module):
    """Four features of uint8 images: means of the channels and their mean square."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.square().mean((1, 2, 3))[:, None]], dim=1)


class LogitsOrFeatures(nn.Module):
    """The interface of NVIDIA's Inception file."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = self.features(images)
        return features if return_features else features[:, :2]


def distance() -> Distance:
    torch.manual_seed(0)
    return Distance().eval()


def save_clip(folder: Path) -> CLIPModel:
    """A CLIP model and its processor, as ``save_pretrained`` writes them."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    model = CLIPModel(
        CLIPConfig(text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=8)
    ).eval()
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(images, tiny_tokenizer()).save_pretrained(folder)
    return model


def save_networks(folder: Path) -> Path:
    """A weights directory with one network for each metric."""
    torch.jit.script(distance()).save(str(folder / "lpips.pt"))
    torch.jit.script(Features()).save(str(folder / "inception.pt"))
    save_clip(folder / "clip")
    return folder
