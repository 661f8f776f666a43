"""Rendering identities in many fonts: fonts that lie are left out, families stay in one split."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont

import render_hangul
from cosface_recipes.data.image_datasets import open_dataset
from cosface_recipes.data.recordio import RecordFile

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def save(font: str, path: Path, name: str, family: str, characters: dict[str, str] | None = None) -> None:
    """A copy of a DejaVu font under another name; its map leads from these characters to the glyphs of others."""
    with TTFont(DEJAVU / f"{font}.ttf") as face:
        for record, text in ((1, family), (6, name)):
            face["name"].setName(text, record, 3, 1, 0x409)
            face["name"].setName(text, record, 1, 0, 0)
        for table in face["cmap"].tables:
            original = dict(table.cmap)
            for character, drawn in (characters or {}).items():
                if ord(character) in original:
                    table.cmap[ord(character)] = original[ord(drawn)]
        face.save(path / f"{name}.ttf")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    save("DejaVuSans", folder, "SansBook", "Sans")
    save("DejaVuSans-Bold", folder, "SansBold", "Sans Bold")
    save("DejaVuSansMono", folder, "MonoBook", "Typewriter")
    save("DejaVuSansMono-Bold", folder, "MonoBold", "Typewriter Bold")
    save("DejaVuSerif", folder, "SerifBook", "Serif")
    save("DejaVuSerif-Bold", folder, "SerifBold", "Serif Bold")
    save("DejaVuSans", folder, "Twin", "Twin")
    save("DejaVuSans", folder, "Blank", "Blank", {"C": " "})
    save("DejaVuSans", folder, "Repeats", "Repeats", {"C": "D"})
    rotated = LETTERS[5:] + LETTERS[:5]
    save("DejaVuSans", folder, "Shuffled", "Shuffled", dict(zip(LETTERS, rotated, strict=True)))
    return folder


def render(fonts: Path, output: Path, *options: str) -> dict:
    arguments = ["--fonts", str(fonts), "--output", str(output), "--characters", LETTERS, "--probes", LETTERS]
    sizes = ["--train", "16", "--test", "6", "--test-families", "Serif", "--processes", "2"]
    render_hangul.main([*arguments, *sizes, *options])
    return json.loads((output / "manifest.json").read_text(encoding="utf-8"))


def test_fonts_that_lie_are_left_out_and_families_are_in_one_split(fonts, tmp_path, capsys):
    manifest = render(fonts, tmp_path)
    out = capsys.readouterr().out
    assert "Twin is left out: it draws as SansBook." in out
    assert "Blank is left out: of 24 probes, 1 are blank or like another." in out
    assert "Repeats is left out: of 24 probes, 2 are blank or like another." in out
    assert "Shuffled is left out: its glyphs are not those of the other fonts" in out
    families = {
        split: {f: sorted(names) for f, names in part["families"].items()} for split, part in manifest.items()
    }
    assert families == {
        "train": {"Sans": ["SansBold", "SansBook"], "Typewriter": ["MonoBold", "MonoBook"]},
        "test": {"Serif": ["SerifBold", "SerifBook"]},
    }
    characters = [manifest[split]["characters"] for split in ("train", "test")]
    assert [len(set(text)) for text in characters] == [16, 6]
    assert not set(characters[0]) & set(characters[1])
    assert "train: 64 images of 16 identities, in 4 fonts of 2 families: Typewriter, Sans" in out
    file = RecordFile(tmp_path / "train")
    assert file.num_classes == 16
    assert np.bincount(file.labels).tolist() == [4] * 16


def test_records_and_folders_hold_the_same_images(fonts, tmp_path):
    manifest = render(fonts, tmp_path / "rec")
    assert render(fonts, tmp_path / "folders", "--format", "folders") == manifest
    for split, count in (("train", 64), ("test", 12)):
        records, folders = (open_dataset(tmp_path / form / split, color="gray") for form in ("rec", "folders"))
        assert len(records) == len(folders) == manifest[split]["images"] == count
        assert folders.identities == sorted(f"{ord(c):04X}" for c in manifest[split]["characters"])
        sets = [{(image.tobytes(), label) for image, label in data} for data in (records, folders)]
        assert sets[0] == sets[1]
        assert len(sets[0]) == count
        assert {image.size for image, _ in folders} == {(32, 32)}


def test_agreement_tells_the_right_glyphs_from_others():
    random = np.random.default_rng(0)
    shapes = random.integers(0, 256, (40, 8, 8)).repeat(4, 1).repeat(4, 2)
    noisy = np.clip(shapes + random.normal(0, 30, (5, *shapes.shape)), 1, 255).astype(np.uint8)
    noisy[4] = noisy[4, random.permutation(40)]
    agreed = render_hangul.agreement(noisy)
    assert agreed[:4].min() > 0.95
    assert agreed[4] < 0.65


@pytest.mark.parametrize(
    ("names", "design"),
    [
        (
            ("NanumBarunGothic", "NanumBarunGothic YetHangul", "NanumBarunGothic UltraLight", "D2Coding ligature"),
            None,
        ),
        (("NanumGothic", "NanumGothicExtraBold", "NanumGothic Eco ExtraBold", "NanumGothicCoding"), None),
        (("Noto Sans CJK KR", "Noto Sans Mono CJK JP"), None),
        (("NanumSquare", "NanumSquareRound Bold", "NanumSquare_ac Light"), None),
        (("Nanum Pen Script",), "NanumPen"),
        (("Nanum Brush Script",), "NanumBrush"),
    ],
)
def test_weights_and_variants_are_of_one_family(names, design):
    designs = {render_hangul.family_of(name) for name in names}
    assert len(designs) == 1
    assert design is None or designs == {design}


def test_too_few_fonts_or_characters_are_refused(fonts, tmp_path):
    with pytest.raises(SystemExit, match=r"0 fonts are left for test, of the families Sans, Serif, Typewriter;"):
        render(fonts, tmp_path, "--test-families", "Batang")
    with pytest.raises(SystemExit, match=r"100 \+ 6 identities are more than the 24 characters"):
        render(fonts, tmp_path, "--train", "100")
    with pytest.raises(SystemExit, match=r"0 fonts are left for train, of the families none"):
        render(tmp_path, tmp_path)
