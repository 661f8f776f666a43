"""IJB's 1:N protocol with its two galleries: by hand, and by its definition on the matrix of all similarities."""

import json
import math

import numpy as np
import pytest
from support.evaluation import colour_of, directions, encoded, evaluate, printed, write_ijb

from cosface_recipes.evaluation import reports
from cosface_recipes.evaluation.collect import read_ijb_searches
from cosface_recipes.evaluation.features import save_features

GALLERY_1 = {0: 1, 90: 2}  # subjects by the angles of their templates
GALLERY_2 = {200: 3, 290: 4}
PROBES = {
    **dict.fromkeys([5, 10, 15, 20, 60], 1),
    **dict.fromkeys([95, 100, 105, 110, 172], 2),
    **dict.fromkeys([205, 210, 215, 220, 225], 3),
    **dict.fromkeys([285, 280, 275, 270, 250], 4),
}


def write_subjects(path, templates: dict[int, int]) -> None:
    """A template is numbered by its angle, and has two images."""
    lines = [f"{template},{subject},img/{i}.png,7" for template, subject in templates.items() for i in (1, 2)]
    path.write_text("\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID", *lines]) + "\n")


@pytest.fixture(params=["G", "S"], ids=["ijbc", "ijbb"])
def ijb(request, tmp_path):
    """A folder of metadata, and features: a template has a video with frames 8 degrees to its left and right."""
    angles = [*GALLERY_1, *GALLERY_2, *PROBES]
    write_ijb(tmp_path / "IJB", [(angle, 3, 1.0) for angle in angles for _ in range(2)], [])
    for number, gallery in ((1, GALLERY_1), (2, GALLERY_2)):
        write_subjects(tmp_path / "IJB" / "meta" / f"ijbb_1N_gallery_{request.param}{number}.csv", gallery)
    write_subjects(tmp_path / "IJB" / "meta" / "ijbb_1N_probe_mixed.csv", PROBES)
    features = directions(*(angle + turn for angle in angles for turn in (-8, 8)))
    save_features(tmp_path / "x.npz", {"features": features})
    return tmp_path


def test_two_galleries_by_hand(ijb, capsys):
    """In gallery 1, the probe of 1 at 60 degrees is nearer to 2, and that of 2 at 172 is 82 degrees away.

    Its non-mated probes are nearest at 75 and 80 degrees: at FPIR 0.1 one of the ten passes, and the threshold is
    at 80. In gallery 2 every mate is nearest, at most 40 degrees away, and the threshold at 75.
    """
    options = ["--features", ijb / "x.npz", "--data", ijb / "IJB", "--target", "ijbb"]
    figures = ["--json", ijb / "x.json", "--roc", ijb / "roc.png", "--cmc", ijb / "cmc.png"]
    evaluate("--protocol", "ijb-1n", *options, *figures)
    rows = json.loads((ijb / "x.json").read_text())
    assert (rows["templates"], rows["probes"]) == (24, 20)
    for number, rank_1, tpir in ((1, 0.9, 0.8), (2, 1.0, 1.0)):
        row = {name.removeprefix(f"gallery {number}: "): value for name, value in rows.items()}
        assert (row["subjects"], row["mated probes"], row["non-mated probes"]) == (2, 10, 10)
        assert (row["rank-1"], row["rank-5"], row["rank-10"]) == (rank_1, 1.0, 1.0)
        assert row["TPIR@FPIR=0.1"] == tpir
        assert row["TPIR@FPIR=0.01"] is None
    assert (rows["mean rank-1"], rows["mean TPIR@FPIR=0.1"]) == pytest.approx((0.95, 0.9))
    assert min((ijb / name).stat().st_size for name in ("roc.png", "cmc.png")) > 1000
    assert printed(capsys)["gallery 2: TPIR@FPIR=0.01"] == "n/a"


