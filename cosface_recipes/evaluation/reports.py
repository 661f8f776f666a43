"""What each protocol measures of its arrays, by name: the lines of a table, curves, rates by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosface_recipes.evaluation import held_out
from cosface_recipes.evaluation.collect import DISTRACTOR, Arrays
from cosface_recipes.evaluation.megaface import clean, is_noise, read_noise
from cosface_recipes.evaluation.protocols import (
    cross_validate,
    identify,
    pair_distances,
    tar_at_nearest_far,
    template_embeddings,
    video_embeddings,
)
from cosface_recipes.evaluation.search import Search, rank_images, retrieve, search
from cosface_recipes.evaluation.verification import Curve, Histogram

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-3, 1e-2, 1e-1)
KS = (1, 5, 10, 20)
RANKS = 100
IJB_FPIRS, IJB_KS = (1e-2, 1e-1), (1, 5, 10)

Rows = dict[str, float | int | str]


@dataclass(frozen=True)
class Report:
    """What a protocol measures.

    Attributes:
        rows: by name; nan where there are too few pairs.
        curves: of verification, or TPIR over FPIR of identification, by name.
        cmc: rates at rank 1, 2, ..., by name.
        text: what is printed in place of the rows.
    """

    rows: Rows
    curves: Mapping[str, Curve] = field(default_factory=dict)
    cmc: Mapping[str, np.ndarray] = field(default_factory=dict)
    text: str = ""

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        return self.text or "\n".join(f"{name:{width}}  {show(value)}" for name, value in self.rows.items())


def show(value: float | int | str) -> str:
    if isinstance(value, float):
        return "n/a" if math.isnan(value) else f"{value:.5f}"
    return f"{value:,}" if isinstance(value, int) else value


def report_pairs(arrays: Arrays) -> Report:
    same, rows_of = arrays["same"].astype(bool), np.arange(len(arrays["features"]))
    pairs = positions(rows_of, arrays["pairs"], "row", "a pair") if "pairs" in arrays else None
    distances = pair_distances(arrays["features"], pairs)
    result = cross_validate(distances, same)
    rows: Rows = {
        "pairs": len(same),
        "accuracy": result.accuracy,
        "population standard deviation": result.population_std,
        "sample standard deviation": result.sample_std,
        "standard error": result.standard_error,
        "VAL": float(result.vals.mean()),
        "VAL's population standard deviation": float(result.vals.std()),
        "FAR of VAL": float(result.fars.mean()),
        "cosine threshold": result.cosine_threshold,
    }
    return Report(rows, {"pairs": counted(1 - distances / 2, same)})


def report_ytf(arrays: Arrays) -> Report:
    videos, ids = video_embeddings(arrays["features"], arrays["videos"])
    pairs = positions(ids, arrays["pairs"], "video", "a pair")
    return report_pairs({"features": videos, "pairs": pairs, "same": arrays["same"]})


def report_folder(result: held_out.Result) -> Report:
    """The line that train.py prints of a test set."""
    rows = {"images": result.images, **result.rates, "threshold": result.threshold, "chosen by": result.chosen}
    return Report(rows, {result.name: result.curve} if result.curve else {}, text=held_out.table([result]))


def report_labeled(arrays: Arrays, name: str, far: float) -> Report:
    """All pairs of labeled features, as of a folder of identities."""
    features, labels = torch.from_numpy(arrays["features"]), numbered([arrays["labels"]])[0]
    return report_folder(held_out.compare_pairs(name, features, labels, far))


def report_ijb(arrays: Arrays) -> Report:
    templates, ids = templates_of(arrays)
    same = arrays["same"].astype(bool)
    first, second = positions(ids, arrays["pairs"], "template", "a pair").T
    blocks = np.array_split(np.arange(len(same)), math.ceil(len(same) / 100_000))
    scores = np.concatenate([(templates[first[i]] * templates[second[i]]).sum(1) for i in blocks])
    rates = tar_at_nearest_far(scores, same, FARS)
    rows: Rows = {"templates": len(ids), "pairs": len(same)}
    rows |= {f"TAR@FAR={far:g}": rate for far, rate in zip(FARS, rates, strict=True)}
    return Report(rows, {"pairs of templates": counted(scores, same)})


def report_ijb_search(arrays: Arrays) -> Report:
    """IJB 1:N: all probes are sought in one gallery, then in the other, which share no subject; the rates' means.

    A probe whose subject is in the other gallery is a non-mated one (Maze et al., ICB 2018). insightface's
    ijb_1n.py puts both galleries into one, in which every probe is mated, and takes its thresholds over all pairs.
    """
    templates, ids = templates_of(arrays)
    templates = torch.from_numpy(templates)

    def chosen(name: str) -> tuple[Tensor, Tensor]:
        wanted, subjects = np.ascontiguousarray(arrays[name].T)
        return templates[positions(ids, wanted, "template", name)], torch.from_numpy(subjects)

    probes = chosen("probes")
    results = [search(*probes, *chosen(f"gallery_{number}"), RANKS) for number in (1, 2)]
    rows: Rows = {"templates": len(ids), "probes": len(probes[1])}
    measured = [search_rows(result, IJB_KS, IJB_FPIRS) for result in results]
    for number, (result, rates) in enumerate(zip(results, measured, strict=True), 1):
        mated, unmated = result.open_set.pairs
        rows |= {f"gallery {number}: subjects": len(np.unique(arrays[f"gallery_{number}"][:, 1]))}
        rows |= {f"gallery {number}: mated probes": mated, f"gallery {number}: non-mated probes": unmated}
        rows |= {f"gallery {number}: {name}": rate for name, rate in rates.items()}
    rows |= {f"mean {name}": (measured[0][name] + measured[1][name]) / 2 for name in measured[0]}
    names = [f"gallery {number}" for number in (1, 2)]
    return Report(
        rows,
        {name: result.open_set for name, result in zip(names, results, strict=True) if result.open_set.pairs[1]},
        {name: result.rates for name, result in zip(names, results, strict=True)},
    )


def report_megaface(
    arrays: Arrays, distractors: np.ndarray, sizes: Sequence[int] | None, noise: dict[str, int] | None
) -> Report:
    sizes = sizes or [n for n in (10**k for k in range(1, 7)) if n <= len(distractors)] or [len(distractors)]
    probes, others, labels = *map(torch.from_numpy, (arrays["features"], distractors)), arrays["labels"]
    result = identify(probes, numbered([labels])[0], others, sizes, RANKS)
    rows: Rows = {"probes": len(labels), "distractors": max(sizes)}
    rows |= {"cleaned lists": "no"} if noise is None else {"cleaned lists": "yes", **noise}
    rows |= {f"rank-1 of {n:,}": float(rates[0]) for n, rates in result.rates.items()}
    rows |= {f"TAR@FAR={far:g}": result.curve.tar_at_far(far) for far in FARS}
    cmc = {f"{n:,} distractors": rates for n, rates in result.rates.items()}
    return Report(rows, {"probes and distractors": result.curve}, cmc)


def report_tinyface(arrays: Arrays) -> Report:
    probe, names = arrays["probe"].astype(bool), arrays["labels"]
    if (alone := names[probe & ~np.isin(names, names[~probe])]).size:
        raise ValueError(f"The gallery has no image of identity {alone[0]}, which a probe is of.")
    if str(DISTRACTOR) in names[probe].astype(str):
        raise ValueError(f"A probe has the label {DISTRACTOR}, which is that of distractors.")
    features, labels, probe = torch.from_numpy(arrays["features"]), numbered([names])[0], torch.from_numpy(probe)
    result = rank_images(features[probe], labels[probe], features[~probe], labels[~probe], KS)
    mates = int(torch.isin(labels[~probe], labels[probe]).sum())
    rows: Rows = {"probes": int(probe.sum()), "gallery": mates, "distractors": int((~probe).sum()) - mates}
    rows |= {f"rank-{k}": rate for k, rate in result.rates.items()}
    return Report(rows | {"mAP": result.mean_average_precision})


def report_retrieval(arrays: Arrays, gallery: Arrays | None) -> Report:
    queries = torch.from_numpy(arrays["features"])
    labels = numbered([arrays["labels"], *([gallery["labels"]] if gallery else [])])
    others = (torch.from_numpy(gallery["features"]), labels[1]) if gallery else ()
    result = retrieve(queries, labels[0], *others, ks=KS)
    rows: Rows = {"queries": len(queries), "queries with a match": result.queries}
    rows["gallery"] = len(gallery["features"] if gallery else queries)
    rows |= {f"recall@{k}": rate for k, rate in result.recall.items()}
    return Report(rows | {"mAP@R": result.map_at_r})


def report_identification(arrays: Arrays, gallery: Arrays) -> Report:
    labels = numbered([arrays["labels"], gallery["labels"]])
    probes, others = torch.from_numpy(arrays["features"]), torch.from_numpy(gallery["features"])
    result = search(probes, labels[0], others, labels[1], RANKS)
    mated, unmated = result.open_set.pairs
    rows: Rows = {"mated probes": mated, "non-mated probes": unmated}
    rows["identities in the gallery"] = len(labels[1].unique())
    rows |= search_rows(result, KS, FPIRS)
    return Report(rows, {"identification": result.open_set} if unmated else {}, {"mated probes": result.rates})


def search_rows(result: Search, ks: Sequence[int], fpirs: Sequence[float]) -> dict[str, float]:
    rates = {f"rank-{k}": float(result.rates[k - 1]) for k in ks}
    return rates | {f"TPIR@FPIR={fpir:g}": result.open_set.tar_at_far(fpir) for fpir in fpirs}


def templates_of(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return template_embeddings(arrays["features"], arrays["templates"], arrays["media"], arrays.get("scores"))


def numbered(labels: Sequence[np.ndarray]) -> list[Tensor]:
    """Identities of several sets, numbers or names, as the numbers 0, 1, ... that they have together."""
    numbers = np.unique(np.concatenate(labels), return_inverse=True)[1]
    return [torch.from_numpy(part) for part in np.split(numbers, np.cumsum([*map(len, labels)])[:-1])]


def counted(similarity: np.ndarray, same: np.ndarray) -> Histogram:
    curve = Histogram()
    curve.add(torch.from_numpy(similarity), torch.from_numpy(same))
    return curve


def positions(ids: np.ndarray, wanted: np.ndarray, what: str, source: str) -> np.ndarray:
    """Where numbers of rows, videos or templates, which a source names, are among the ascending ids."""
    kinds = ["text" if array.dtype.kind == "U" else "numbers" for array in (ids, wanted)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"What features are of, by {what}, is {kinds[0]}, and what {source} names is {kinds[1]}.")
    found = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    if (missing := ids[found] != wanted).any():
        raise ValueError(f"No feature is of {what} {wanted[missing][0]}, which {source} names.")
    return found


def cleaned(arrays: Arrays, others: Arrays, lists: Sequence[Path]) -> tuple[Arrays, Arrays, dict[str, int]]:
    """The probes and distractors of MegaFace without the noise of some lists, and how much there was of it."""
    for what, part in (("probes", arrays), ("distractors", others)):
        if "names" not in part:
            raise ValueError(f"The features of the {what} have no names, so that noise cannot be told among them.")
    names = [arrays["names"].tolist(), others["names"].tolist()]
    noisy = [np.zeros(len(part), bool) for part in names]
    for path in lists:
        noise = read_noise(path)
        found = [is_noise(part, noise) for part in names]
        if not any(part.any() for part in found):
            raise ValueError(
                f"None of the {len(noise)} names of {path} is that of a probe or of a distractor. It begins with "
                f"{(noise or [''])[0]!r}; probes are named like {names[0][0]!r}, distractors like {names[1][0]!r}."
            )
        noisy = [before | now for before, now in zip(noisy, found, strict=True)]
    features = clean(arrays["features"], arrays["labels"], noisy[0], others["features"], noisy[1])
    counts = {"noisy probes": int(noisy[0].sum()), "noisy distractors": int(noisy[1].sum())}
    return arrays | {"features": features[0]}, others | {"features": features[1]}, counts
