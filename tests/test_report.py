"""The HTML report, read as text and opened in a headless browser; the drawing of a plan."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, chromium, dump_dom
from PIL import Image

from modelopt_ext import LinearPlan, SegmentPlan
from modelopt_ext.sensitivity import LayerSensitivity, SensitivityTable
from optimum_segquant import draw_plan, write_report
from optimum_segquant.evaluation import Evaluation, LatentError, MetricResult, PipelineFacts, VelocitySQNR
from optimum_segquant.layer_formats import LayerFormats
from optimum_segquant.quantization_report import ComponentReport, LayerCounts, QuantizationReport
from optimum_segquant.report import numbers
from optimum_segquant.report.gallery import image_uri, shown_images
from optimum_segquant.report.plots import layer_group, plot_latents, plot_layers, plot_velocity

HOSTILE = '<script>document.title="attacked"</script><img src="http://nowhere.invalid/x.png" onerror=alert(1)>'
PROMPTS = ("a red circle & a blue square", HOSTILE, "a large red triangle")
SIZE = 64

PLAN = SegmentPlan(
    linears={
        "embedder": LinearPlan((32, 32), (48,)),
        **{f"blocks.{i}.norm1.linear": LinearPlan((48,), (48,) * 6, ("silu",)) for i in range(3)},
        **{f"blocks.{i}.attn.to_q": LinearPlan.trivial(48, 48) for i in range(3)},
        "blocks.0.proj_out": LinearPlan((48, 192), (48,), ("", "gelu")),
    },
    uncalled=("spare",),
    notes={"blocks.0.attn.to_q": "the output is cut into <strided> channels"},
    convs={"up.conv": (64, 32)},
)


def layer(name: str, sqnr: float, rows: float = 10.0) -> LayerSensitivity:
    return LayerSensitivity(name, weights=48 * 48, rows=rows, calls=1.0, local_noise=10 ** (-sqnr / 10))


def facts(form: Any, **changes: Any) -> PipelineFacts:
    values: dict[str, Any] = {
        "pipeline": "StableDiffusion3Pipeline",
        "denoiser": "SD3Transformer2DModel",
        "form": form,
        "dtype": "bfloat16",
        "device": "cuda, Some GPU",
        "bytes": 4_000_000_000,
        "seconds_per_image": 3.5,
        "seconds_per_step": 0.120,
        "batch_size": 4,
    }
    return PipelineFacts(**{**values, **changes})


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Full precision: a red square on grey; quantized: the same, one column wider."""
    reference = torch.full((len(PROMPTS), 3, SIZE, SIZE), 0.5)
    reference[:, :, 16:48, 16:40] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    images = reference.clone()
    images[:, :, 16:48, 16:41] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return images, reference


def complete() -> Evaluation:
    images, reference = pictures()
    return Evaluation(
        prompts=PROMPTS,
        seeds=(7, 8, 9),
        call={"num_inference_steps": 4, "guidance_scale": 4.5},
        reference=facts("full precision"),
        quantized=facts("packed", bytes=1_000_000_000, seconds_per_step=0.060),
        metrics={
            "psnr": MetricResult(31.25, (30.0, 31.0, 32.75)),
            "ssim": MetricResult(0.98764, (0.99, 0.98, 0.9931)),
            "lpips": MetricResult(0.0123, (0.01, 0.02, 0.0069), network="lpips.pt"),
            "fid": MetricResult(skipped="torch-fidelity is not installed: <b>pip</b> install it"),
            "clip_score": MetricResult(24.5, (24.0, 25.0, 24.5), 25.5, (25.0, 26.0, 25.5), network="clip"),
        },
        velocity=VelocitySQNR(33.6, {1000.0: 36.0, 500.0: 33.0, 10.0: 30.0}),
        layers=SensitivityTable(
            (layer("embedder", 45.0), layer("blocks.0.attn.to_q", 28.5), layer("spare", math.inf, 0)), 8
        ),
        latents=tuple(LatentError(i, 1000.0 - 250 * i, 1e-5 * 4**i, 3e-5 * 4**i) for i in range(4)),
        formats={"embedder": LayerFormats("int8", "int8 per token", ("none", "dual8"), True, False, False, False)},
        plan=PLAN,
        missing={},
        versions={"torch": "2.13.0", "python": "3.11.7", "numpy": "2.4.6"},
        reference_images=reference,
        images=images,
    )


