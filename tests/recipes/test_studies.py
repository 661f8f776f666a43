"""The comparison of losses: the trials are what they claim, the losses are their formulas, results are kept."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support import patience

import compare_gradients
import compare_losses
import compare_precisions
import trials
from compare_losses import LOSSES, CenterLoss, SemiHardTripletLoss
from cosface_recipes.small_training import Recipe
from trials import HANGUL, HELD_OUT, Trial

MANIFEST = json.loads((HANGUL / "manifest.json").read_text(encoding="utf-8"))


# Data and batches


def test_batches_hold_an_even_number_of_images_of_an_identity():
    labels = torch.arange(30).repeat_interleave(torch.arange(30) % 5 + 1)
    random = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(3):
        batches = trials.pairs(labels, 8, random)
        for rows in batches:
            assert len(rows) <= 8
            assert (labels[rows].bincount() % 2 == 0).all()
        rows = torch.cat(batches)
        assert len(rows.unique()) == len(rows) == sum(n - n % 2 for n in labels.bincount().tolist())
        seen.append(rows)
    assert not torch.equal(seen[0], seen[1])
    assert set(seen[0].tolist()) != set(torch.cat(seen).tolist())  # who is left out changes


def test_a_setting_is_chosen_on_other_syllables_and_font_families():
    training, test = trials.load(held_out=True)
    assert not set(training.identities) & set(test.identities)
    assert set(training.identities) | set(test.identities) == set(MANIFEST["splits"]["train"]["characters"])
    families = [sheet["family"] for sheet in MANIFEST["splits"]["train"]["sheets"]]
    assert set(HELD_OUT) < set(families)
    fonts = sum(family not in HELD_OUT for family in families)
    assert training.labels.bincount().tolist() == [fonts] * len(training.identities)
    assert test.labels.bincount().tolist() == [len(HELD_OUT)] * len(test.identities)
    together = torch.cat([training.pixels, test.pixels]).flatten(1)
    assert len(together.unique(dim=0)) == len(together)


def test_selected_images_keep_their_identity():
    images = trials.load(held_out=False)[1]
    rows = (images.labels % 7 == 3) & (torch.arange(len(images)) % 2 == 0)
    some = trials.select(images, rows)
    expected = [images.identities[label] for label in images.labels[rows].tolist()]
    assert [some.identities[label] for label in some.labels.tolist()] == expected
    assert torch.equal(some.pixels, images.pixels[rows])
    assert len(set(some.identities)) == len(some.identities) == len(some.labels.unique())


# Measures


def test_balanced_pairs_are_all_genuine_pairs_and_as_many_others():
    labels = torch.arange(6).repeat(4)
    chosen, same = trials.balanced_pairs(labels)
    assert same.sum() == (~same).sum() == 6 * 4 * 3 // 2
    assert torch.equal(labels[chosen[:, 0]] == labels[chosen[:, 1]], same)
    assert len({tuple(sorted(pair)) for pair in chosen.tolist()}) == len(chosen)


def test_measures_of_perfect_and_of_meaningless_embeddings():
    labels = torch.arange(60).repeat(4)
    perfect = trials.measure(torch.eye(60)[labels] + 1e-3, labels)
    assert perfect == {"accuracy": 1.0, "rank-1": 1.0, "TAR@FAR=1e-3": 1.0, "TAR@FAR=1e-4": 1.0}
    random = torch.Generator().manual_seed(0)
    meaningless = trials.measure(torch.randn(240, 16, generator=random), labels)
    assert abs(meaningless["accuracy"] - 0.5) < 0.1
    assert max(meaningless["rank-1"], meaningless["TAR@FAR=1e-3"]) < 0.05


# Losses


def test_center_loss_by_its_formula():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2, 0, 2, 3, 0])
    loss = CenterLoss(5, 3, rate=0.3).double()
    before = torch.randn(5, 3, dtype=torch.float64)
    loss.centers.copy_(before)
    value = loss(x, y)
    value.backward()
    assert value.item() == pytest.approx(sum((x[i] - before[y[i]]).square().sum().item() for i in range(7)) / 14)
    torch.testing.assert_close(x.grad, (x - before[y]).detach() / 7)
    for j in range(5):
        own = x.detach()[y == j]
        expected = before[j] + 0.3 * (own - before[j]).sum(0) / (1 + len(own))
        torch.testing.assert_close(loss.centers[j], expected)


def test_center_loss_moves_no_centre_in_evaluation():
    loss = CenterLoss(2, 3).eval()
    loss(torch.ones(2, 3), torch.tensor([0, 1]))
    assert not loss.centers.any()


def test_triplet_loss_by_its_formula():
    pytest.importorskip("pytorch_metric_learning")
    random = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    x = torch.randn(10, 2, generator=random, dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    terms = []
    for a in range(10):
        for p in range(10):
            for n in range(10):
                if a != p and y[a] == y[p] and y[a] != y[n]:
                    near, far = (unit[a] - unit[p]).norm(), (unit[a] - unit[n]).norm()
                    if near < far <= near + 0.4:
                        terms.append((near - far + 0.4).item())
    assert len(terms) > 5
    assert SemiHardTripletLoss(0.4)(x, y).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_all_losses_have_the_same_budget():
    assert {len(settings) for _, settings in LOSSES.values()} == {compare_losses.BUDGET}


@pytest.mark.filterwarnings("ignore:scale")
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_pulls_identities_together(loss):
    if loss in ("Softmax + Contrastive", "Triplet"):
        pytest.importorskip("pytorch_metric_learning")
    make_head, settings = LOSSES[loss]
    options = dict(settings[0])
    options.pop("learning_rate", None)
    torch.manual_seed(0)
    head, labels = make_head(10, 16, **options), torch.arange(10).repeat(3)
    embeddings = torch.nn.Parameter(torch.randn(30, 16) / 3)
    optimizer = torch.optim.Adam([embeddings, *head.parameters()], lr=0.05)

    def spread() -> float:
        """Cosine between images of an identity, less that between identities."""
        cos = torch.corrcoef(embeddings.detach())
        same = labels[:, None] == labels
        return (cos[same & ~torch.eye(30, dtype=torch.bool)].mean() - cos[~same].mean()).item()

    before = spread()
    for _ in range(100):
        optimizer.zero_grad()
        head(embeddings, labels).backward()
        optimizer.step()
    assert spread() > before + 0.2


# Trials


@pytest.mark.filterwarnings("ignore:scale")
def test_a_trial_trains_and_measures_and_repeats_itself():
    make_head, settings = LOSSES["LMCL (CosFace)"]
    trial = Trial("LMCL (CosFace)", make_head, settings[0], Recipe(epochs=1, embedding_size=8), max_identities=20)
    rates = trial.run()
    assert list(rates) == ["accuracy", "rank-1", "TAR@FAR=1e-3", "TAR@FAR=1e-4"]
    assert rates["accuracy"] > 0.5
    assert repr(trial.run()) == repr(rates)  # nan where there are too few pairs


def test_a_trial_that_diverges_has_no_rates():
    make_head, _ = LOSSES["Softmax"]
    setting = {"learning_rate": 1e30}
    assert Trial("Softmax", make_head, setting, Recipe(epochs=1, embedding_size=8), max_identities=20).run() == {}


@dataclass(frozen=True)
class Counted:
    """A trial that notes in a file that it ran."""

    key: str
    log: Path
    schedule: dict = field(default_factory=lambda: {"epochs": 1})

    def run(self) -> dict[str, float]:
        with self.log.open("a") as log:
            log.write(f"{self.key} {torch.get_num_threads()}\n")
        return {"accuracy": 0.1 + 0.2}


def test_results_are_kept_and_not_measured_again(tmp_path):
    log, path = tmp_path / "log", tmp_path / "deep" / "results.json"
    expected = [{"accuracy": 0.1 + 0.2}] * 2
    assert trials.run_all([Counted("b", log), Counted("a", log)], path, processes=2) == expected
    assert sorted(log.read_text().splitlines()) == ["a 1", "b 1"]
    assert list(json.loads(path.read_text())) == ["a", "b"]
    log.unlink()
    assert trials.run_all([Counted("b", log), Counted("a", log, {"epochs": 2})], path, processes=2) == expected
    assert log.read_text() == "a 1\n"
    assert [trial["schedule"]["epochs"] for trial in json.loads(path.read_text()).values()] == [2, 1]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt], ids=["a trial fails", "interrupted"])
def test_after_a_failure_no_trial_begins_and_what_is_measured_is_kept(failure, tmp_path, monkeypatch):
    """Two at a time: when c fails, or Ctrl-C is pressed, a has ended, b and c run, and d and e wait."""
    path, begun, shut = tmp_path / "results.json", [], threading.Event()
    both = threading.Barrier(2 if failure is ValueError else 3, timeout=patience(10))

    class Threads(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(wait=False, **options)
            shut.set()
            super().shutdown(wait)

    def run(trial):
        begun.append(trial.key)
        if trial.key in "bc":
            both.wait()
            if failure is ValueError and trial.key == "c":
                raise ValueError("c cannot be trained.")
            assert shut.wait(patience(10))
        return {"accuracy": 0.5}

    def interrupted(running):
        both.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "ThreadPoolExecutor", Threads)
    monkeypatch.setattr(trials, "in_a_process", run)
    if failure is KeyboardInterrupt:
        monkeypatch.setattr(trials, "as_completed", interrupted)
    with pytest.raises(failure):
        trials.run_all([Counted(key, path) for key in "abcde"], path, processes=2)
    assert sorted(begun) == ["a", "b", "c"]
    assert list(json.loads(path.read_text())) == (["a", "b"] if failure is ValueError else ["a", "b", "c"])


@pytest.mark.parametrize("content", [b"", b"text", b"\xff", b"[]", b"1", b'{"a": 1}', b'{"a": {"schedule": 1}}'])
def test_a_file_of_something_else_is_named_before_a_trial_begins(content, tmp_path):
    path, log = tmp_path / "results.json", tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.json is no file of measured trials\.$"):
        trials.run_all([Counted("a", log)], path)
    with pytest.raises(ValueError, match="is a folder, not the name of a file to write"):
        trials.run_all([Counted("a", log)], tmp_path)
    assert path.read_bytes() == content
    assert not log.exists()


# The command


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--seeds", "0", "is not a positive whole number."),
        ("--epochs", "-1", "is not a positive whole number."),
        ("--processes", "0", "is not a positive whole number."),
        ("--identities", "-1", "is not a whole number from 0 on."),
        ("--identities", str(2**63), "is above 2^63 - 1."),
    ],
)
@pytest.mark.parametrize("study", [compare_gradients, compare_losses, compare_precisions])
def test_options_are_checked_before_a_trial_begins(study, option, value, sentence, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("trials began"))
    with pytest.raises(SystemExit):
        study.main([option, value])
    assert f"argument {option}: {value!r} {sentence}" in capsys.readouterr().err


def test_the_table_has_the_setting_that_was_best_held_out(monkeypatch, capsys):
    rates = {"accuracy": 0.5, "rank-1": 0.25, "TAR@FAR=1e-3": 0.75, "TAR@FAR=1e-4": math.nan}

    def measured(chosen, path, processes):
        assert len({trial.key for trial in chosen}) == len(chosen)
        return [
            rates | {"TAR@FAR=1e-3": 1 - abs(trial.setting["margin"] - 0.35)}
            if trial.held_out
            else rates | {"rank-1": 0.25 + 0.1 * trial.recipe.seed}
            if trial.loss.startswith("LMCL")
            else {}
            for trial in chosen
        ]

    monkeypatch.setattr(compare_losses, "run_all", measured)
    compare_losses.main(["--losses", "LMCL (CosFace)", "GB-CosFace", "--seeds", "3"])
    held_out, _, test = capsys.readouterr().out.partition("With it")
    assert "| LMCL (CosFace) | margin 0.35, scale 12 | 50.0 | 25.0 | 100.0 | n/a |" in held_out.splitlines()
    assert test.splitlines()[2:] == [
        "| loss | setting | 10-fold accuracy | rank-1 | TAR@FAR=1e-3 | TAR@FAR=1e-4 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| LMCL (CosFace) | margin 0.35, scale 12 | 50.0 ± 0.0 | 35.0 ± 10.0 | 75.0 ± 0.0 | n/a |",
        "| GB-CosFace | margin 0.2, scale 12 | diverged | diverged | diverged | diverged |",
    ]


# Gradients


@pytest.mark.filterwarnings("ignore:scale")
def test_gradients_within_a_tolerance_train_as_the_exact_one_does(tmp_path, monkeypatch, restore_threads):
    """At a scale at which many of 100 classes are dropped; on one thread, as run_all has it."""
    torch.set_num_threads(1)
    tolerance, half = {"gradient_tolerance": 1e-2}, {"sample_rate": 0.5}
    monkeypatch.setattr(compare_gradients, "GRADIENTS", {"exact": {}, "sparse": tolerance, "sampled": half})
    monkeypatch.setattr(compare_gradients, "run_all", lambda chosen, *_: [trial.run() for trial in chosen])
    options = ["--seeds", "1", "--epochs", "1", "--identities", "100", "--scale", "64"]
    rates = []
    monkeypatch.setattr(compare_gradients, "table", lambda found: rates.append(found) or "")
    compare_gradients.main([*options, "--results", str(tmp_path / "gradients.json")])
    exact, sparse, sampled = (runs[0] for runs in rates[0].values())
    assert exact["kept"] == 1
    assert sparse["kept"] < 0.8
    assert sampled["kept"] == 0.5
    assert abs(sparse["accuracy"] - exact["accuracy"]) < 0.1
    assert min(run["head"] for run in (exact, sparse, sampled)) > 0


def test_weights_in_fewer_bits_train(tmp_path, monkeypatch, restore_threads):
    monkeypatch.setattr(compare_precisions, "run_all", lambda chosen, *_: [trial.run() for trial in chosen])
    precisions = {name: compare_precisions.PRECISIONS[name] for name in ("float32", "float8")}
    monkeypatch.setattr(compare_precisions, "PRECISIONS", precisions)
    rates = []
    monkeypatch.setattr(compare_precisions, "table", lambda found: rates.append(found) or "")
    options = ["--seeds", "1", "--epochs", "1", "--identities", "100"]
    compare_precisions.main([*options, "--results", str(tmp_path / "precisions.json")])
    exact, coarse = (runs[0] for runs in rates[0].values())
    assert exact != coarse
    assert abs(coarse["accuracy"] - exact["accuracy"]) < 0.1


def test_table_of_precisions():
    rates = dict.fromkeys(trials.COLUMNS, 0.5)
    lines = compare_precisions.table({"float8": [rates, rates], "float32": [{}]}).splitlines()
    assert lines[2] == f"| float8 |{' 50.0 ± 0.0 |' * 4}"
    assert lines[3].count("diverged") == 4


def test_table_of_gradients():
    rates = dict.fromkeys(trials.COLUMNS, 0.5) | {"kept": 0.25, "head": 0.001, "step": 0.02}
    lines = compare_gradients.table({"exact": [rates, rates], "sampled": [{}]}).splitlines()
    assert lines[2] == f"| exact |{' 50.0 ± 0.0 |' * 4} 25.0 | 1.0 | 20.0 |"
    assert lines[3].count("diverged") == 4
