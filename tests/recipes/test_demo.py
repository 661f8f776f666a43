"""The demo: the glyph data set is sound, the evaluation is exact, training is repeatable."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support import patience

import demo
import render_glyphs
from cosface_recipes import small_training as training
from cosface_recipes.data.glyphs import load_glyphs, quantise, read_sheet, write_sheet
from cosface_recipes.data.images import Images, load_folder
from cosface_recipes.evaluation.verification import Scores, compare_all
from cosface_recipes.glyphnet import EmbeddingNet, augment

DATA = Path(demo.__file__).parent / "data"
HANGUL = DATA / "hangul"
MANIFEST = json.loads((HANGUL / "manifest.json").read_text(encoding="utf-8"))
SHEETS = {split: part["sheets"] for split, part in MANIFEST["splits"].items()}
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


# The data set


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return request.param, load_glyphs(request.param, HANGUL)


def test_data_set_has_the_promised_counts(split):
    name, images = split
    characters, fonts = {"train": (1763, 21), "test": (587, 5)}[name]
    assert len(images.identities) == characters
    assert images.pixels.shape == (characters * fonts, 1, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.bincount().tolist() == [fonts] * characters
    assert np.bincount(images.pixels.numpy().ravel()).nonzero()[0].tolist() == [0, 85, 170, 255]


def test_no_glyph_is_blank_and_none_occurs_twice(split):
    _, images = split
    assert images.pixels.flatten(1).amax(1).min() > 0
    assert len(images.pixels.flatten(1).unique(dim=0)) == len(images)


def test_characters_are_hangul_syllables_and_each_is_in_one_split():
    train_characters, test_characters = (MANIFEST["splits"][name]["characters"] for name in ("train", "test"))
    together = train_characters + test_characters
    assert len(set(together)) == len(together) == 2350 - len(MANIFEST["rejected"])
    assert set(together) <= set(render_glyphs.ksx1001_syllables())


def test_each_font_family_is_in_one_split():
    families = {name: {sheet["family"] for sheet in sheets} for name, sheets in SHEETS.items()}
    assert len(families["train"]) == 10
    assert len(families["test"]) == 5
    assert not families["train"] & families["test"]
    assert len(SHEETS["test"]) == 5  # one font each, so that every genuine pair is of two families


def test_manifest_lists_the_selected_fonts_and_the_files_that_exist():
    selection = json.loads((DATA / "fonts.json").read_text(encoding="utf-8"))["families"]
    selected = {(family["split"], family["family"], font) for family in selection for font in family["fonts"]}
    assert selected == {(name, s["family"], s["font"]) for name, sheets in SHEETS.items() for s in sheets}
    listed = {sheet["file"] for sheets in SHEETS.values() for sheet in sheets}
    assert listed == {path.relative_to(HANGUL).as_posix() for path in HANGUL.rglob("*.png")}


@pytest.mark.parametrize(
    "sheet", [s for sheets in SHEETS.values() for s in sheets], ids=lambda sheet: sheet["font"]
)
def test_each_sheet_has_its_licence_beside_it(sheet):
    text = (DATA / sheet["licence"]).read_text(encoding="utf-8")
    notice, title, terms = text.partition("SIL OPEN FONT LICENSE")
    assert notice.startswith("Copyright (c)") or ": Copyright (c)" in notice
    assert title
    for part in ("PREAMBLE", "DEFINITIONS", "PERMISSION & CONDITIONS", "TERMINATION", "DISCLAIMER"):
        assert part in terms


def test_data_takes_at_most_6_megabytes():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 6_000_000


def test_a_sheet_comes_back_as_it_was_written(tmp_path):
    glyphs = np.random.default_rng(0).integers(0, 256, (7, 8, 8)).astype(np.uint8)
    for levels in (2, 4, 16, 256):
        expected = quantise(glyphs, levels)
        assert len(np.unique(expected)) <= levels
        write_sheet(tmp_path / "sheet.png", expected, columns=3, levels=levels)
        np.testing.assert_array_equal(read_sheet(tmp_path / "sheet.png", 7, 8, 3), expected)


def test_a_sheet_of_the_wrong_size_is_refused(tmp_path):
    Image.new("L", (24, 16)).save(tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"sheet\.png is 24 x 16 pixels, but 7 glyphs .* take 24 x 24\."):
        read_sheet(tmp_path / "sheet.png", 7, 8, 3)


# Rendering, with fonts that matplotlib ships


def dejavu_selection(folder: Path, notice: str = "Copyright of DejaVu, for this test", **fonts: str) -> Path:
    (folder / "OFL.txt").write_text(f"{notice}\n\nSIL OPEN FONT LICENSE\n")
    fonts = fonts or {"train": "DejaVuSans", "test": "DejaVuSerif"}
    common = {"family": "DejaVu", "licence": "OFL.txt"}
    families = [{**common, "split": split, "fonts": [font]} for split, font in fonts.items()]
    path = folder / "fonts.json"
    path.write_text(json.dumps({"families": families}))
    return path


def render(selection: Path, output: Path, characters: str, fonts: Path = DEJAVU) -> None:
    arguments = ["--fonts", fonts, "--selection", selection, "--output", output, "--characters", characters]
    render_glyphs.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_rendering_is_repeatable_and_rejects_blank_equal_and_missing_glyphs(tmp_path):
    selection = dejavu_selection(tmp_path)
    blank, missing, latin_a, greek_alpha = " ", "\ue123", "A", "\u0391"
    for output in ("once", "again"):
        render(selection, tmp_path / output, f"{latin_a}BCDE{blank}FGH{greek_alpha}IJ{missing}")
    once = contents(tmp_path / "once")
    assert once == contents(tmp_path / "again")
    assert set(once) == {"manifest.json", "train/DejaVuSans.png", "test/DejaVuSerif.png"}
    manifest = json.loads(once["manifest.json"])
    assert manifest["rejected"] == latin_a + blank + greek_alpha + missing
    assert manifest["splits"]["train"]["characters"] == "BCDFGHJ"
    assert manifest["splits"]["test"]["characters"] == "EI"
    images = load_glyphs("train", tmp_path / "once")
    assert images.identities == list("BCDFGHJ")
    assert images.pixels.shape == (7, 1, 32, 32)


def test_a_rendered_glyph_fills_its_cell_but_for_the_margin():
    glyphs = render_glyphs.render(DEJAVU / "DejaVuSans.ttf", 0, "HIl.|", 32)
    together = glyphs.max(0)
    assert np.ptp(np.argwhere(together > 0), axis=0).max() >= 29
    for edge in (together[0], together[-1], together[:, 0], together[:, -1]):
        assert edge.max() <= 64  # of rounding: at most one of the four drawn pixels behind this one
    assert glyphs.max((1, 2)).min() > 128


def test_a_font_without_the_open_font_licence_is_refused(tmp_path):
    selection = dejavu_selection(tmp_path, notice="Copyright of somebody else")
    with pytest.raises(SystemExit, match=r"DejaVuSans .* does not declare the SIL Open Font License"):
        render(selection, tmp_path / "out", "ABCD")
    assert not (tmp_path / "out").exists()


def test_a_missing_font_is_named(tmp_path):
    selection = dejavu_selection(tmp_path, train="DejaVuSans", test="NoSuchFont")
    with pytest.raises(SystemExit, match=r"1 of the 2 fonts were not found: NoSuchFont\."):
        render(selection, tmp_path / "out", "ABCD")


def test_two_fonts_that_draw_the_same_are_refused(tmp_path):
    fonttools = pytest.importorskip("fontTools.ttLib")
    for name in ("One", "Two"):
        with fonttools.TTFont(DEJAVU / "DejaVuSansMono.ttf") as font:
            font["name"].setName(name, 6, 3, 1, 0x409)
            font["name"].setName(name, 6, 1, 0, 0)
            font.save(tmp_path / f"{name}.ttf")
    selection = dejavu_selection(tmp_path, train="One", test="Two")
    with pytest.raises(SystemExit, match="fonts One and Two draw the same glyphs"):
        render(selection, tmp_path / "out", "ABCD", fonts=tmp_path)


# Evaluation


def scores(genuine: list[float], impostor: list[float]) -> Scores:
    return Scores(torch.tensor(genuine), torch.tensor(impostor), rank1=math.nan)


def test_tar_at_far_by_hand():
    s = scores([0.9, 0.6, 0.4, 0.2], [0.8, 0.5, 0.3, 0.1])
    assert s.tar_at_far(0.25) == 0.5  # 0.8 may pass, so the threshold is 0.5
    assert s.tar_at_far(0.49) == 0.5
    assert s.tar_at_far(0.5) == 0.75
    assert s.tar_at_far(1.0) == 1.0
    assert math.isnan(s.tar_at_far(0.2))  # 4 impostors cannot show a rate of 1 in 5


def test_equal_impostors_never_pass_more_often_than_allowed():
    s = scores([0.9, 0.5], [0.5, 0.5, 0.1, 0.1])
    assert s.tar_at_far(0.25) == 0.5  # a threshold at 0.5 passes no impostor; below it, two


def test_far_times_the_number_of_impostors_is_not_rounded_down():
    descending = [1 - i / 1000 for i in range(1000)]
    assert scores([0.9985], descending).tar_at_far(1e-3) == 0.0
    assert scores([0.9995], descending).tar_at_far(1e-3) == 1.0


def test_roc_runs_from_one_impostor_to_all():
    far, tar = scores([0.9, 0.6, 0.4, 0.2], [0.8, 0.5, 0.3, 0.1]).roc(points=3)
    assert far == pytest.approx([0.25, 0.5, 1.0])
    assert tar == [0.5, 0.75, 1.0]


def at_angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_compare_all_by_hand():
    lengths = torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    result = compare_all(at_angles(0, 20, 30, 90) * lengths, torch.tensor([0, 0, 1, 1]))
    cosines = {angle: math.cos(math.radians(angle)) for angle in (10, 20, 30, 60, 70, 90)}
    assert result.genuine.tolist() == pytest.approx([cosines[20], cosines[60]])
    assert result.impostor.tolist() == pytest.approx(
        [cosines[10], cosines[30], cosines[70], cosines[90]], abs=1e-6
    )
    # 0 finds 20, and 90 finds 30; the nearest to 20 is 30, and the nearest to 30 is 20.
    assert result.rank1 == 0.5


def test_compare_all_equals_plain_loops():
    torch.manual_seed(0)
    n = 300  # more than one block of rows
    embeddings, labels = torch.randn(n, 3), torch.randint(40, (n,))
    result = compare_all(embeddings, labels)
    unit = torch.nn.functional.normalize(embeddings)
    cosine, identity = (unit @ unit.T).tolist(), labels.tolist()
    genuine, impostor, hits = [], [], []
    for i in range(n):
        best_other = max(cosine[i][j] for j in range(n) if identity[j] != identity[i])
        for j in range(n):
            if identity[i] == identity[j] and i != j:
                hits.append(cosine[i][j] > best_other)
            if i < j:
                (genuine if identity[i] == identity[j] else impostor).append(cosine[i][j])
    torch.testing.assert_close(result.genuine, torch.tensor(genuine).sort(descending=True).values)
    torch.testing.assert_close(result.impostor, torch.tensor(impostor).sort(descending=True).values)
    assert result.rank1 == pytest.approx(sum(hits) / len(hits), abs=2 / len(hits))


def test_compare_all_needs_both_kinds_of_pairs():
    with pytest.raises(ValueError, match="2 test images of 2 identities make 0 genuine and 1 impostor pairs"):
        compare_all(torch.eye(2), torch.tensor([0, 1]))


# Training


def tiny(split: str, characters: int, fonts: int) -> Images:
    """The first characters of the first fonts."""
    images = load_glyphs(split, HANGUL)
    total = len(images.identities)
    rows = torch.arange(len(images)).reshape(-1, total)[:fonts, :characters].flatten()
    return Images(images.pixels[rows], images.labels[rows], images.identities[:characters])


ROWS = ("untrained network", "plain softmax", "CosFace")
TINY = training.Recipe(epochs=2, batch_size=32, embedding_size=16)


@pytest.mark.parametrize("name", ["plain softmax", "CosFace"])
def test_the_same_seed_gives_the_same_network_and_scores(name):
    images, test = tiny("train", 24, 8), tiny("test", 24, 3)
    make_head = training.make_heads(TINY, 24)[name]
    runs = []
    for seed in (0, 0, 1):
        network, seconds, losses = training.train(replace(TINY, seed=seed), images, make_head, name)
        assert seconds > 0
        assert len(losses) == 12
        runs.append((network.state_dict(), compare_all(network.embed(test.pixels), test.labels)))
    (weights, first), (same_weights, same), (other_weights, _) = runs
    assert all(torch.equal(weights[key], same_weights[key]) for key in weights)
    assert torch.equal(first.genuine, same.genuine)
    assert torch.equal(first.impostor, same.impostor)
    assert first.rank1 == same.rank1
    assert not all(torch.equal(weights[key], other_weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["plain softmax", "CosFace"])
def test_training_brings_the_images_of_an_identity_together(name):
    images = tiny("train", 20, 8)
    recipe = replace(TINY, epochs=9, learning_rate=0.02, embedding_size=32, margin=0.1, scale=8.0)
    untrained = training.make_network(recipe, images)
    trained, _, _ = training.train(recipe, images, training.make_heads(recipe, 20)[name], name)
    before, after = (compare_all(net.embed(images.pixels), images.labels) for net in (untrained, trained))
    assert after.rank1 > 3 * before.rank1


def test_augmentation_is_seeded_and_starts_from_the_image():
    images = tiny("train", 4, 1).pixels
    once, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, images.float())
    unchanged = augment(images, torch.Generator(), strength=0.0)
    torch.testing.assert_close(unchanged, images.float(), atol=0.01, rtol=0)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 32), (3, 50)])
def test_network_takes_other_sizes_and_colours(channels, size):
    images = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    assert EmbeddingNet(channels, 7)(images).shape == (2, 7)


def test_learning_rate_rises_and_falls_to_zero():
    factors = [training.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.9
    assert factors[100] == pytest.approx(0)
    assert factors[9:] == sorted(factors[9:], reverse=True)


# A folder of images


@pytest.fixture
def folder(tmp_path):
    """Twelve identities of a colour each, with three noisy images, and one identity with a single image."""
    random = np.random.default_rng(0)
    for identity in range(13):
        path = tmp_path / "people" / f"id{identity:02}"
        path.mkdir(parents=True)
        pattern = random.integers(0, 256, (6, 6, 3))
        for sample in range(3 if identity else 1):
            noisy = pattern + random.normal(0, 20, pattern.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.resize((20, 24 + sample)).save(path / f"{sample}.png")
    (tmp_path / "people" / "notes.txt").write_text("not an identity")
    (tmp_path / "people" / "empty").mkdir()
    return tmp_path / "people"


@pytest.mark.parametrize(("color", "channels"), [("gray", 1), ("rgb", 3)])
def test_folder_holds_whole_identities_out(folder, color, channels):
    train_images, test = load_folder(folder, size=16, color=color, test_fraction=0.25)
    assert test.identities == ["id04", "id08", "id12"]
    assert train_images.identities == [f"id{i:02}" for i in range(13) if i not in (4, 8, 12)]
    assert train_images.pixels.shape == (9 * 3 + 1, channels, 16, 16)
    assert train_images.labels.bincount().tolist() == [1] + [3] * 9
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


RUN_TWICE = """
import runpy, sys
script, first, second, *options = sys.argv[1:]
for output in first, second:
    sys.argv = [script, "--output", output, *options]
    runpy.run_path(script, run_name="__main__")
    print("END OF RUN")