REPORT = QuantizationReport(
    pipeline="StableDiffusion3Pipeline",
    components=(
        ComponentReport(
            name="transformer",
            model="SD3Transformer2DModel",
            config_name="SEGQUANT_CFG",
            config={"quant_cfg": [], "algorithm": {"method": "segquant"}},
            parameters=2_000_000_000,
            bytes_before=4_000_000_000,
            bytes_after=1_000_000_000,
            layers=LayerCounts(86, 85, 12, {"int8": 85}, {"int8": 85}, {"none": 60, "dual8": 25}, 80, 0, 0, 0),
            plan_summary="86 Linears",
            plan=PLAN.to_dict(),
            calls=128,
            timesteps=8,
            seconds=125.5,
            sqnr=33.6,
            sqnr_by_timestep={1000.0: math.inf, 500.0: 33.0},
        ),
    ),
    calibration={"num_inference_steps": 28, "prompts": "sha256:abc"},
    held_out=None,
    seconds={"sample": 60.0, "quantize": 125.5},
    processes=2,
    export="segquant",
    exported_bytes=1_100_000_000,
    versions={"torch": "2.13.0"},
)
# And what a later release may add.
QUANTIZATION = {**REPORT.to_dict(), "something new": {"as it is": [1, 2]}}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report(path, complete(), quantization=QUANTIZATION) == path
    return path


@pytest.fixture(scope="module")
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# -- as text ----------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """The words of a page in one line, without markup."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", text, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_every_number_is_there(text: str) -> None:
    words = visible(text)
    for expected in (
        "Velocity SQNR 33.6 dB",
        "Final latents 31.9 dB after 4 steps",  # 6.4e-4
        "Worst layer 28.5 dB blocks.0.attn.to_q",
        "PSNR 31.2 dB",
        "SSIM 0.9876",
        "LPIPS 0.0123",
        "CLIP score 24.50 full precision 25.50",
        "Denoiser&#39;s size 954 MiB 0.25 × of 3.73 GiB",
        "Time per step 60 ms 0.50 × of 120 ms",
        "seed 7 · PSNR 30.0 dB · SSIM 0.9900 · LPIPS 0.0100 · CLIP score 24.00 (full precision 25.00)",
        "PSNR, dB 31.2 30.0 — higher pixels",
        "LPIPS 0.0123 0.0200 — lower lpips.pt",
        "CLIP score 24.50 24.00 25.50 higher clip",
        "embedder other 45.0 33.33 50.00 int8 int8 per token none, dual8",
        "blocks.0.attn.to_q attention 28.5 33.33 50.00 — — —",
        "spare other never called 33.33 0.00",
        "blocks.{0-2}.norm1.linear 3 48:silu 6 x 48",
        "blocks.0.proj_out 1 48 + 192:gelu 48",
        "up.conv 1 64 + 32 (convolution)",
        "one denoising step 120 ms 60 ms",
        "transformer (SD3Transformer2DModel)",
        "config SEGQUANT_CFG",
        "size 3.73 GiB before, 954 MiB packed (0.25 ×)",
        "layers: polarity none: 60, dual8: 25",
        "SQNR on held-out data 33.6 dB",
        "sqnr by timestep 1000.0: inf, 500.0: 33",
        "processes 2",
        "something new as it is 1, 2",
        "written as segquant, 1.02 GiB",
        "python 3.11.7 torch 2.13.0 numpy 2.4.6",  # the main ones first
    ):
        assert expected in words, expected
    assert "&#34;method&#34;: &#34;segquant&#34;" in text
    assert "&#34;guidance_scale&#34;: 4.5" in text


