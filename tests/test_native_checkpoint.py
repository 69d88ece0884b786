"""Native checkpoints: what stock keys can say, and that they say it: read back by a loader that knows only the keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import modelopt.torch.quantization as mtq
import pytest
import torch
from denoisers import build
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel, SD3Transformer2DModel
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from test_quantize import loop_over, outputs, sqnr
from tiny_pipelines import tiny_sd3_pipeline, tiny_sd3_transformer
from torch import Tensor, nn
from torch.nn.functional import linear

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.export.native import (
    NativeFormat,
    NotRepresentableError,
    native_config,
    native_layers,
    problems_of,
    quantization_config,
)
from modelopt_ext.nn import SegLayout
from modelopt_ext.nn.packed_spec import PackedSpec
from optimum_segquant.checkpoints.native import export_native

FORMATS: tuple[NativeFormat, ...] = get_args(NativeFormat)
CALIBRATION = loop_over(range(6))


# -- a reader of the documented keys, with nothing of this package in it -----------------------------------------------


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors, through the index if there is one."""
    config = json.loads((directory / "config.json").read_text())
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["diffusion_pytorch_model.safetensors"]
    return config, {key: value for file in files for key, value in load_file(directory / file).items()}


class StockLinear(nn.Module):
    """A quantized Linear as vLLM-Omni and SGLang compute it from the keys of one layer."""

    def __init__(self, tensors: dict[str, Tensor], algorithm: str) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.weight, self.scale = tensors["weight"], tensors["weight_scale"]
        self.input_scale, self.bias = tensors.get("input_scale"), tensors.get("bias")

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of the input, (M, K) float32, and their scale."""
        if self.algorithm == "int8":
            scale = x.abs().amax(dim=-1, keepdim=True) / 127
            return (x / scale).round().clamp(-128, 127), scale
        if self.algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            scale = x.abs().amax(dim=-1, keepdim=True) / 448
        else:
            assert self.input_scale is not None
            scale = self.input_scale
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.codes(x.float())
        output = linear(codes, self.weight.float()) * scale * self.scale.reshape(-1)
        return (output if self.bias is None else output + self.bias).to(x.dtype)


def load_like_an_engine(directory: Path, cls: type) -> nn.Module:
    """The model from config.json, with a StockLinear wherever the keys and the config say so."""
    config, tensors = read(directory)
    quantization = config.pop("quantization_config")
    algorithm = quantization.get("quant_algo", quantization["quant_method"])
    model = cls.from_config(config)
    ignored = quantization.get("ignore", quantization.get("ignored_layers"))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in ignored):
            own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
            model.set_submodule(name, StockLinear(own, algorithm))
    plain = {key: value for key, value in tensors.items() if not isinstance(owner(model, key), StockLinear)}
    model.load_state_dict(plain, strict=True)
    return model.eval()


def owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


# -- models ------------------------------------------------------------------------------------------------------------


def calibrated(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    model = tiny_sd3_transformer(dtype=dtype)
    mtq.quantize(model, config, loop_over(range(6), dtype))
    return model


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A format, a calibrated SD3, its checkpoint."""
    model = calibrated(native_config(request.param))
    directory = tmp_path_factory.mktemp(request.param) / "checkpoint"
    before = outputs(model)
    assert export_native(model, directory) == directory
    assert torch.equal(outputs(model), before)  # the model stays as it is
    return request.param, model, directory


DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_per_token": torch.float8_e4m3fn, "int8_per_token": torch.int8}


