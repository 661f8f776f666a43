"""Evaluate a face-recognition network, or features that it gave, under a protocol of the literature.

    evaluate_protocol.py --protocol lfw --model MODEL --data lfw --pairs pairs.txt
    evaluate_protocol.py --protocol bin --model MODEL --data agedb_30.bin
    evaluate_protocol.py --protocol ytf --model MODEL --data YouTubeFaces/aligned_images_DB --pairs splits.txt
    evaluate_protocol.py --protocol ijb --model MODEL --data IJBC --target ijbc
    evaluate_protocol.py --protocol megaface --model MODEL --data facescrub --distractors megaface
    evaluate_protocol.py --protocol retrieval --model MODEL --data queries --gallery gallery
    evaluate_protocol.py --protocol identification --model MODEL --data probes --gallery gallery

MODEL is what train.py exports. With --features FILE instead of --model, the embeddings come from a file of named
arrays, .npz or .safetensors, such as --save writes:

    lfw, bin    features (m, D); same (n,); pairs (n, 2), rows of features: without them, rows 2i and 2i + 1
    ytf         features (frames, D); videos (frames,); same (n,); pairs (n, 2), of videos
    ijb         features (images, D); templates, media, scores (images,); same (n,); pairs (n, 2), of templates
    megaface    features (P, D); labels (P,); and in the file of --distractors, features (N, D)
    retrieval, identification    features (P, D); labels (P,); and likewise in the file of --gallery

All but the features is taken from --data, where the file lacks it, for bin and ijb. For megaface, --features and
--distractors can also be folders of matrices, as its development kit writes them.

The folder of ijb has meta/TARGET_face_tid_mid.txt, TARGET_template_pair_label.txt and TARGET_name_5pts_score.txt
and, for a model, loose_crop/, from which the faces are cut out by their landmarks.

For retrieval and identification, both folders have a sub-folder per identity, of the same name in both. Without
--gallery, retrieval seeks each image of --data among the others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cosface_recipes.data.pairs import read_bin
from cosface_recipes.evaluation.collect import (
    Arrays,
    Embedder,
    collect_bin,
    collect_identities,
    collect_ijb,
    collect_images,
    collect_lfw,
    collect_ytf,
    read_ijb,
)
from cosface_recipes.evaluation.features import load_features, save_features
from cosface_recipes.evaluation.megaface import clean, is_noise, read_noise
from cosface_recipes.evaluation.plots import plot_cmc, plot_roc
from cosface_recipes.evaluation.protocols import (
    cross_validate,
    identify,
    pair_distances,
    tar_at_nearest_far,
    template_embeddings,
    video_embeddings,
)
from cosface_recipes.evaluation.search import retrieve, search
from cosface_recipes.evaluation.verification import Curve, Histogram
from cosface_recipes.export import load

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-3, 1e-2, 1e-1)
KS = (1, 5, 10, 20)
RANKS = 100
PER_SAMPLE = ("labels", "names", "videos", "templates", "media", "scores")
NEEDED = {
    "lfw": ("same",),
    "bin": ("same",),
    "ytf": ("videos", "pairs", "same"),
    "ijb": ("templates", "media", "pairs", "same"),
    "megaface": ("labels",),
    "retrieval": ("labels",),
    "identification": ("labels",),
}


@dataclass(frozen=True)
class Report:
    """What a protocol measures.

    Attributes:
        rows: by name; nan where there are too few pairs.
        curve: of verification, or TPIR over FPIR of identification.
        cmc: rates at rank 1, 2, ..., by name.
    """

    rows: dict[str, float | int | str]
    curve: Curve | None
    cmc: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate_lfw(arrays: Arrays) -> Report:
    same, rows_of = arrays["same"].astype(bool), np.arange(len(arrays["features"]))
    pairs = positions(rows_of, arrays["pairs"], "row") if "pairs" in arrays else None
    distances = pair_distances(arrays["features"], pairs)
    result = cross_validate(distances, same)
    rows = {
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
    return Report(rows, counted(1 - distances / 2, same))


def evaluate_ytf(arrays: Arrays) -> Report:
    videos, ids = video_embeddings(arrays["features"], arrays["videos"])
    return evaluate_lfw(
        {"features": videos, "pairs": positions(ids, arrays["pairs"], "video"), "same": arrays["same"]}
    )


def evaluate_ijb(arrays: Arrays) -> Report:
    templates, ids = template_embeddings(
        arrays["features"], arrays["templates"], arrays["media"], arrays.get("scores")
    )
    same = arrays["same"].astype(bool)
    first, second = positions(ids, arrays["pairs"], "template").T
    blocks = np.array_split(np.arange(len(same)), math.ceil(len(same) / 100_000))
    scores = np.concatenate([(templates[first[i]] * templates[second[i]]).sum(1) for i in blocks])
    rates = tar_at_nearest_far(scores, same, FARS)
    rows = {"templates": len(ids), "pairs": len(same)}
    return Report(
        rows | {f"TAR@FAR={far:g}": rate for far, rate in zip(FARS, rates, strict=True)}, counted(scores, same)
    )


def evaluate_megaface(
    arrays: Arrays, distractors: np.ndarray, sizes: Sequence[int] | None, noise: dict[str, int] | None
) -> Report:
    sizes = sizes or [n for n in (10**k for k in range(1, 7)) if n <= len(distractors)] or [len(distractors)]
    probes, labels, others = map(torch.from_numpy, (arrays["features"], arrays["labels"], distractors))
    result = identify(probes, labels, others, sizes, RANKS)
    rows: dict[str, float | int | str] = {"probes": len(labels), "distractors": max(sizes)}
    rows |= {"cleaned lists": "no"} if noise is None else {"cleaned lists": "yes", **noise}
    rows |= {f"rank-1 of {n:,}": float(rates[0]) for n, rates in result.rates.items()}
    rows |= {f"TAR@FAR={far:g}": result.curve.tar_at_far(far) for far in FARS}
    return Report(rows, result.curve, {f"{n:,} distractors": rates for n, rates in result.rates.items()})


def evaluate_retrieval(arrays: Arrays, gallery: Arrays | None) -> Report:
    queries, known = (
        torch.from_numpy(arrays["features"]),
        [arrays["labels"], *([gallery["labels"]] if gallery else [])],
    )
    labels = numbered(known)
    others = (torch.from_numpy(gallery["features"]), labels[1]) if gallery else ()
    result = retrieve(queries, labels[0], *others, ks=KS)
    rows: dict[str, float | int | str] = {"queries": len(queries), "queries with a match": result.queries}
    rows["gallery"] = len(gallery["features"] if gallery else queries)
    rows |= {f"recall@{k}": rate for k, rate in result.recall.items()}
    return Report(rows | {"mAP@R": result.map_at_r}, None)


def evaluate_identification(arrays: Arrays, gallery: Arrays) -> Report:
    labels = numbered([arrays["labels"], gallery["labels"]])
    probes, others = torch.from_numpy(arrays["features"]), torch.from_numpy(gallery["features"])
    result = search(probes, labels[0], others, labels[1], RANKS)
    mated, unmated = result.open_set.pairs
    rows: dict[str, float | int | str] = {"mated probes": mated, "non-mated probes": unmated}
    rows["identities in the gallery"] = len(labels[1].unique())
    rows |= {f"rank-{k}": float(result.rates[k - 1]) for k in KS}
    rows |= {f"TPIR@FPIR={rate:g}": result.open_set.tar_at_far(rate) for rate in FPIRS}
    return Report(rows, result.open_set if unmated else None, {"mated probes": result.rates})


SEARCHES = {"retrieval": evaluate_retrieval, "identification": evaluate_identification}


def numbered(labels: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Identities of several sets, numbers or names, as the numbers 0, 1, ... that they have together."""
    numbers = np.unique(np.concatenate(labels), return_inverse=True)[1]
    return [torch.from_numpy(part) for part in np.split(numbers, np.cumsum([*map(len, labels)])[:-1])]