def test_what_is_missing_says_why(text: str) -> None:
    words = visible(text)
    reason = "torch-fidelity is not installed: &lt;b&gt;pip&lt;/b&gt; install it"
    assert f"Not measured: 1 FID {reason}" in words
    assert f"FID skipped: {reason}" in words
    assert "FID skipped see the metrics" in words
    assert "held out —" in words


def test_everything_is_escaped(text: str) -> None:
    assert HOSTILE not in text
    assert "&lt;script&gt;document.title=&#34;attacked&#34;&lt;/script&gt;" in text
    assert text.count("<script>") == 1
    assert "&lt;strided&gt; channels" in text


def test_nothing_points_outside(text: str) -> None:
    class Addresses(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            for name, value in attributes:
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "srcset", "href", "action", "data", "poster", "background"):
                    seen.append((value or "").partition(",")[0][:40])

    seen: list[str] = []
    Addresses().feed(text)
    assert {address for address in seen if not address.startswith("#")} == {
        *("data:", "data:image/png;base64", "data:image/svg+xml;base64")
    }
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_pictures_are_the_pixels(text: str) -> None:
    found = re.findall(r'<img class="(full|quantized) pixels" src="data:image/png;base64,([^"]+)"', text)
    assert [name for name, _ in found] == ["full", "quantized"] * 3
    for index, tensor in enumerate(reversed(pictures())):
        picture = Image.open(io.BytesIO(base64.b64decode(found[index][1])))
        expected = (tensor[0] * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8), expected.flatten())


def test_large_images_are_scaled_down() -> None:
    def side(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size

    assert side(image_uri(torch.rand(3, 40, 80), largest=20)) == (20, 10)
    assert side(image_uri(torch.rand(3, 40, 80), largest=100)) == (80, 40)


def test_which_of_many_images_are_shown() -> None:
    psnr = [30.0, 31.0, 40.0, 20.0, 50.0, 10.0]
    assert shown_images(6, psnr, 6) == [0, 1, 2, 3, 4, 5]
    assert shown_images(6, psnr, 4) == [0, 1, 3, 5]  # two first ones, the two worst others
    assert shown_images(6, [], 4) == [0, 1, 2, 3]
    assert shown_images(6, psnr, 1) == [5]


def test_a_limited_page_says_so(tmp_path: Path) -> None:
    words = visible(write_report(tmp_path / "r.html", complete(), max_images=1, image_size=32).read_text())
    assert "1 of 3 pairs of equal prompts and seeds, the first ones and those with the lowest PSNR" in words
    assert "64 x 64 pixels, scaled down here, differences too" in words
    assert "Missing. no images were asked for (max_images)" in visible(
        write_report(tmp_path / "r.html", complete(), max_images=0).read_text()
    )


def test_bit_equal_pipelines(tmp_path: Path) -> None:
    equal = dataclasses.replace(
        complete(),
        metrics={"psnr": MetricResult(math.inf, (math.inf,) * 3)},
        velocity=VelocitySQNR(math.inf, {1000.0: math.inf}),
        latents=(LatentError(0, 1000.0, 0.0, 0.0),),
    )
    words = visible(write_report(tmp_path / "r.html", equal).read_text())
    assert "Velocity SQNR ∞ dB" in words
    assert "Missing. both denoisers gave bit-equal outputs" in words
    assert "Missing. both trajectories are bit-equal" in words
    assert "PSNR, dB ∞ ∞" in words
    assert "Not asked for: SSIM, LPIPS, FID, CLIP score." in words


def test_parts_that_were_not_measured(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 32, 32)
    bare = dataclasses.replace(
        complete(),
        quantized=facts("simulated"),
        velocity=None,
        layers=None,
        latents=None,
        plan=None,
        formats={},
        missing={"velocity": "no calls", "layers": "RuntimeError: <out> of memory", "latents": "no callback"},
        images=images,
    )
    words = visible(write_report(tmp_path / "r.html", bare).read_text())
    for reason in (
        "Velocity SQNR missing not measured, see below",
        "Missing. no calls",
        "Missing. RuntimeError: &lt;out&gt; of memory",
        "Missing. no callback",
        "layer by layer RuntimeError: &lt;out&gt; of memory",
        "Denoiser&#39;s size missing known once the model is packed or exported",
        "Time per step missing simulated quantization says nothing about speed",
        "Missing. the pipelines give images of different sizes",
        "Missing. the denoiser does not know its plan",
        "Missing. no report of the quantization was given",
        "Missing. no quantization config was given",
    ):
        assert reason in words, reason


def test_a_quantization_alone(tmp_path: Path) -> None:
    words = visible(write_report(tmp_path / "r.html", quantization=QUANTIZATION, title="SD3 <5>").read_text())
    assert words.startswith("SD3 &lt;5&gt;")
    assert "evaluation no evaluation was given: write_report(path, evaluate(...))" in words
    assert "blocks.{0-2}.norm1.linear 3 48:silu 6 x 48" in words  # the plan of the report
    assert "config SEGQUANT_CFG" in words


def test_the_packed_size_of_simulated_quantization_is_the_reports(tmp_path: Path) -> None:
    simulated = dataclasses.replace(complete(), quantized=facts("simulated"))
    words = visible(write_report(tmp_path / "r.html", simulated, quantization=QUANTIZATION).read_text())
    assert "Denoiser&#39;s size 954 MiB 0.25 × of 3.73 GiB, once packed" in words
    assert "the same, packed — 954 MiB" in words


def test_the_report_of_the_quantizer_itself(tmp_path: Path) -> None:
    words = visible(write_report(tmp_path / "r.html", quantization=REPORT).read_text())
    assert "transformer (SD3Transformer2DModel)" in words


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"quantization is a str: give the report .* to_dict\(\)"):
        write_report(tmp_path / "r.html", quantization="report.json")
    with pytest.raises(ValueError, match="max_images must not be negative"):
        write_report(tmp_path / "r.html", complete(), max_images=-1)
    with pytest.raises(IsADirectoryError, match=r"give the name of an HTML file, such as .*report\.html"):
        write_report(tmp_path, complete())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")

    def full(self: Path, *_: Any, **__: Any) -> int:
        with self.open("w") as file:
            file.write("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*report\.html: free some space"):
        write_report(path, complete())
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ssim", 0.99314, "0.9931"),
        ("ssim", 0.9999912, "0.99999"),
        ("ssim", 1.0, "1.0000"),
        ("fid", 3.2e-7, "3.2e-07"),
        ("fid", 0.0, "0.00"),
        ("psnr", math.inf, "∞"),
        ("psnr", None, "—"),
    ],
)
def test_no_difference_is_rounded_away(name: str, value: float | None, text: str) -> None:
    assert numbers.metric(name, value) == text