def test_keys_shapes_and_dtypes(exported: tuple[NativeFormat, nn.Module, Path]) -> None:
    name, model, directory = exported
    _, tensors = read(directory)
    linears = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".attn" in key or ".ff" in key)
    }
    assert len(linears) == 37
    plain = {key for key in tiny_sd3_transformer().state_dict() if key.rpartition(".")[0] not in linears}
    expected = set(plain)
    for key, module in linears.items():
        rows = module.out_features
        expected |= {f"{key}.weight", f"{key}.weight_scale"} | ({f"{key}.bias"} if module.bias is not None else set())
        assert tensors[f"{key}.weight"].dtype == DTYPES[name]
        assert tensors[f"{key}.weight"].shape == (rows, module.in_features)
        scale = tensors[f"{key}.weight_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == {"fp8": (), "fp8_per_token": (rows,), "int8_per_token": (rows, 1)}[name]
        if name == "fp8":
            expected.add(f"{key}.input_scale")
            assert tensors[f"{key}.input_scale"].shape == ()
            assert tensors[f"{key}.input_scale"].dtype == torch.float32
    assert set(tensors) == expected


def test_a_reader_of_the_keys_reproduces_the_outputs(exported: tuple[NativeFormat, nn.Module, Path]) -> None:
    _, model, directory = exported
    loaded = load_like_an_engine(directory, SD3Transformer2DModel)
    simulated, exact = outputs(model), outputs(tiny_sd3_transformer())
    # Rounding is simulated in another order, which flips single codes; both are equally far from full precision.
    assert sqnr(simulated, outputs(loaded)) > sqnr(exact, simulated) + 10
    assert abs(sqnr(exact, outputs(loaded)) - sqnr(exact, simulated)) < 0.1


def layer_inputs(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """What each of the layers reads first."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, arguments[0].detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in names]
    loop_over(range(100, 101))(model)
    for handle in handles:
        handle.remove()
    return seen


def test_layers_reproduce_codes_and_outputs(exported: tuple[NativeFormat, nn.Module, Path]) -> None:
    _, model, directory = exported
    loaded = load_like_an_engine(directory, SD3Transformer2DModel)
    _, layers = native_layers(model)
    inputs = layer_inputs(model, set(layers))
    assert set(inputs) == set(layers)
    differing, total = 0, 0
    for key, layer in layers.items():
        stock = loaded.get_submodule(key)
        assert isinstance(stock, StockLinear)
        assert torch.equal(stock.weight.float(), layer.codes().float())
        x = inputs[key]
        torch.testing.assert_close(stock(x), layer(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            simulated = model.get_submodule(key)(x)
        differing += int(((stock(x) - simulated).abs() > 1e-4 * simulated.abs().max()).sum())
        total += simulated.numel()
    # Ties of rounding, which fall either way: a code that differs changes one row of the output.
    assert differing < 0.005 * total


def test_config(exported: tuple[NativeFormat, nn.Module, Path]) -> None:
    name, _, directory = exported
    config, _ = read(directory)
    assert config["_class_name"] == "SD3Transformer2DModel"
    quantization = config["quantization_config"]
    if name == "int8_per_token":
        ignored = quantization.pop("ignored_layers")
        assert quantization == {"quant_method": "int8", "activation_scheme": "dynamic"}
        assert {"pos_embed.proj", "context_embedder", "transformer_blocks.2.norm1.linear", "proj_out"} < set(ignored)
        assert len(ignored) == 14
        return
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == {"fp8": "FP8", "fp8_per_token": "FP8_PER_CHANNEL_PER_TOKEN"}[name]
    ignored = quantization["ignore"]
    assert {"pos_embed*", "context_embedder", "norm_out*", "proj_out", "time_text_embed*"} < set(ignored)
    assert any(fnmatch("transformer_blocks.2.norm1.linear", pattern) for pattern in ignored)


# -- the same as ModelOpt's exporter -----------------------------------------------------------------------------------


def stock_config(name: NativeFormat) -> dict[str, Any]:
    """The same quantizers under ModelOpt's own algorithm, on every Linear."""
    return {"quant_cfg": native_config(name, every_linear=True)["quant_cfg"], "algorithm": "max"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fp8", "fp8_per_token"])
def test_equals_what_modelopt_writes(name: NativeFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated(stock_config(name), dtype)
    export_native(model, tmp_path / "ours")
    export_hf_checkpoint(copy.deepcopy(model), export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours[0] == theirs[0]
    assert set(ours[1]) == set(theirs[1])
    for key, value in theirs[1].items():
        mine = ours[1][key]
        assert (mine.dtype, mine.shape) == (value.dtype, value.shape), key
        if key.endswith("_scale"):
            torch.testing.assert_close(mine, value, rtol=1e-6, atol=0)
        elif value.dtype == torch.float8_e4m3fn:
            # ModelOpt divides in the model's dtype, here it is float32: in 16 bits more values land on the other side.
            differing = (mine.float() != value.float()).float().mean()
            assert differing < (1e-3 if dtype is torch.float32 else 0.1), key
        else:
            assert torch.equal(mine, value), key
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "theirs").iterdir()
    )


def test_modelopt_presets_can_be_exported(tmp_path: Path) -> None:
    """Stock models without smoothing fit, with the Linears that a preset leaves out as they were."""
    config = stock_config("int8_per_token")
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "*proj_out*", "enable": False}]
    model = calibrated(config)
    export_native(model, tmp_path / "out")
    written, tensors = read(tmp_path / "out")
    assert written["quantization_config"]["ignored_layers"] == ["pos_embed.proj", "proj_out"]
    assert torch.equal(tensors["proj_out.weight"], model.proj_out.weight)
    loaded = load_like_an_engine(tmp_path / "out", SD3Transformer2DModel)
    assert sqnr(outputs(model), outputs(loaded)) > 45


# -- other sources -----------------------------------------------------------------------------------------------------


def test_compressed_models_give_the_same_files(tmp_path: Path) -> None:
    model = calibrated(native_config("fp8_per_token", gptq=True, samples=256))
    export_native(model, tmp_path / "simulated")
    modelopt_ext.compress(model)
    export_native(model, tmp_path / "packed")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "simulated" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()


@pytest.mark.parametrize("name", ["fp8_per_token", "int8_per_token"])
def test_half_precision(name: NativeFormat, tmp_path: Path) -> None:
    """Engines run bfloat16: plain tensors keep that type, scales are float32."""
    dtype = torch.bfloat16
    model = calibrated(native_config(name), dtype)
    export_native(model, tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in tensors.items() if "attn.to_q" in key}
    assert kinds == {"weight": DTYPES[name], "weight_scale": torch.float32, "bias": dtype}
    loaded = load_like_an_engine(tmp_path / "out", SD3Transformer2DModel).to(dtype)
    exact = outputs(tiny_sd3_transformer())
    assert abs(sqnr(exact, outputs(loaded, dtype)) - sqnr(exact, outputs(model, dtype))) < 0.5


def test_models_loaded_from_segquant_checkpoints_give_the_same_files(tmp_path: Path) -> None:
    model = modelopt_ext.compress(calibrated(native_config("fp8")))
    export_native(model, tmp_path / "direct")
    model.save_pretrained(tmp_path / "segquant")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "segquant")
    export_native(loaded, tmp_path / "loaded")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "direct" / file).read_bytes() == (tmp_path / "loaded" / file).read_bytes()