def counted(similarity: np.ndarray, same: np.ndarray) -> Histogram:
    curve = Histogram()
    curve.add(torch.from_numpy(similarity), torch.from_numpy(same))
    return curve


def positions(ids: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    """Where the numbers of videos or templates are among the ascending ids."""
    found = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    if (missing := ids[found] != wanted).any():
        raise ValueError(f"No feature is of {what} {wanted[missing][0]}, which a pair names.")
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


def load_arrays(args: argparse.Namespace, embedder: Embedder | None) -> Arrays:
    """What the protocol is computed from, from images or from a file."""
    if args.protocol in SEARCHES:
        return load_labeled(args, embedder, required(args, "data") if embedder else args.features)
    if embedder:
        folder = required(args, "data")
        if args.protocol == "lfw":
            arrays = collect_lfw(embedder, folder, required(args, "pairs"))
        elif args.protocol == "bin":
            arrays = collect_bin(embedder, folder)
        elif args.protocol == "ytf":
            arrays = collect_ytf(embedder, folder, required(args, "pairs"))
        elif args.protocol == "ijb":
            arrays = collect_ijb(embedder, folder, args.target)
        else:
            arrays = collect_identities(embedder, folder)
    else:
        arrays = load_features(args.features)
        if args.protocol == "ijb" and args.data:
            arrays = read_ijb(args.data, args.target) | arrays
        elif args.protocol == "bin" and args.data:
            arrays = {"same": read_bin(args.data)[1]} | arrays
    check(arrays, args.protocol)
    return arrays


def identities(names: np.ndarray, part: int) -> np.ndarray:
    """A part of each path: the folder whose name says that images of two sets are of one identity."""
    return np.array([name.split("/")[part] if "/" in name else "" for name in names.tolist()])


def load_labeled(args: argparse.Namespace, embedder: Embedder | None, path: Path) -> Arrays:
    """Probes or a gallery; the labels of folders are their names."""
    if embedder and path.is_dir():
        arrays = collect_identities(embedder, path)
        return arrays | {"labels": identities(arrays["names"], 0)}
    arrays = load_features(path)
    if path.is_dir():
        arrays["labels"] = identities(arrays["names"], -2)
    check(arrays, args.protocol)
    return arrays


def check_gallery(arrays: Arrays, gallery: Arrays) -> None:
    for what, kinds in (
        ("features", [f"{part['features'].shape[1]} numbers each" for part in (arrays, gallery)]),
        ("labels", ["text" if part["labels"].dtype.kind == "U" else "numbers" for part in (arrays, gallery)]),
    ):
        if kinds[0] != kinds[1]:
            raise ValueError(f"The gallery's {what} are {kinds[1]}, and those of what is sought {kinds[0]}.")


def required(args: argparse.Namespace, name: str) -> Path:
    if (value := getattr(args, name)) is None:
        raise ValueError(f"Protocol {args.protocol} needs --{name}.")
    return value


def check(arrays: Arrays, protocol: str) -> None:
    if missing := [name for name in NEEDED[protocol] if name not in arrays]:
        raise ValueError(f"The features of protocol {protocol} lack {', '.join(missing)}.")
    for name in PER_SAMPLE:
        if name in arrays and len(arrays[name]) != len(arrays["features"]):
            raise ValueError(f"There are {len(arrays['features'])} features and {len(arrays[name])} {name}.")
    if "pairs" in arrays:
        shape, pairs = arrays["pairs"].shape, len(arrays["same"])
        if shape != (pairs, 2):
            raise ValueError(f"pairs must be of shape ({pairs}, 2), as many as same has, got {shape}.")


def run(args: argparse.Namespace) -> Report:
    if (args.model is None) == (args.features is None):
        raise ValueError("Either --model or --features is needed, and not both.")
    embedder = load_embedder(args) if args.model else None
    arrays = load_arrays(args, embedder)
    if args.save:
        save_features(args.save, arrays)
    if args.protocol == "retrieval" and args.gallery is None:
        return evaluate_retrieval(arrays, None)
    if args.protocol in SEARCHES:
        gallery = load_labeled(args, embedder, required(args, "gallery"))
        check_gallery(arrays, gallery)
        return SEARCHES[args.protocol](arrays, gallery)
    if args.protocol != "megaface":
        evaluate = {"lfw": evaluate_lfw, "bin": evaluate_lfw, "ytf": evaluate_ytf, "ijb": evaluate_ijb}
        return evaluate[args.protocol](arrays)
    path = required(args, "distractors")
    others = collect_images(embedder, path) if embedder and path.is_dir() else load_features(path)
    noise: dict[str, int] | None = None
    if args.noise:
        arrays, others, noise = cleaned(arrays, others, args.noise)
    return evaluate_megaface(arrays, others["features"], args.sizes, noise)


def load_embedder(args: argparse.Namespace) -> Embedder:
    network, description = load(args.model)
    flip = args.flip or ("sum" if description.flip else "none")
    return Embedder(
        network,
        description.image_size,
        description.color,
        None if flip == "none" else flip,
        args.batch_size,
        args.workers,
    )


def show(value: float | int | str) -> str:
    if isinstance(value, float):
        return "n/a" if math.isnan(value) else f"{value:.5f}"
    return f"{value:,}" if isinstance(value, int) else value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=NEEDED, required=True)
    parser.add_argument("--model", type=Path, help="exported network")
    parser.add_argument("--features", type=Path, help="embeddings, instead of a network")
    parser.add_argument("--data", type=Path, help="images")
    parser.add_argument("--pairs", type=Path, metavar="TXT", help="lfw: pairs.txt; ytf: splits.txt")
    parser.add_argument("--target", default="ijbc", help="ijb: how its files' names begin (default: ijbc)")
    parser.add_argument("--distractors", type=Path, help="megaface: images or features")
    parser.add_argument("--gallery", type=Path, help="retrieval, identification: images or features to search")
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(n) for n in text.split(",")],
        help="megaface: numbers of distractors, by comma",
    )
    parser.add_argument(
        "--noise",
        type=Path,
        nargs="+",
        metavar="TXT",
        help="megaface: lists of noisy photos: a probe is put at its identity's centre, a distractor moved away",
    )
    parser.add_argument(
        "--flip",
        choices=("sum", "concatenate", "none"),
        help="the mirror image's embedding (default: sum, or none if the model was exported so)",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the arrays, .npz or .safetensors")
    parser.add_argument("--roc", type=Path, metavar="PNG", help="draw the ROC curve, or TPIR over FPIR")
    parser.add_argument("--cmc", type=Path, metavar="PNG", help="megaface, identification: draw the rates by rank")
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        report = run(args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    width = max(map(len, report.rows))
    for name, value in report.rows.items():
        print(f"{name:{width}}  {show(value)}")
    if args.roc and report.curve:
        plot_roc({args.protocol: report.curve}, args.roc)
    if args.cmc and report.cmc:
        plot_cmc(report.cmc, args.cmc, args.protocol)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"protocol": args.protocol, **report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