def test_numbers_with_units() -> None:
    assert [numbers.size(n) for n in (None, 512, 2048, 3 * 2**20, 5 * 2**30)] == [
        *("—", "512 B", "2 KiB", "3 MiB", "5 GiB")
    ]
    assert [numbers.seconds(s) for s in (None, 0.0123, 1.5, 3600)] == ["—", "12.3 ms", "1.5 s", "3600 s"]
    assert numbers.ratio(1, 4) == "0.25 ×"
    assert numbers.ratio(None, 4) == "—"


# -- plots ------------------------------------------------------------------------------------------------------------


def test_plots_hold_the_numbers() -> None:
    evaluation = complete()
    assert evaluation.velocity is not None
    assert evaluation.layers is not None
    assert evaluation.latents is not None
    velocity = plot_velocity(evaluation.velocity)
    assert velocity is not None
    (line, overall) = velocity.axes[0].lines
    assert line.get_xydata().tolist() == [[1000.0, 36.0], [500.0, 33.0], [10.0, 30.0]]
    assert overall.get_ydata()[0] == 33.6
    assert velocity.axes[0].get_xlim()[0] > velocity.axes[0].get_xlim()[1]  # from noise to image
    latents = plot_latents(evaluation.latents)
    assert latents is not None
    assert latents.axes[0].lines[0].get_ydata()[-1] == pytest.approx(evaluation.latents[-1].sqnr)
    assert latents.axes[0].lines[1].get_ydata()[0] == pytest.approx(-10 * math.log10(3e-5))
    layers = plot_layers(evaluation.layers)
    assert layers is not None
    points = [tuple(map(float, point)) for marks in layers.axes[0].collections for point in marks.get_offsets()]
    assert sorted(points) == [(0.0, pytest.approx(45.0)), (1.0, pytest.approx(28.5))]  # not the one never called
    numbered = {note.get_text(): note.xy[0] for note in layers.axes[0].texts}
    assert numbered == {"1": 1, "2": 0}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer_blocks.0.attn.to_q", "attention"),
        ("transformer_blocks.0.ff.net.2", "feed-forward"),
        ("transformer_blocks.0.norm1.linear", "modulation"),
        ("single_transformer_blocks.3.proj_mlp", "feed-forward"),
        ("time_text_embed.timestep_embedder.linear_1", "other"),
    ],
)
def test_kinds_of_layers(name: str, group: str) -> None:
    assert layer_group(name) == group