def test_flux(tmp_path: Path) -> None:
    model, inputs = build("FluxTransformer2DModel")

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            model(**inputs)

    with torch.no_grad():
        exact = model(**inputs)[0]
    mtq.quantize(model, native_config("int8_per_token"), forward_loop)
    export_native(model, tmp_path / "flux")
    loaded = load_like_an_engine(tmp_path / "flux", FluxTransformer2DModel)
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, StockLinear)}
    assert {name.split(".", 2)[2] for name in quantized} == {
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"attn.add_{name}_proj" for name in "qkv"),
        *(f"{part}.net.{index}" for part in ("ff", "ff_context") for index in ("0.proj", "2")),
        "proj_mlp",
        "proj_out",
    }
    with torch.no_grad():
        simulated, read_back = model(**inputs)[0], loaded(**inputs)[0]
    assert sqnr(simulated, read_back) > sqnr(exact, simulated) + 10


def test_weights_that_are_read_without_their_linear_stay_plain(tmp_path: Path) -> None:
    """HunyuanDiT pools its text by a function of torch that takes the weights of four Linears."""
    model, inputs = build("HunyuanDiT2DModel")

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            model(**inputs)

    mtq.quantize(model, native_config("int8_per_token", every_linear=True), forward_loop)
    export_native(model, tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    plain = [f"time_extra_emb.pooler.{name}" for name in ("k_proj", "q_proj", "v_proj", "c_proj")]
    assert set(plain) < set(config["quantization_config"]["ignored_layers"])
    for name in plain:
        assert torch.equal(tensors[f"{name}.weight"], model.get_submodule(name).weight)
    loaded = load_like_an_engine(tmp_path / "out", HunyuanDiT2DModel)
    with torch.no_grad():
        assert sqnr(model(**inputs)[0], loaded(**inputs)[0]) > 30


def test_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_sd3_pipeline()
    mtq.quantize(pipeline.transformer, native_config("fp8"), CALIBRATION)
    export_native(pipeline, tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["text_encoder_3"] == [None, None]
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert any((tmp_path / "pipeline" / name).iterdir())
    loaded = load_like_an_engine(tmp_path / "pipeline/transformer", SD3Transformer2DModel)
    assert sqnr(outputs(pipeline.transformer), outputs(loaded)) > 35
    vae = type(pipeline.vae).from_pretrained(tmp_path / "pipeline/vae")
    assert torch.equal(vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


def test_what_only_chooses_codes_and_biases_is_free(tmp_path: Path) -> None:
    settings = {"gptq": True, "bias_correction": True, "weight_clip_grid": (1.0, 0.9), "clip_grid": (1.0, 0.8)}
    model = calibrated(native_config("fp8", samples=256, **settings))
    export_native(model, tmp_path / "out")
    loaded = load_like_an_engine(tmp_path / "out", SD3Transformer2DModel)
    exact = outputs(tiny_sd3_transformer())
    assert abs(sqnr(exact, outputs(loaded)) - sqnr(exact, outputs(model))) < 0.1
    before = tiny_sd3_transformer().state_dict()
    stock = {key: module for key, module in loaded.named_modules() if isinstance(module, StockLinear)}
    changed = [key for key, module in stock.items() if not torch.equal(module.bias, before[f"{key}.bias"])]
    assert 0 < len(changed) < len(stock)  # corrected where that helps on rows that were not seen


def test_shards(tmp_path: Path) -> None:
    model = calibrated(native_config("int8_per_token"))
    export_native(model, tmp_path / "one")
    export_native(model, tmp_path / "many", max_shard_size="50KB")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    (config, one), (_, many) = read(tmp_path / "one"), read(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert config["quantization_config"]["quant_method"] == "int8"


def test_q_k_and_v_share_their_input_scale() -> None:
    _, layers = native_layers(calibrated(native_config("fp8", gptq=True, samples=256)))
    for block in range(3):
        scales = {float(layers[f"transformer_blocks.{block}.attn.to_{which}"].input_scale) for which in "qkv"}
        assert len(scales) == 1


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "suggestion", "words"),
    [
        ("SEGQUANT_INT8_CFG", "int8_per_token", "static INT8"),
        ("SEGQUANT_INT8_PER_TOKEN_CFG", "int8_per_token", "smoothed"),
        ("SEGQUANT_FP8_PER_TENSOR_CFG", "fp8", "smoothed"),
    ],
)
def test_presets_are_refused_with_the_config_that_fits(
    preset: str, suggestion: str, words: str, tmp_path: Path
) -> None:
    config = copy.deepcopy(getattr(modelopt_ext, preset))
    config["algorithm"] |= {"samples": 128, "alpha": 0.5}
    model = calibrated(config)
    with pytest.raises(NotRepresentableError, match=words) as raised:
        export_native(model, tmp_path / "out")
    assert raised.value.suggestion == suggestion
    assert f"native_config({suggestion!r})" in str(raised.value)
    assert raised.value.problems
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in raised.value.problems)
    assert not list(tmp_path.iterdir())  # nothing was written


def packed(**changes: Any) -> PackedLinear:
    """A Linear of 8 -> 6 channels that fits, but for ``changes``."""
    layout = {"in_segments": (8,), "out_groups": (6,), "weight_segments": (6,), "polarity": ("none",), "rotation": (1,)}
    spec = {"weights": "int8", "activations": "int8", "per_token": True}
    for name, value in changes.items():
        (layout if name in layout else spec)[name] = value
    layer = PackedLinear(PackedSpec(layout=SegLayout(**layout), **spec))  # type: ignore[arg-type]
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(1)
    return layer


GROUPS = {"out_groups": (2, 4), "weight_segments": (2, 4)}
STATIC_FP8 = {"weights": "float8_e4m3fn", "activations": "float8_e4m3fn", "per_token": False}
CASES: dict[str, tuple[dict[str, Any], Callable[[PackedLinear], Any] | None, str | None]] = {
    "fits": ({}, None, None),
    "groups that differ in nothing": (GROUPS, None, None),
    "smoothing by ones": ({"smoothing": True}, None, None),
    "a shift of zeros": ({"shift": True}, lambda layer: layer.shift.zero_(), None),
    "static fp8": (STATIC_FP8, None, None),
    "segments": ({"in_segments": (4, 4), "polarity": ("none",) * 2, "rotation": (1, 1)}, None, "2 input segments"),
    "groups": (STATIC_FP8 | GROUPS, lambda layer: layer.input_scale[1].fill_(2), "2 output groups"),
    "polarity": ({"polarity": ("dual8",)}, None, "split by sign"),
    "rotation": ({"rotation": (8,)}, None, "rotated"),
    "smoothing": ({"smoothing": True}, lambda layer: layer.inverse_smoothing[0, 3].fill_(2), "smoothed"),
    "shift": ({"shift": True}, None, "shifted"),
    "branch": ({"rank": 2}, None, "rank 2"),
    "channels of static fp8": (STATIC_FP8, lambda layer: layer.weight_scale[2].fill_(3), "one weight scale"),
    "static int8": ({"per_token": False}, None, "static INT8"),
    "weight-only": ({"activations": None, "per_token": False}, None, "no stock layout"),
    "int4": ({"weights": "int4"}, None, "no stock layout"),
    "mixed": ({"weights": "float8_e4m3fn"}, None, "no stock layout"),
    "weight groups": ({"group": 4}, None, "groups of 4"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_layer_may_have(case: str) -> None:
    changes, change, expected = CASES[case]
    layer = packed(**changes)
    if change is not None:
        with torch.no_grad():
            change(layer)
    problems = problems_of(layer)
    if expected is None:
        assert problems == []
    else:
        assert any(expected in problem for problem in problems)


def test_two_formats_in_one_model_are_refused(tmp_path: Path) -> None:
    config = native_config("fp8", every_linear=True)
    config["algorithm"]["embedders"] = "per_token"
    with pytest.raises(NotRepresentableError, match="most layers are fp8"):
        export_native(calibrated(config), tmp_path / "out")


def test_quantizers_outside_linears_are_refused(tmp_path: Path) -> None:
    model = tiny_sd3_transformer()
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, CALIBRATION)
    with pytest.raises(NotRepresentableError, match=r"pos_embed\.proj: it rounds outside of Linears"):
        export_native(model, tmp_path / "out")


def test_nothing_quantized(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized Linear"):
        export_native(tiny_sd3_transformer(), tmp_path / "out")
    with pytest.raises(ValueError, match="no component"):
        export_native(tiny_sd3_pipeline(), tmp_path / "out")
    with pytest.raises(TypeError, match="export_hf_checkpoint"):
        export_native(nn.Linear(4, 4), tmp_path / "out")  # type: ignore[arg-type]


def test_a_changed_architecture_is_refused(tmp_path: Path) -> None:
    model = calibrated(native_config("int8_per_token"))
    model.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"has no extra\.bias"):
        export_native(model, tmp_path / "out")


def test_a_failed_export_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated(native_config("fp8"))
    directory = export_native(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optimum_segquant.checkpoints.native.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_native(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_patterns_catch_no_quantized_layer_in_vllm() -> None:
    """FLUX: "proj_out" in full precision, read as a part of a name, would take the single blocks' along."""
    quantized = ["single_transformer_blocks.0.proj_out", "transformer_blocks.0.ff.net.2"]
    plain = ["proj_out", "transformer_blocks.0.norm1.linear", "x_embedder"]
    patterns = quantization_config("fp8", quantized, plain)["ignore"]
    for name in plain:
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    for name in quantized:
        assert not any(fnmatch(name, pattern) or pattern in name for pattern in patterns), name
    assert "x_embedder" in patterns


def test_layers_that_engines_cannot_quantize_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_native(calibrated(native_config("int8_per_token")), tmp_path / "out")
    assert not caplog.records
    export_native(calibrated(native_config("int8_per_token", every_linear=True)), tmp_path / "out")
    assert "13 of 50 quantized Linears are embedders" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low_rank": {"rank": 8}}, "low_rank"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"polarity": "shift"}, "polarity='shift'"),
        ({"embedders": "per_token"}, "embedders='per_token'"),
        ({"layers": {"*": {"polarity": "dual8"}}}, "polarity"),
    ],
)
def test_native_config_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native_config("fp8", **arguments)
    with pytest.raises(ValueError, match="fp8, fp8_per_token"):
        native_config("int4")  # type: ignore[arg-type]


def test_int8_config_needs_no_modelopt() -> None:
    config = quantization_config("int8_per_token", ["a"], ["c", "b"])
    assert config == {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": ["b", "c"]}
