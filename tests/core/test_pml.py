"""pytorch-metric-learning: its losses with our kernels inside, and our heads in what it has around its losses."""

import copy
import math
import pickle
from importlib import metadata

import pytest
import torch
from support import relative_error, run_python
from torch import nn

from cosface_kernels import FusedArcFaceLoss, FusedCosFaceLoss

theirs = pytest.importorskip("pytorch_metric_learning.losses")
if metadata.version("pytorch-metric-learning").partition(".")[0] != "2":
    pytest.skip("cosface_kernels.pml is made of the losses of 2.x", allow_module_level=True)

from pytorch_metric_learning import (  # noqa: E402
    distances,
    miners,
    reducers,
    regularizers,
    testers,
    trainers,
)
from pytorch_metric_learning.utils import common_functions as c_f  # noqa: E402
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # noqa: E402
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper  # noqa: E402
from pytorch_metric_learning.utils.inference import CustomKNN  # noqa: E402

from cosface_kernels import pml as ours  # noqa: E402

C, D, N = 12, 8, 48
CASES = {
    "cosface": ("CosFaceLoss", {}),
    "cosface, m and s": ("CosFaceLoss", {"margin": 0.2, "scale": 10}),
    "arcface": ("ArcFaceLoss", {}),
    "arcface, beyond pi": ("ArcFaceLoss", {"margin": 120, "scale": 7}),
    "sub-centres": ("SubCenterArcFaceLoss", {}),
    "5 sub-centres": ("SubCenterArcFaceLoss", {"margin": 40, "scale": 9, "sub_centers": 5}),
    "sphereface": ("SphereFaceLoss", {}),
    "sphereface, m = 3": ("SphereFaceLoss", {"margin": 3, "scale": 0.7}),
    "l-softmax": ("LargeMarginSoftmaxLoss", {"margin": 2}),
    "l-softmax, m = 10": ("LargeMarginSoftmaxLoss", {"margin": 10, "scale": 0.5}),
    "normalized": ("NormalizedSoftmaxLoss", {}),
    "normalized, lengths": (
        "NormalizedSoftmaxLoss",
        {"temperature": 0.3, "distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    ),
}
# made anew for each loss, since reducers and regularizers have records
AROUND = {
    "plain": dict,
    "reducer": lambda: {"reducer": reducers.ThresholdReducer(low=0.5)},
    "class weights": lambda: {"reducer": reducers.ClassWeightedReducer(torch.linspace(0, 2, C))},
    "regularizers": lambda: {
        "weight_regularizer": regularizers.RegularFaceRegularizer(),
        "weight_reg_weight": 0.3,
        "embedding_regularizer": regularizers.LpRegularizer(),
        "embedding_reg_weight": 0.2,
        "weight_init_func": c_f.TorchInitWrapper(nn.init.uniform_, a=-1, b=1),
    },
}


def _pair(name, **options):
    """Theirs and ours, with the same weight."""
    pair = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        pair.append(getattr(module, name)(num_classes=C, embedding_size=D, **options).double())
    assert torch.equal(pair[0].W, pair[1].W)
    return pair


def _batch(regime, w):
    """Embeddings, (N, D) float64, and labels; of confident samples, or such as lie opposite to their class."""
    torch.manual_seed(1)
    labels = torch.randint(C, (N,))
    x = torch.randn(N, D, dtype=torch.float64)
    toward = {"random": 0, "confident": 0.5, "wrong": -2}[regime]
    return x + toward * w.detach().T[labels], labels


def _results(loss, x, labels, *rest):
    leaf = x.clone().requires_grad_()
    value = loss(leaf, labels, *rest)
    value.backward()
    return value.detach(), leaf.grad, loss.W.grad


def _assert_equal(loss, want, x, labels, *rest):
    for got, expected in zip(_results(loss, x, labels, *rest), _results(want, x, labels, *rest), strict=True):
        assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_theirs(case, regime):
    name, options = CASES[case]
    want, loss = _pair(name, **options)
    x, labels = _batch(regime, want.W)
    _assert_equal(loss, want, x, labels)
    torch.testing.assert_close(loss.get_logits(x), want.get_logits(x))
    if case == "arcface, beyond pi" and regime == "wrong":
        cosines = want.get_logits(x).gather(1, labels[:, None]) / 7
        assert (cosines.acos() + math.radians(120) > math.pi).all()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ours.__all__)
def test_what_is_around_the_loss_is_theirs(name, around):
    want, loss = _pair(name, **AROUND[around]())
    x, labels = _batch("random", want.W)
    triplets = miners.BatchHardMiner()(x, labels)
    pairs = miners.MultiSimilarityMiner()(x, labels)
    nothing = (torch.empty(0, dtype=torch.long),) * 3
    for tuples in (None, triplets, pairs, nothing):
        want.zero_grad()
        loss.zero_grad()
        _assert_equal(loss, want, x, labels, tuples)
    assert loss.sub_loss_names() == want.sub_loss_names()


@pytest.mark.parametrize("name", ours.__all__)
def test_module(name):
    want, loss = _pair(name)
    x, labels = _batch("random", want.W)
    assert isinstance(loss, getattr(theirs, name))
    assert list(loss.state_dict()) == list(want.state_dict()) == ["W"]
    assert loss.state_dict()["W"].shape == (D, C * loss.sub_centers)
    value = loss(x, labels)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(again(x, labels), value)
        assert again.W.T.is_contiguous()  # or every batch would copy it
    fresh = getattr(ours, name)(num_classes=C, embedding_size=D)
    fresh.load_state_dict(want.state_dict())
    torch.testing.assert_close(fresh(x, labels), value)
    value.backward()
    assert loss.W.grad.stride() == loss.W.stride()


@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_records_the_angle(name):
    want, loss = _pair(name, collect_stats=True)
    x, labels = _batch("random", want.W)
    want(x, labels)
    loss(x, labels)
    assert loss.avg_angle == pytest.approx(want.avg_angle, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_theirs(dtype):
    want, loss = _pair("CosFaceLoss", scale=8)
    x, labels = _batch("random", want.W)
    exact, half = want(x, labels).item(), x.to(dtype)
    for each in (want, loss):
        with torch.autocast("cpu", dtype):
            assert each(half, labels).dtype == torch.float32
        value = each(half, labels)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize(
    ("name", "distance", "message"),
    [
        ("NormalizedSoftmaxLoss", distances.LpDistance(), "got LpDistance with p=2 and power=1"),
        ("NormalizedSoftmaxLoss", distances.DotProductSimilarity(p=1), "p=1 and power=1"),
        ("CosFaceLoss", distances.CosineSimilarity(power=2), "got CosineSimilarity with p=2 and power=2"),
    ],
)
def test_refuses_other_distances(name, distance, message):
    with pytest.raises(ValueError, match=f"must be CosineSimilarity or DotProductSimilarity .*{message}"):
        getattr(ours, name)(C, D, distance=distance)


def _losses():
    return [
        ours.CosFaceLoss(C, D),
        ours.NormalizedSoftmaxLoss(C, D),
        FusedCosFaceLoss(C, D),
        FusedArcFaceLoss(C, D),
    ]


@pytest.mark.parametrize("loss", _losses(), ids=lambda loss: type(loss).__name__)
def test_refuses_other_references(loss):
    x, labels = torch.randn(N, D), torch.randint(C, (N,))
    assert torch.equal(loss(x, labels, None, x, labels), loss(x, labels))
    for references in ((x.clone(), labels), (x, labels.clone()), (x[:3], labels[:3])):
        with pytest.raises(ValueError, match="ref_emb"):
            loss(x, labels, None, *references)
        with pytest.raises(ValueError, match="ref_emb"):
            loss(x, labels, ref_emb=references[0], ref_labels=references[1])
    assert torch.equal(loss(x, labels, None, None, labels.clone()), loss(x, labels))  # as there
    with pytest.raises(Exception, match=f"CrossBatchMemory not supported for {type(loss).__name__}"):
        theirs.CrossBatchMemory(loss, D)


@pytest.mark.parametrize("head", ["pml", "head"])
def test_multiple_losses_with_miners(head):
    want, loss = _pair("CosFaceLoss")
    if head == "head":
        loss = FusedCosFaceLoss(C, D, reduction="none", dtype=torch.float64)
        loss.load_state_dict(want.state_dict())
    x, labels = _batch("random", want.W)
    miner = miners.BatchHardMiner()
    values = []
    for first in (want, loss):
        first = copy.deepcopy(first)
        both = theirs.MultipleLosses([first, theirs.TripletMarginLoss()], [miner, None], [0.7, 0.3])
        values.append(both(x, labels).mean())
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


class Samples(torch.utils.data.Dataset):
    """Vectors of C classes."""

    def __init__(self):
        torch.manual_seed(2)
        self.labels = torch.arange(C).repeat(8)
        self.x = (torch.randn(C, 16)[self.labels] + 0.3 * torch.randn(8 * C, 16)).double()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.x[index], self.labels[index]


def _train(loss, mining):
    torch.manual_seed(3)
    trunk = nn.Linear(16, D).double()
    trainer = trainers.MetricLossOnly(
        {"trunk": trunk},
        {name: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
         for name, module in (("trunk_optimizer", trunk), ("metric_loss_optimizer", loss))},
        32,
        {"metric_loss": loss},
        Samples(),
        mining_funcs={"tuple_miner": miners.BatchHardMiner()} if mining else {},
        iterations_per_epoch=6,
        data_device="cpu",
        dtype=torch.float64,
        dataloader_num_workers=0,
    )  # fmt: skip
    trainer.train(num_epochs=2)
    return trunk, trainer.losses["total_loss"]


@pytest.mark.parametrize("mining", [False, True], ids=["plain", "mining"])
@pytest.mark.parametrize("name", ours.__all__)
def test_trainer(name, mining):
    options = {"scale": 0.5} if name in ("SphereFaceLoss", "LargeMarginSoftmaxLoss") else {}
    want, loss = _pair(name, **options)
    start = loss.W.detach().clone()
    (trunk, _), (same, _) = _train(want, mining), _train(loss, mining)
    assert not torch.equal(loss.W, start)
    torch.testing.assert_close(loss.W, want.W, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(same.weight, trunk.weight, rtol=1e-9, atol=1e-12)


def test_a_head_in_their_trainer():
    """Without a miner, with which the means differ, a head gives what their loss does."""
    want, _ = _pair("CosFaceLoss")
    head = FusedCosFaceLoss(C, D, dtype=torch.float64)
    head.load_state_dict(want.state_dict())
    trunk, same = _train(want, False)[0], _train(head, False)[0]
    torch.testing.assert_close(head.weight, want.W.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(same.weight, trunk.weight, rtol=1e-9, atol=1e-12)
    _train(head, True)


def test_the_mean_with_a_miner_is_theirs_but_for_its_divisor():
    """sum(a l) / sum(a) here, sum(a l) / N there."""
    want, loss = _pair("CosFaceLoss")
    head = FusedCosFaceLoss(C, D, dtype=torch.float64)
    head.load_state_dict(want.state_dict())
    x, labels = _batch("random", want.W)
    tuples = miners.BatchHardMiner()(x, labels)
    counts = torch.cat(tuples).bincount(minlength=N).double()
    torch.testing.assert_close(
        head(x, labels, tuples) * (counts / counts.max()).sum() / N, loss(x, labels, tuples)
    )


def test_tester():
    trunk, _ = _train(_pair("CosFaceLoss")[1], False)
    tester = testers.GlobalEmbeddingSpaceTester(
        data_device="cpu",
        dtype=torch.float64,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(
            include=("precision_at_1",), k=1, knn_func=CustomKNN(distances.CosineSimilarity())
        ),
    )
    accuracy = tester.test({"val": Samples()}, 1, trunk)["val"]["precision_at_1_level0"]
    assert accuracy > 5 / C


def _wrapped(rank, group, weight, x, labels):
    loss = ours.CosFaceLoss(C, D).double()
    loss.load_state_dict({"W": weight})
    own = x.tensor_split(4)[rank].clone().requires_grad_()
    value = DistributedLossWrapper(loss)(own, labels.tensor_split(4)[rank])
    value.backward()
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(FusedCosFaceLoss(C, D))
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        DistributedLossWrapper(loss, efficient=True)(own.detach(), labels.tensor_split(4)[rank])
    return value.detach(), own.grad


def test_distributed_loss_wrapper(ranks):
    """Each rank has the loss of all samples, times the number of ranks, by which a mean of gradients divides."""
    want, _ = _pair("CosFaceLoss")
    x, labels = _batch("random", want.W)
    value, dx, _ = _results(want, x, labels)
    got = ranks.results(4, _wrapped, want.state_dict()["W"], x, labels)
    for each, _ in got:
        torch.testing.assert_close(each, 4 * value)
    torch.testing.assert_close(torch.cat([grad for _, grad in got]), 4 * dx)


def test_without_ranks_the_wrapper_gives_the_loss():
    want, loss = _pair("ArcFaceLoss")
    x, labels = _batch("random", want.W)
    with pytest.warns(UserWarning, match="non-distributed"):
        got = DistributedLossWrapper(loss)(x, labels)
    torch.testing.assert_close(got, want(x, labels))


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("None", "needs pytorch-metric-learning, which is not installed: pip install"),
        ("'3.0.4'", "is made of the losses of pytorch-metric-learning 2.x, got 3.0.4."),
    ],
)
def test_says_what_to_install(version, sentence):
    done = run_python(
        "from importlib import metadata\n"
        f"found = {version}\n"
        "def version(name):\n"
        "    if found is None:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found\n"
        "metadata.version = version\n"
        "import cosface_kernels, sys\n"
        "assert 'pytorch_metric_learning' not in sys.modules\n"
        "try:\n"
        "    import cosface_kernels.pml\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert sentence in done.stdout, done.stdout + done.stderr