def bars(figure: Any) -> list[tuple[float, float, tuple[int, ...]]]:
    """(left, width, colour) of every bar, line by line."""
    return [
        (round(p.get_x(), 4), round(p.get_width(), 4), tuple(round(255 * c) for c in p.get_facecolor()[:3]))
        for p in figure.axes[0].patches
    ]


def test_a_plan_is_drawn_to_scale() -> None:
    figure = draw_plan(PLAN)
    found = bars(figure)
    grey, orange, purple = (195, 201, 212), (232, 121, 58), (138, 92, 209)
    # embedder: 32 + 32 of at most 240 input channels; its one output of at most 288.
    assert found[:3] == [(0.0, 0.1333, grey), (0.1333, 0.1333, grey), (1.08, 0.1667, (47, 111, 235))]
    assert found[3][1:] == (0.2, orange)  # norm1: 48 channels after SiLU
    assert [width for _, width, _ in found[4:10]] == [0.1667] * 6
    assert found[10:12] == [(0.0, 0.2, grey), (0.2, 0.8, purple)]  # proj_out
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "blocks.{0-2}.norm1.linear  (3)" in texts
    assert "convolution" in texts
    assert texts[-1] == "3 Linears without cuts and tags are not drawn; 1 Linears were never called"
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["not polar", "after SiLU", "after GELU"]


def test_long_and_empty_plans() -> None:
    plan = SegmentPlan({f"layer_{i}": LinearPlan((i + 1, 1), (4,)) for i in range(9)})
    figure = draw_plan(plan, max_rows=4)
    assert figure.axes[0].texts[-1].get_text() == "5 more rows are not drawn"
    assert len(bars(figure)) == 4 * 3
    empty = draw_plan(SegmentPlan({"a": LinearPlan.trivial(4, 4)}))
    assert "No Linear has cuts or tags." in [text.get_text() for text in empty.axes[0].texts]
    assert len(bars(draw_plan(SegmentPlan({"a": LinearPlan.trivial(4, 4)}), trivial=True))) == 2
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        draw_plan(plan, max_rows=0)


# -- in a browser -----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    chromium() is None, reason="no chromium on the PATH: apt-get install chromium to open the page in a browser"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def set_input(browser: Browser, selector: str, value: object) -> None:
    """As if it were typed or dragged."""
    browser.run(
        f"(() => {{ const input = document.querySelector({json.dumps(selector)}); input.value = {json.dumps(value)};"
        " input.dispatchEvent(new Event('input')); })()"
    )


@needs_browser
def test_the_document_after_its_scripts(page: Path) -> None:
    dom = dump_dom(page)
    assert '<html lang="en" class="js">' in dom
    assert 'data-mode="slider"' in dom
    assert "<title>SD3Transformer2DModel, quantized</title>" in dom  # and not "attacked"


@needs_browser
def test_no_errors_no_requests_and_pixels(browser: Browser, page: Path) -> None:
    for width in (390, 1280, 2200):
        browser.resize(width, 900)
        browser.open(page)
        assert browser.errors == []
        assert browser.requests == []
        assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
        # Nothing but the tables' and drawings' own boxes scrolls sideways.
        assert browser.run("document.documentElement.scrollWidth") <= width
        picture = browser.screenshot(whole=True)
        assert picture.width == width
        colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
        assert colours[(255, 255, 255)] > 0.5 * picture.width * picture.height  # a light page,
        assert len(colours) > 100  # but no blank one,
        assert colours[(255, 0, 0)] > 5000  # with the red squares.
    assert browser.run("document.title") == "SD3Transformer2DModel, quantized"


