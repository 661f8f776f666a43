"""Evaluate a face-recognition network, or features that it gave, under a protocol of the literature.

    evaluate_protocol.py --protocol folder --model MODEL --data test
    evaluate_protocol.py --protocol lfw --model MODEL --data lfw --pairs pairs.txt
    evaluate_protocol.py --protocol bin --model MODEL --data agedb_30.bin
    evaluate_protocol.py --protocol ytf --model MODEL --data YouTubeFaces/aligned_images_DB --pairs splits.txt
    evaluate_protocol.py --protocol ijb --model MODEL --data IJBC --target ijbc
    evaluate_protocol.py --protocol ijb-1n --model MODEL --data IJBC --target ijbc
    evaluate_protocol.py --protocol megaface --model MODEL --data facescrub --distractors megaface
    evaluate_protocol.py --protocol tinyface --model MODEL --data tinyface
    evaluate_protocol.py --protocol retrieval --model MODEL --data queries --gallery gallery
    evaluate_protocol.py --protocol identification --model MODEL --data probes --gallery gallery

MODEL is what train.py exports. With --features FILE instead of --model, the embeddings come from a file of named
arrays, .npz or .safetensors, such as --save and embed.py write:

    folder      features (n, D); labels (n,)
    lfw, bin    features (m, D); same (n,); pairs (n, 2), rows of features: without them, rows 2i and 2i + 1
    ytf         features (frames, D); videos (frames,); same (n,); pairs (n, 2), of videos
    ijb         features (images, D); templates, media, scores (images,); same (n,); pairs (n, 2), of templates
    ijb-1n      likewise, and instead of pairs gallery_1, gallery_2, probes (t, 2): templates and their subjects
    megaface    features (P, D); labels (P,); and in the file of --distractors, features (N, D)
    tinyface    features (n, D) of probes and gallery; labels (n,), -100 of distractors; probe (n,) bool
    retrieval, identification    features (P, D); labels (P,); and likewise in the file of --gallery

All but the features is taken from --data, where the file lacks it, for bin, ijb and ijb-1n. For megaface,
--features and --distractors can also be folders of matrices, as its development kit writes them; so can, for
retrieval and identification, --features and --gallery.

What a model gave has an array model too, the model's digest. Features of two models are not compared, where both
say what they are of.

Two cosines tie if they are the same number in float32, which those of equal embeddings always are. For folder,
ijb-1n, identification and tinyface, what ties with the mate is ahead of it; for megaface a distractor that ties is
not; for retrieval the first of the gallery comes first.

folder prints what train.py prints of a test set: a folder with a sub-folder per identity, a .rec or a .bin file.

The folder of ijb and ijb-1n has meta/TARGET_face_tid_mid.txt and TARGET_name_5pts_score.txt and, for a model,
loose_crop/, from which the faces are cut out by their landmarks. Beside these, ijb has
TARGET_template_pair_label.txt, and ijb-1n has TARGET_1N_gallery_G1.csv and _G2.csv (of IJB-B: S1, S2) and
TARGET_1N_probe_mixed.csv, whose titles begin with TEMPLATE_ID,SUBJECT_ID.

The folder of tinyface has Probe, Gallery_Match, Gallery_Distractor, probe_img_ID_pairs.mat and
gallery_match_img_ID_pairs.mat, or a Testing_Set that has them. Aligned copies of the images are put into such
folders too.

For retrieval and identification, both folders have a sub-folder per identity, of the same name in both. Without
--gallery, retrieval seeks each image of --data among the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cosface_recipes.data.images import image_files
from cosface_recipes.data.names import identity
from cosface_recipes.data.pairs import read_bin
from cosface_recipes.evaluation import held_out, reports
from cosface_recipes.evaluation.collect import (
    Arrays,
    Embedder,
    check_searches,
    collect_bin,
    collect_identities,
    collect_ijb,
    collect_images,
    collect_lfw,
    collect_tinyface,
    collect_ytf,
    read_ijb,
    read_ijb_pairs,
    read_ijb_searches,
)
from cosface_recipes.evaluation.features import checked, load_features, save_features
from cosface_recipes.evaluation.plots import plot_cmc, plot_roc, suffixes
from cosface_recipes.evaluation.protocols import check_sizes
from cosface_recipes.evaluation.reports import Report
from cosface_recipes.evaluation.verification import allowed
from cosface_recipes.export import digest, load
from cosface_recipes.outputs import check_output, print_any_name
from cosface_recipes.recognition import FILES

PER_SAMPLE = ("labels", "names", "videos", "templates", "media", "scores", "probe")
NUMBERED = ("labels", "videos", "templates", "media", "pairs", "gallery_1", "gallery_2", "probes")
OF_SUBJECTS = ("gallery_1", "gallery_2", "probes")
NUMBERS = ("same", "scores", "probe")
NEEDED = {
    "folder": ("labels",),
    "lfw": ("same",),
    "bin": ("same",),
    "ytf": ("videos", "pairs", "same"),
    "ijb": ("templates", "media", "pairs", "same"),
    "ijb-1n": ("templates", "media", "gallery_1", "gallery_2", "probes"),
    "megaface": ("labels",),
    "tinyface": ("labels", "probe"),
    "retrieval": ("labels",),
    "identification": ("labels",),
}
OF_IMAGES = {"lfw": ("data", "pairs"), "ytf": ("data", "pairs")}  # options that a model needs; others data alone
OTHERS = {"megaface": ("distractors",), "identification": ("gallery",)}  # options that are needed always
USED_BY = {  # options that not every protocol uses
    "pairs": ("lfw", "ytf"),
    "target": ("ijb", "ijb-1n"),
    "distractors": ("megaface",),
    "sizes": ("megaface",),
    "noise": ("megaface",),
    "gallery": ("retrieval", "identification"),
    "far": ("folder",),
    "on_corrupt": ("folder",),
    "roc": ("folder", "lfw", "bin", "ytf", "ijb", "ijb-1n", "megaface", "identification"),
    "cmc": ("ijb-1n", "megaface", "identification"),
}
DATA_OF_FEATURES = ("bin", "ijb", "ijb-1n")  # where --data has what a file of features may lack
OF_MODEL = ("pairs", "flip", "on_corrupt", "batch_size", "workers")  # options that features have no use for
OF_TEMPLATES = {"ijb": read_ijb_pairs, "ijb-1n": read_ijb_searches}
OF_ARRAYS = {
    "lfw": reports.report_pairs,
    "bin": reports.report_pairs,
    "ytf": reports.report_ytf,
    "ijb": reports.report_ijb,
    "ijb-1n": reports.report_ijb_search,
    "tinyface": reports.report_tinyface,
}
SEARCHES = {"retrieval": reports.report_retrieval, "identification": reports.report_identification}


def load_arrays(args: argparse.Namespace, embedder: Embedder | None) -> Arrays:
    """What the protocol is computed from, from images or from a file."""
    if args.protocol in SEARCHES:
        return load_labeled(args, embedder, args.data if embedder else args.features)
    if embedder:
        folder = args.data
        if args.protocol == "lfw":
            arrays = collect_lfw(embedder, folder, args.pairs)
        elif args.protocol == "bin":
            arrays = collect_bin(embedder, folder)
        elif args.protocol == "ytf":
            arrays = collect_ytf(embedder, folder, args.pairs)
        elif args.protocol in OF_TEMPLATES:
            about = OF_TEMPLATES[args.protocol](folder, args.target)  # before hours of embedding
            arrays = collect_ijb(embedder, folder, args.target) | about
        elif args.protocol == "tinyface":
            arrays = collect_tinyface(embedder, folder)
        else:
            arrays = collect_identities(embedder, folder)
    else:
        arrays = load_features(args.features)
        if args.protocol in OF_TEMPLATES and args.data:
            about = read_ijb(args.data, args.target) | OF_TEMPLATES[args.protocol](args.data, args.target)
            arrays = about | arrays
        elif args.protocol == "bin" and args.data:
            arrays = {"same": read_bin(args.data)[1]} | arrays
    check(arrays, args.protocol, args.features or args.data)
    return arrays


def named(names: np.ndarray, folder: Path) -> np.ndarray:
    """The innermost folder of each path below one, whose name says that those of two sets are of one identity."""
    places = [PurePosixPath(name).parent for name in names.tolist()]
    labels = [identity(place.name) for place in places]
    known = dict(zip(reversed(labels), reversed(places), strict=True))
    for label, place in zip(labels, places, strict=True):
        if place != (other := known[label]):
            raise ValueError(
                f"The name of a folder is that of an identity, and {folder} has two of one name, {other} and "
                f"{place}: put them together, or rename one."
            )
    return np.array(labels)


def load_labeled(args: argparse.Namespace, embedder: Embedder | None, path: Path) -> Arrays:
    """Probes or a gallery; the labels of folders are their names."""
    if embedder and path.is_dir():
        arrays = collect_identities(embedder, path)
        return arrays | {"labels": np.array([identity(name.split("/")[0]) for name in arrays["names"].tolist()])}
    arrays = load_features(path)
    if path.is_dir() and "labels" in arrays:
        arrays["labels"] = named(arrays["names"], path)
    check(arrays, args.protocol, path)
    return arrays


def check_others(arrays: Arrays, others: Arrays, whose: str, labels: bool) -> None:
    """Whether what is sought can be compared with what it is sought among, a gallery or distractors."""
    of_parts = {"features": [f"{part['features'].shape[1]} numbers each" for part in (arrays, others)]}
    if labels:
        of_parts["labels"] = [
            "text" if part["labels"].dtype.kind == "U" else "numbers" for part in (arrays, others)
        ]
    for what, (sought, among) in of_parts.items():
        if sought != among:
            raise ValueError(f"The {whose} {what} are {among}, and those of what is sought {sought}.")
    if "model" in arrays:
        check_model(others, arrays["model"].item(), whose)


def check_model(others: Arrays, model: str, whose: str) -> None:
    if "model" in others and others["model"].item() != model:
        raise ValueError(
            f"The {whose} features are of another model: its digest is {others['model'].item()}, and that of what "
            f"is sought {model}."
        )


def check_options(args: argparse.Namespace) -> None:
    """What can be told before hours of embedding."""
    if (args.model is None) == (args.features is None):
        raise ValueError("Either --model or --features is needed, and not both.")
    defaults = make_parser()
    for name in [name for name, value in vars(args).items() if value != defaults.get_default(name)]:
        option = f"--{name.replace('_', '-')}"
        if args.protocol not in USED_BY.get(name, NEEDED):
            raise ValueError(f"Protocol {args.protocol} has no use for {option}.")
        if args.features and (name in OF_MODEL or (name == "data" and args.protocol not in DATA_OF_FEATURES)):
            raise ValueError(f"Protocol {args.protocol} has no use for {option} beside --features.")
    if args.save and args.protocol == "folder" and args.model:
        raise ValueError("--protocol folder saves no features; embed.py does.")
    for name in (*(OF_IMAGES.get(args.protocol, ("data",)) if args.model else ()), *OTHERS.get(args.protocol, ())):
        if getattr(args, name) is None:
            raise ValueError(f"Protocol {args.protocol} needs --{name}.")
    for path in (args.features, args.data, args.pairs, args.distractors, args.gallery, *(args.noise or ())):
        if path and not path.exists():
            raise FileNotFoundError(f"There is no {path}.")
    if args.model and args.protocol in (*SEARCHES, "megaface"):
        for path in (args.data, args.gallery, args.distractors):
            if path and path.is_dir() and not image_files(path):
                raise ValueError(f"The folder {path} has no images.")
    if args.on_corrupt == "skip" and args.data.suffix == ".bin":
        raise ValueError("--on-corrupt skip is for images that are in no pair, and those of a .bin file are.")
    allowed(args.far, 0)
    if args.save:
        check_output(args.save, FILES)
    for path in (args.roc, args.cmc):
        if path:
            check_output(path, suffixes())
    if args.json:
        check_output(args.json)


def check(arrays: Arrays, protocol: str, source: Path, needed: Sequence[str] | None = None) -> None:
    """Whether the arrays fit each other; `needed`: those beside the features, if not what the protocol says."""
    if missing := [name for name in (NEEDED[protocol] if needed is None else needed) if name not in arrays]:
        advice = " The identity of a matrix is the sub-folder that it lies in." if source.is_dir() else ""
        raise ValueError(f"The features of protocol {protocol} in {source} lack {', '.join(missing)}.{advice}")
    arrays["features"] = checked(arrays["features"], f"protocol {protocol}")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}.")
        if name in NUMBERED:
            arrays[name] = comparable(array, name)
        if name in PER_SAMPLE and array.shape != (len(arrays["features"]),):
            raise ValueError(f"There are {len(arrays['features'])} features and {name} of shape {array.shape}.")
        if name in OF_SUBJECTS and (array.shape[1:] != (2,) or len(array) == 0):
            raise ValueError(f"{name} must be of shape (t, 2), templates and their subjects, got {array.shape}.")
        if name in (*NUMBERS, *OF_SUBJECTS) and array.dtype.kind not in "fiub":
            raise ValueError(f"{name} must be numbers, got {array.dtype}.")
        if name == "scores" and not (array > 0).any():
            raise ValueError(f"scores must be positive, where an image counts, got {array.max():g} at most.")
        if name in ("same", "probe") and not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} must be 0 or 1, got {array[~np.isin(array, (0, 1))][0]}.")
        if name == "model" and (array.size != 1 or array.dtype.kind != "U"):
            raise ValueError(f"model must be one text, the model's digest, got {array.shape} of {array.dtype}.")
    if protocol == "ijb-1n":
        arrays |= check_searches(arrays, str(source))
    if "same" in arrays and arrays["same"].ndim != 1:
        raise ValueError(f"same must be of shape (n,), got {arrays['same'].shape}.")
    if protocol in ("lfw", "bin") and "pairs" not in arrays and len(arrays["features"]) != 2 * len(arrays["same"]):
        raise ValueError(
            f"There are {len(arrays['features'])} features and {len(arrays['same'])} pairs, of rows 2i and "
            "2i + 1, since there is no array pairs."
        )
    if "pairs" in arrays:
        shape, pairs = arrays["pairs"].shape, len(arrays["same"])
        if shape != (pairs, 2):
            raise ValueError(f"pairs must be of shape ({pairs}, 2), as many as same has, got {shape}.")


def comparable(ids: np.ndarray, name: str) -> np.ndarray:
    """Identities, templates and the like of any file: names in one spelling; numbers in int64, since numpy makes
    float64 of it and uint64 together, where 2^53 + 1 is 2^53."""
    if ids.dtype.kind in "SU":
        texts = np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids
        return np.array([*map(identity, texts.ravel().tolist())], np.str_).reshape(ids.shape)
    if ids.dtype.kind == "f":
        odd = (ids % 1 != 0) | (abs(ids) > 1 / np.finfo(ids.dtype).eps)
    elif ids.dtype.kind == "u":
        odd = ids > np.iinfo(np.int64).max
    else:
        odd = np.full(ids.shape, ids.dtype.kind == "c")
    if odd.any():
        raise ValueError(f"{name} must be whole numbers of 64 bits, or text, got {ids[odd][0]} in {ids.dtype}.")
    return ids.astype(np.int64)


def run(args: argparse.Namespace) -> Report:
    check_options(args)
    embedder = load_embedder(args) if args.model else None
    if args.protocol == "folder" and embedder:
        return reports.report_folder(held_out.verify(embedder, args.data, args.far))
    # What is sought in comes first, so that of a file no fault shows after the embedding.
    gallery = load_labeled(args, embedder, args.gallery) if args.gallery else None
    others = load_distractors(args, embedder) if args.distractors else gallery
    whose = "distractors'" if args.distractors else "gallery's"
    if embedder and others:
        check_model(others, embedder.digest, whose)
    arrays = load_arrays(args, embedder)
    if args.save:
        save_features(args.save, arrays)
    if others:
        check_others(arrays, others, whose, labels=gallery is not None)
    if args.protocol == "folder":
        return reports.report_labeled(arrays, args.features.name, args.far)
    if args.protocol in SEARCHES:
        return SEARCHES[args.protocol](arrays, gallery)
    if others is None:
        return OF_ARRAYS[args.protocol](arrays)
    noise: dict[str, int] | None = None
    if args.noise:
        arrays, others, noise = reports.cleaned(arrays, others, args.noise)
    return reports.report_megaface(arrays, others["features"], args.sizes, noise)


def load_distractors(args: argparse.Namespace, embedder: Embedder | None) -> Arrays:
    path = args.distractors
    arrays = None if embedder and path.is_dir() else load_features(path)
    if args.sizes:
        check_sizes(args.sizes, len(arrays["features"] if arrays else image_files(path)))
    if arrays:
        check(arrays, args.protocol, path, needed=())
    return arrays or collect_images(embedder, path)


def write_outputs(args: argparse.Namespace, report: Report) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: None if value != value else value for name, value in report.rows.items()}  # JSON has no NaN
        args.json.write_text(json.dumps({"protocol": args.protocol, **rows}, indent=1) + "\n")
    if args.roc and not report.curves:
        raise ValueError(f"There are no rates to draw into {args.roc}: no threshold was varied over these images.")
    if args.roc:
        plot_roc(report.curves, args.roc)
    if args.cmc:
        plot_cmc(report.cmc, args.cmc, args.protocol)


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
        on_corrupt=args.on_corrupt,
        digest=digest(args.model),
    )


def sizes(text: str) -> list[int]:
    """Numbers of the command line, by comma."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"sizes are whole numbers, by comma, got {text!r}") from None


def make_parser() -> argparse.ArgumentParser:
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
        "--far", type=float, default=1e-3, help="folder: rate of the threshold (default: %(default)s, train.py's)"
    )
    parser.add_argument(
        "--sizes",
        type=sizes,
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
    parser.add_argument(
        "--on-corrupt",
        choices=("raise", "skip"),
        default="raise",
        help="folder: end at an image that cannot be read, or leave it out and say so (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=Embedder.batch_size)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the arrays, .npz or .safetensors")
    parser.add_argument("--roc", type=Path, metavar="PNG", help="draw the ROC curve, or TPIR over FPIR")
    parser.add_argument("--cmc", type=Path, metavar="PNG", help="of searches: draw the rates by rank")
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    args = make_parser().parse_args(argv)
    try:
        report = run(args)
        print(report)
        write_outputs(args, report)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
