"""The guard of conftest.py: without a GPU too, a test of a backend fails where it forgets the backend's device."""

import torch
from support import make_problem, random_upstream


def test_what_a_backend_makes_is_on_its_device(backend):
    problem = backend.problem(2, 3, 4)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    tensors = (problem.x, problem.w, problem.targets, problem.scale, *upstream, backend.head(3, 4).weight)
    assert {t.device.type for t in tensors} == {backend.device}


def _without_a_device():
    """On torch's default device, each by another way."""
    from_numbers, module = torch.tensor([1.0]), torch.nn.Linear(2, 3)
    return {t.device.type for t in (torch.zeros(2), from_numbers, module.weight, make_problem(2, 3, 4).x)}


def test_in_a_test_of_a_backend_a_tensor_without_a_device_is_on_another(backend):
    assert _without_a_device() == {"meta" if backend.device == "cpu" else "cpu"}


def test_in_other_tests_it_is_on_the_cpu():
    assert _without_a_device() == {"cpu"}