@needs_browser
def test_views_of_the_images(browser: Browser, page: Path) -> None:
    browser.resize(1280, 900)
    browser.open(page)
    box = browser.run(
        "(() => { const s = document.querySelector('.stage'); s.scrollIntoView({behavior: 'instant', block: 'center'});"
        " const r = s.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
    )

    def at(column: float, row: float) -> tuple[int, ...]:
        """The colour of a place in the first pair, in pixels of the image."""
        left, top, width, height = box
        return browser.screenshot().getpixel((left + width * column / SIZE, top + height * row / SIZE))

    wider = (40.5, 20)  # red in the quantized image only
    browser.run(
        "document.querySelector('.cut').value = 0; document.querySelector('.cut').dispatchEvent(new Event('input'))"
    )
    assert at(*wider) == (255, 0, 0)
    set_input(browser, ".cut", 100)
    assert at(*wider) == (128, 128, 128)
    browser.run("document.querySelector('[data-view=difference]').click()")
    assert at(20, 20) == (0, 0, 0)
    assert at(*wider) == (255, 255, 255)  # (127, 128, 128) four times
    browser.run(
        "document.getElementById('gain').value = 0; document.getElementById('gain').dispatchEvent(new Event('input'))"
    )
    assert all(abs(channel - 128) <= 1 for channel in at(*wider))
    assert browser.run("document.getElementById('gain-value').textContent") == "× 1"
    browser.run("document.querySelector('[data-view=side]').click()")
    assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 1
    full, quantized = browser.run(
        "[...document.querySelectorAll('figure:first-child img')].map((image) => image.getBoundingClientRect().left)"
    )
    assert quantized > full + 100


@needs_browser
def test_tables_are_searched_and_sorted(browser: Browser, page: Path) -> None:
    browser.open(page)
    rows = "[...document.querySelectorAll('#layers tbody tr:not([hidden])')].map((row) => row.cells[0].textContent)"
    assert browser.run(rows) == ["embedder", "blocks.0.attn.to_q", "spare"]
    click = "document.querySelectorAll('#layers th')[2].click()"
    browser.run(click)
    assert browser.run(rows) == ["blocks.0.attn.to_q", "embedder", "spare"]  # no number: last
    browser.run(click)
    assert browser.run(rows) == ["embedder", "blocks.0.attn.to_q", "spare"]
    set_input(browser, "#layers input[type=search]", "ATTN int")
    assert browser.run(rows) == []
    set_input(browser, "#layers input[type=search]", "ATTN to_q")
    assert browser.run(rows) == ["blocks.0.attn.to_q"]
    assert browser.run("document.querySelector('#layers output').textContent") == "1 of 3"
    assert browser.run("document.querySelector('#plan details').open") is False
    set_input(browser, "#plan input[type=search]", "gelu")
    assert browser.run("document.querySelector('#plan output').textContent") == "1 of 5"


@needs_browser
def test_what_the_browser_tells_is_true(browser: Browser, tmp_path: Path) -> None:
    """The checks above would notice."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://nowhere.invalid/x.png'><script>console.error('oops'); missing()</script>")
    browser.open(bad)
    assert browser.requests == ["http://nowhere.invalid/x.png"]
    assert any("oops" in error for error in browser.errors)
    assert any("missing is not defined" in error for error in browser.errors)
    attacked = tmp_path / "attacked.html"
    attacked.write_text(
        write_report(attacked, complete())
        .read_text()
        .replace("a large red triangle", "<script>document.title = 1</script>")
    )
    browser.open(attacked)
    assert browser.run("document.title") == "SD3Transformer2DModel, quantized"  # the policy let no other script run
    assert any("Content Security Policy" in error for error in browser.errors)
