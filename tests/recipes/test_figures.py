"""The figures: gaps grow with the margin, curves are those of the margins, nothing covers the data."""

import json
import math
from itertools import pairwise

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

import figures


@pytest.fixture(autouse=True)
def style():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other longer than the toy's layers take
    with plt.rc_context(figures.STYLE):
        yield
    torch.set_num_threads(threads)
    plt.close("all")


def test_gaps_by_hand():
    around = torch.linspace(-10, 10, 201)  # of which 5 % lie beyond 9 degrees, on either side
    means = torch.tensor([170.0, 0.0, 60.0, 250.0])
    angle = (means[:, None] + around).deg2rad().flatten()
    features = torch.stack([angle.cos(), angle.sin()], 1) * torch.rand(len(angle), 1).add(1)
    gaps = figures.gaps_between(features, torch.arange(4).repeat_interleave(201))
    expected = torch.tensor([42.0, 92.0, 62.0, 92.0], dtype=torch.float64)
    torch.testing.assert_close(gaps.sort().values, expected.sort().values, atol=1e-3, rtol=0)


def test_gaps_of_identities_that_overlap_are_negative():
    angle = torch.cat([torch.linspace(0, 1, 101), torch.linspace(0.5, 1.5, 101), torch.linspace(3, 4, 101)])
    features = torch.stack([angle.cos(), angle.sin()], 1)
    gaps = figures.gaps_between(features, torch.arange(3).repeat_interleave(101))
    assert gaps.min().item() == pytest.approx(math.degrees(-0.4), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*Eq. [67]")
def test_gaps_between_identities_grow_with_the_margin():
    _, gaps = figures.toy(steps=150)
    _, *with_margin = gaps.values()
    for smaller, larger in pairwise(with_margin):
        assert larger.mean() > smaller.mean() + 0.5
        assert larger.min() > smaller.min()


def test_decisions_leave_the_margin_to_neither_class():
    figure = figures.decision_margins()
    shares = {}
    for axes in figure.axes[:5]:
        first = axes.collections[0].get_paths()[0]
        assert first.contains_point((0.9, -0.9))
        assert not first.contains_point((-0.9, 0.9))
        shares[axes.get_title()] = first.contains_point((0.2, 0.1))
    assert list(shares.values()) == [True, True, False, False, False]
    in_angle = figure.axes[9].collections[0].get_paths()[0]  # ArcFace: theta_1 + 28.6 < theta_2
    assert in_angle.contains_point((60, 90))
    assert not in_angle.contains_point((60, 87))


def test_target_logits_are_those_of_the_formulas():
    *of_target, of_others = figures.target_logits().axes
    curves = {line.get_label(): line.get_xydata() for axes in of_target for line in axes.lines}
    for name, psi in {
        "NSL": lambda t: math.cos(t),
        "CosFace, $m = 0.35$": lambda t: math.cos(t) - 0.35,
        "ArcFace, $m = 0.5$": lambda t: math.cos(t + 0.5),
        r"A-Softmax, $m = 4$, $\lambda = 5$": lambda t: (-math.cos(4 * t) - 2 + 5 * math.cos(t)) / 6,
        "AdaFace, norm at the mean": lambda t: math.cos(t) - 0.4,
        "AdaFace, norm 3 deviations above the mean": lambda t: math.cos(t - 0.4) - 0.8,
        "MagFace, norm 110": lambda t: math.cos(t + 0.8),
        "KappaFace, class of weight 0.8": lambda t: math.cos(t + 0.64),
    }.items():
        x, y = curves[name][480]  # 60 degrees
        assert x == pytest.approx(60)
        assert y == pytest.approx(psi(math.pi / 3), abs=1e-3)
    curves = {line.get_label(): line.get_xydata() for line in of_others.lines}
    for name, threshold, reshaped in (
        ("CurricularFace, $t = 0.3$", math.cos(math.pi / 3 + 0.5), lambda c: c * (0.3 + c)),
        ("MV-Softmax, $t = 0.2$", 0.5 - 0.35, lambda c: 1.2 * c + 0.2),
        ("inter-class filter, above 0.4", 0.4, lambda c: 0),
    ):
        x, y = curves[name][240]  # 30 degrees
        assert y == pytest.approx(reshaped(math.cos(math.radians(x))))
        assert curves[name][-1, 0] == pytest.approx(math.degrees(math.acos(threshold)), abs=0.2)


def test_the_sweep_shows_each_training_and_their_mean(monkeypatch):
    def measured(trials, results, processes):
        return [
            dict.fromkeys(
                ("accuracy", "rank-1", "TAR@FAR=1e-4"), trial.setting["margin"] + 0.1 * trial.recipe.seed
            )
            for trial in trials
        ]

    monkeypatch.setattr(figures, "run_all", measured)
    axes = figures.margin_sweep(seeds=3).axes[0]
    *_, mean = axes.lines
    assert mean.get_xdata() == pytest.approx([0.05 * i for i in range(10)])
    assert mean.get_ydata() == pytest.approx([5 * i + 10 for i in range(10)])
    assert axes.lines[2].get_ydata() == pytest.approx([5 * i + 20 for i in range(10)])


@pytest.mark.filterwarnings("ignore:.*Eq. [67]")
@pytest.mark.parametrize(
    "draw",
    [figures.decision_margins, figures.target_logits, lambda: figures.toy(steps=2)[0]],
    ids=["decision-margins", "target-logits", "toy"],
)
def test_no_legend_or_title_covers_data_or_leaves_the_figure(draw):
    figure = draw()
    figure.canvas.draw()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    outside = [legend.get_window_extent() for legend in legends] + [
        axes.title.get_window_extent() for axes in figure.axes
    ]
    for box in outside:
        assert not any(axes.bbox.padded(-1).overlaps(box) for axes in figure.axes)
        assert figure.bbox.padded(1).contains(box.x0, box.y0)
        assert figure.bbox.padded(1).contains(box.x1, box.y1)


def test_the_command_writes_a_png(tmp_path, capsys):
    figures.main(["decision-margins", "--output", str(tmp_path / "deep")])
    path = tmp_path / "deep" / "decision-margins.png"
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 2000


def test_density_has_the_share_where_dense_wins(tmp_path):
    """Steps of 0.5 + 2 x share seconds against one of 1.5: even at a half."""
    size = {"classes": 1000, "batch": 8, "dim": 16}
    rows = [{**size, "path": "exact", "tolerance": 0.0, "kept": 1.0, "median_s": 1.5}]
    rows += [
        {**size, "path": "sparse", "tolerance": 10 * kept, "kept": kept, "median_s": 0.5 + 2 * kept}
        for kept in (1e-3, 1e-2, 0.1)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    (axes,) = figures.sparse_density(file).axes
    assert [text.get_text() for text in axes.texts] == ["dense wins\nbeyond 50 %"]
    assert "exact" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_growth_has_the_rows_of_the_bench(tmp_path):
    rows = [
        {"impl": impl, "classes": classes, "dtype": dtype, "median_s": seconds, "peak_extra_mib": mib}
        for impl, classes, dtype, seconds, mib in (
            ("fused+FusedSGD", 300, "float32", 3.0, 6.0),
            ("fused+FusedSGD", 100, "float32", 1.0, 5.0),
            ("fused+FusedSGD", 300, "bfloat16", 9.0, 9.0),
            ("pml+SGD", 100, "float32", 5.0, 900.0),
        )
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    memory, time = figures.growth(file).axes
    assert [line.get_xydata().tolist() for line in memory.lines] == [[[100, 5], [300, 6]], [[100, 900]]]
    assert [line.get_xydata().tolist() for line in time.lines] == [[[100, 1], [300, 3]], [[100, 5]]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("margin-sweep", "--seeds", "0"), "argument --seeds: '0' is not a positive whole number."),
        (("margin-sweep", "--seeds", "-1"), "argument --seeds: '-1' is not a positive whole number."),
        (("toy", "--output", "text"), "text is no folder."),
        (("growth", "--rows", "missing"), "No such file or directory: 'missing'"),
        (("growth", "--rows", "."), "Is a directory: '.'"),
        (("growth", "--rows", "text"), "text is no JSON: Expecting value"),
        *(
            ((name, "--rows", file), f"{file} has no row of `python -m bench` with ")
            for name in ("growth", "sparse-density")
            for file in ("no-rows", "mapping", "other-rows")
        ),
        (("growth", "--rows", "half"), "half has no row in float32 of fused+FusedSGD, "),
        (
            ("sparse-density", "--rows", "half"),
            "half needs rows of the sparse path and of tolerance 0 for 9 classes.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nothing_is_drawn_of_nothing(options, sentence, tmp_path, monkeypatch, capsys):
    """And what cannot be written is said before `toy` trains."""
    half = {"impl": "pml", "classes": 9, "batch": 8, "dim": 4, "dtype": "bfloat16", "path": "sparse", "kept": 0.1}
    half |= {"tolerance": 0.1, "median_s": 1.0, "peak_extra_mib": 1.0}
    rows = {"no-rows": [], "mapping": {"a": half}, "other-rows": [1, {**half, "median_s": None}], "half": [half]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "toy", lambda: pytest.fail("toy was trained"))
    monkeypatch.setattr(figures, "run_all", lambda *_: [])
    (tmp_path / "text").write_text("text")
    for name, content in rows.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        figures.main(["--output", "drawn", *options])
    assert sentence in f"{end.value.code} {capsys.readouterr().err}"
    assert not list(tmp_path.rglob("*.png"))