def test_two_galleries_by_definition():
    """Templates as in insightface's image2template_feature, searches as NIST defines them, as loops in float64."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(60, 12))
    subject = np.concatenate([np.arange(60), random.integers(0, 60, 900)])  # of each template; 60 are enrolled
    templates = np.repeat(np.arange(960) * 3 + 5, 4)
    features = (np.repeat(centres[subject], 4, 0) + 2.2 * random.normal(size=(3840, 12))).astype(np.float32)
    media, scores = random.integers(0, 3, 3840), random.random(3840).astype(np.float32)
    about = np.stack([np.unique(templates), subject], 1)
    arrays = {"features": features, "templates": templates, "media": media, "scores": scores}
    arrays |= {"gallery_1": about[:35], "gallery_2": about[35:60], "probes": about[60:]}
    rows = reports.report_ijb_search(arrays).rows

    def embedding(template):
        total = np.zeros(12)
        for medium in set(media[templates == template]):
            frames = (templates == template) & (media == medium)
            total += np.mean(features[frames] * scores[frames, None].astype(float), 0)
        return total / np.sqrt(np.sum(total**2))

    unit = np.array([embedding(template) for template in about[:, 0]])
    for number, part in ((1, slice(0, 35)), (2, slice(35, 60))):
        similarity, enrolled = unit[60:] @ unit[part].T, subject[part]
        mated = np.isin(subject[60:], enrolled)
        order = enrolled[np.argsort(-similarity, 1)]
        for k in (1, 5, 10):
            hits = [label in row[:k] for label, row in zip(subject[60:][mated], order[mated], strict=True)]
            assert rows[f"gallery {number}: rank-{k}"] == np.mean(hits)
        maxima = np.sort(similarity[~mated].max(1))[::-1]
        for fpir in (0.01, 0.1):
            threshold = maxima[math.floor(fpir * len(maxima))]
            assert np.mean(maxima > threshold) <= fpir
            found = (order[mated][:, 0] == subject[60:][mated]) & (similarity[mated].max(1) > threshold)
            assert 0 < rows[f"gallery {number}: TPIR@FPIR={fpir:g}"] == np.mean(found) < 1


def test_two_galleries_with_an_exported_model(ijb, exported, capsys):
    (ijb / "IJB" / "loose_crop").mkdir()
    for i in range(48):
        (ijb / "IJB" / "loose_crop" / f"{i + 1}.png").write_bytes(encoded(colour_of(i // 2, i % 2), 112))
    options = ["--data", ijb / "IJB", "--target", "ijbb", "--save", ijb / "saved.npz"]
    evaluate("--protocol", "ijb-1n", "--model", exported, *options)
    output = capsys.readouterr().out
    evaluate("--protocol", "ijb-1n", "--features", ijb / "saved.npz")
    assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"gallery_G1\.csv .*the titles should begin with TEMPLATE_ID,SUBJECT_ID, got ''"),
        ("1,2,img/1.png\n3,4,img/2.png\n", r"gallery_G1\.csv .* TEMPLATE_ID,SUBJECT_ID, got '1,2'"),
        ("SUBJECT_ID,TEMPLATE_ID\n1,2\n", r"gallery_G1\.csv .*, got 'SUBJECT_ID,TEMPLATE_ID'"),
        ("TEMPLATE_ID,SUBJECT_ID\n", r"gallery_G1\.csv has no line below its titles"),
        ("TEMPLATE_ID,SUBJECT_ID\n1,Ann\n", r"Lines of .*gallery_G1\.csv should begin with two numbers"),
        ("TEMPLATE_ID,SUBJECT_ID\n1\n", r"Lines of .*gallery_G1\.csv should begin with two numbers"),
        (None, r"meta has neither ijbc_1N_gallery_G1\.csv nor \.\.\._S1\.csv"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path, content, message):
    (tmp_path / "meta").mkdir()
    if content is not None:
        (tmp_path / "meta" / "ijbc_1N_gallery_G1.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_ijb_searches(tmp_path, "ijbc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery_1": [[0, 1], [90, 2], [0, 3]]}, "Template 0 of gallery_1 in .* is of more than one subject"),
        ({"probes": [[5, 1], [205, 3], [5, 2]]}, "Template 5 of probes in .* is of more than one subject"),
        ({"gallery_2": [[200, 3], [290, 2]]}, "Subject 2 is in both galleries of .* should share none"),
    ],
)
@pytest.mark.parametrize("source", ["files", "arrays"])
def test_searches_without_a_meaning_are_refused_from_every_source(ijb, change, message, source):
    tables = {"gallery_1": GALLERY_1, "gallery_2": GALLERY_2, "probes": PROBES}
    rows = {name: np.array([*table.items()]) for name, table in tables.items()}
    rows |= {name: np.array(table) for name, table in change.items()}
    if source == "arrays":
        angles = np.array([*GALLERY_1, *GALLERY_2, *PROBES])
        about = {"features": directions(*angles), "templates": angles, "media": angles}
        save_features(ijb / "x.npz", about | rows)
    else:
        for name, part in {"gallery_1": "gallery_G1", "gallery_2": "gallery_G2", "probes": "probe_mixed"}.items():
            lines = [f"{template},{subject}" for template, subject in rows[name]]
            path = ijb / "IJB" / "meta" / f"ijbb_1N_{part}.csv"
            path.write_text("\n".join(["Template_ID,Subject_ID", *lines]))
    options = ["--data", ijb / "IJB", "--target", "ijbb"] if source == "files" else []
    with pytest.raises(SystemExit, match=message):
        evaluate("--protocol", "ijb-1n", "--features", ijb / "x.npz", *options)


def test_a_template_without_images_is_refused(ijb):
    with (ijb / "IJB" / "meta" / "ijbb_1N_probe_mixed.csv").open("a") as file:
        file.write("999,3,img/1.png,7\n")
    options = ["--features", ijb / "x.npz", "--data", ijb / "IJB", "--target", "ijbb"]
    with pytest.raises(SystemExit, match=r"No feature is of template 999, which probes names"):
        evaluate("--protocol", "ijb-1n", *options)