"""


def test_few_images_get_enough_steps_to_learn_from(tmp_path, capsys):
    """With 8 steps, an epoch count for 37,023 images, both heads ended below the untrained network."""
    images = tiny("train", 20, 6)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        path = tmp_path / "people" / f"id{label:02}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(path)
    demo.main(["--data", str(path.parent.parent), "--output", str(tmp_path / "roc.png")])
    printed = capsys.readouterr().out
    assert "96 images of 16 identities, 100 times" in printed
    rank1 = {row: float(re.search(rf"^{row} +(\S+) %", printed, re.MULTILINE)[1]) for row in ROWS}
    assert rank1["CosFace"] > rank1["untrained network"]
    assert "Warning: 216 impostor pairs are too few for a FAR of 0.01 or less: 2 of them may pass there" in printed
    assert printed.count("Warning") == 1 + (rank1["plain softmax"] < rank1["untrained network"])


@pytest.mark.parametrize(
    ("images", "epochs"), [(96, 100), (2, 200), (4_000, 4), (37_023, 4), (159_000, 4), (400_000, 1), (10**7, 1)]
)
def test_the_number_of_passes_follows_the_data(images, epochs):
    assert training.epochs_for(images, batch_size=64) == epochs
    assert training.epochs_for(images, batch_size=64) * math.ceil(images / 64) >= training.FEWEST_STEPS


def test_a_table_that_means_little_says_so():
    descending = [1 - i / 3000 for i in range(3000)]
    few, many = scores([0.9], descending[:2999]), scores([0.9], descending * 100)
    good, bad = (lambda s, r=r: replace(s, rank1=r) for r in (0.8, 0.2))
    fallen, flat = [3.0] * 100 + [1.0] * 100, [3.0] * 200

    def doubts(pairs, *trained):
        rows = [demo.Row("untrained network", replace(pairs, rank1=0.5))]
        return demo.doubts(
            [*rows, *(demo.Row("CosFace", rated(pairs), losses=losses) for rated, losses in trained)], 16
        )

    assert doubts(many, (good, fallen)) == []
    assert ["too short" in text for text in doubts(many, (good, fallen), (good, [1.0] * 8))] == [True]
    (text,) = doubts(many, (good, flat))
    assert "The loss of CosFace is 3.00 at the end; to guess among 16 identities costs 2.77" in text
    (text,) = doubts(many, (bad, fallen))
    assert text.startswith("CosFace finds fewer of the held-out identities than the untrained network")
    (text,) = doubts(few, (good, fallen))
    assert text.startswith("2,999 impostor pairs are too few for a FAR of 0.01 or less: 29 of them may pass there")


def test_the_script_prints_the_same_table_twice(folder, tmp_path):
    curves = [tmp_path / name / "roc.png" for name in ("first", "second")]
    # 28 training images in batches of 9: the last batch has one image, and is left out.
    options = "--epochs=2 --batch-size=9 --embedding-size=8 --image-size=16 --color=rgb --test-fraction=0.25"
    arguments = [demo.__file__, *curves, "--data", folder, *options.split()]
    command = [sys.executable, "-c", RUN_TWICE, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=patience(300))
    assert result.returncode == 0, result.stderr
    assert "loss=" in result.stderr
    for path in curves:
        with Image.open(path) as image:
            assert image.format == "PNG"
    runs = result.stdout.split("END OF RUN")[:2]
    assert "All pairs of test images: 9 genuine, 27 impostor." in runs[0]
    assert "n/a" in runs[0]  # 27 impostors cannot show a rate of 1e-2
    assert "Warning: A training of 6 steps is too short to mean anything: it takes at least 200" in runs[0]
    for row in ROWS:
        rank1 = [re.search(rf"^{row} +(\S+ %)", run, re.MULTILINE)[1] for run in runs]
        assert rank1[0] == rank1[1]


def test_a_corrupt_image_is_named(folder):
    (folder / "id05" / "bad.png").write_bytes((folder / "id05" / "0.png").read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"The image .*id05.bad\.png cannot be read: "):
        demo.main(["--data", str(folder)])


def test_a_folder_with_too_few_identities_says_so(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "only" / "1.png")
    with pytest.raises(SystemExit, match=r"has 1 identities .* 0 of them with two images .* at least 10"):
        demo.main(["--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data /no/such/folder", r"The image folder .no.such.folder does not exist or is not a folder\."),
        ("--epochs 0", r"epochs must be at least 1, got 0\."),
        ("--batch-size 1", r"batch_size must be at least 2, got 1\."),
        ("--embedding-size -4", r"embedding_size must be at least 1, got -4\."),
        ("--seed -1", r"seed must be at least 0, got -1\."),
        ("--learning-rate 0", r"learning_rate must be positive and finite, got 0\.0\."),
        ("--weight-decay -1", r"weight_decay must be at least 0 and finite, got -1\.0\."),
        ("--scale nan", r"scale must be positive and finite, got nan\."),
        ("--margin inf", r"margin must be finite, got inf\."),
        ("--output curves.gif", r"output must end in \.png, .* got curves\.gif\."),
        ("--threads 0", r"threads must be at least 1, got 0\."),
        ("--image-size 0 --data .", r"image_size must be at least 8, got 0\."),
        ("--test-fraction 0.7 --data .", r"test_fraction must be above 0 and at most 0\.5, got 0\.7\."),
    ],
)
def test_bad_options_are_refused_with_their_value(arguments, message):
    with pytest.raises(SystemExit, match=message):
        demo.main(arguments.split())


def test_a_diverging_loss_stops_the_training():
    recipe = replace(TINY, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"loss of CosFace became \w+ at step \d+ of 12; .* below 1e\+30"):
        training.train(recipe, tiny("train", 24, 8), training.make_heads(recipe, 24)["CosFace"], "CosFace")


def test_peak_memory_is_that_of_the_largest_moment():
    program = (
        "import torch; from cosface_recipes.memory import peak_extra_bytes\n"
        "def step():\n"
        "    for megabytes in (8, 24, 16):\n"
        "        torch.ones(megabytes << 18).sum()\n"
        "print(peak_extra_bytes(step))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(60),
    )
    if result.stdout.strip() == "None":
        pytest.skip("This system does not count resident pages.")
    assert int(result.stdout) / 2**20 == pytest.approx(24, abs=2)
