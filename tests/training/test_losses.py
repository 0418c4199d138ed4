"""The losses against the paper's equation, pixel by pixel."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor

from messnet.data import IGNORE_INDEX
from messnet.errors import DataError
from messnet.training.losses import (
    automatic_class_weights,
    cross_entropy,
    distillation_loss,
    pixel_weight,
    teach,
)
from messnet.training.options import DistillationLoss

LOSSES: list[tuple[DistillationLoss, float, bool]] = [
    ("ce", 0.5, False),
    *[("kd", alpha, False) for alpha in (0.0, 0.5, 1.0)],
    *itertools.product(("pfd",), (0.0, 0.25, 0.5, 1.0), (False, True)),
]
SHAPE = (2, 4, 5, 7)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits and labels, some of them ignored, the teacher right on about half of the rest."""
    rng = np.random.default_rng(0)
    student, teacher = (torch.from_numpy(rng.normal(0, 3, SHAPE)).float() for _ in range(2))
    random = torch.from_numpy(rng.integers(0, SHAPE[1], (2, 5, 7)))
    labels = torch.where(torch.from_numpy(rng.random((2, 5, 7))) < 0.4, teacher.argmax(1), random)
    labels[torch.from_numpy(rng.random(labels.shape)) < 0.2] = IGNORE_INDEX
    return student, teacher, labels


def literal(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    loss: str,
    alpha: float,
    filter_kl: bool,
    weights: tuple[float, ...] = (1, 1, 1, 1),
) -> float:
    """L_i = alpha * 1(argmax y_N = t) * CE(y_i, t) + (1 - alpha) * KL(y_N || y_i), mean over the valid pixels."""
    log_student, log_teacher = (log_softmax(y.double().numpy(), axis=1) for y in (student, teacher))
    terms, pixel_weights = [], []
    for n, y, x in np.ndindex(*labels.shape):
        t = int(labels[n, y, x])
        if t == IGNORE_INDEX:
            continue
        p, q = log_teacher[n, :, y, x], log_student[n, :, y, x]
        ce, kl = -q[t], sum(np.exp(p[k]) * (p[k] - q[k]) for k in range(len(p)))
        right = np.argmax(p) == t
        pixel_weights.append(weights[t])
        match loss:
            case "ce":
                terms.append(ce)
            case "kd":
                terms.append(alpha * ce + (1 - alpha) * kl)
            case "pfd":
                terms.append(alpha * right * ce + (1 - alpha) * kl * (right if filter_kl else 1))
    return float(np.average(terms, weights=pixel_weights))


@pytest.mark.parametrize(("loss", "alpha", "filter_kl"), LOSSES)
def test_a_distillation_loss_is_the_equation(loss: DistillationLoss, alpha: float, filter_kl: bool) -> None:
    student, teacher, labels = batch()
    valid = labels != IGNORE_INDEX
    right = (teacher.argmax(1) == labels)[valid].float().mean()
    assert 0 < valid.float().mean() < 1
    assert 0.2 < right < 0.8
    taught = teach(teacher, labels, loss=loss, alpha=alpha, filter_kl=filter_kl)
    expected = literal(student, teacher, labels, loss, alpha, filter_kl)
    assert distillation_loss(student, taught).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("loss", "alpha", "filter_kl"), LOSSES)
def test_class_weights_weigh_pixels(loss: DistillationLoss, alpha: float, filter_kl: bool) -> None:
    student, teacher, labels = batch()
    weights = (0.5, 3.0, 0.0, 1.0)
    taught = teach(teacher, labels, loss=loss, alpha=alpha, filter_kl=filter_kl, class_weights=torch.tensor(weights))
    expected = literal(student, teacher, labels, loss, alpha, filter_kl, weights)
    assert distillation_loss(student, taught).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("loss", "alpha", "filter_kl"), LOSSES)
def test_its_gradient_is_the_equations(loss: DistillationLoss, alpha: float, filter_kl: bool) -> None:
    student, teacher, labels = batch()
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    distillation_loss(ours, teach(teacher, labels, loss=loss, alpha=alpha, filter_kl=filter_kl)).backward()

    valid, right = labels != IGNORE_INDEX, (teacher.argmax(1) == labels).double()
    ce = F.cross_entropy(theirs, labels, ignore_index=IGNORE_INDEX, reduction="none")
    kl = F.kl_div(theirs.log_softmax(1), teacher.double().softmax(1), reduction="none").sum(1)
    pixels = {
        "ce": ce,
        "kd": alpha * ce + (1 - alpha) * kl,
        "pfd": alpha * right * ce + (1 - alpha) * kl * (right if filter_kl else 1),
    }[loss]
    pixels[valid].mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-7)
    assert not ours.grad.movedim(1, -1)[~valid].any()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weights", [None, (0.5, 3.0, 0.0, 1.0)])
def test_self_distillation_is_the_equation(alpha: float, weights: tuple[float, ...] | None) -> None:
    """alpha * CE + (1 - alpha) / 2 * (KL(y_N || y_i) + KL(y_{i+1} || y_i)), value and gradient."""
    student, teacher, labels = batch()
    deeper = torch.from_numpy(np.random.default_rng(1).normal(0, 3, SHAPE)).float()
    class_weights = None if weights is None else torch.tensor(weights)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    taught = teach(
        teacher, labels, loss="self_distillation", alpha=alpha, class_weights=class_weights, deeper_logits=deeper
    )
    loss = distillation_loss(ours, taught)

    valid = labels != IGNORE_INDEX
    ce = F.cross_entropy(theirs, labels, ignore_index=IGNORE_INDEX, reduction="none")
    kls = [F.kl_div(theirs.log_softmax(1), y.double().softmax(1), reduction="none").sum(1) for y in (teacher, deeper)]
    pixels = alpha * ce + (1 - alpha) / 2 * (kls[0] + kls[1])
    of_pixel = torch.tensor(weights or (1, 1, 1, 1)).double()[labels[valid]]
    expected = (pixels[valid] * of_pixel).sum() / of_pixel.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    loss.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-7)


def test_self_distillation_without_a_deeper_exit_is_kd() -> None:
    student, teacher, labels = batch()
    kd = teach(teacher, labels, loss="kd")
    for deeper in (None, torch.full_like(teacher, torch.nan)):  # the second diverged
        taught = teach(teacher, labels, loss="self_distillation", deeper_logits=deeper)
        assert torch.equal(taught.target, kd.target)
        assert torch.equal(distillation_loss(student, taught), distillation_loss(student, kd))


def test_automatic_class_weights_are_the_formula() -> None:
    pixels = np.array([700, 250, 50, 0])
    weights = automatic_class_weights(pixels)
    expected = [1 / np.log(1.02 + share) for share in (0.7, 0.25, 0.05, 0.0)]
    np.testing.assert_allclose(weights / weights[0], np.array(expected) / expected[0])
    assert np.average(weights, weights=pixels) == pytest.approx(1)
    with pytest.raises(DataError, match="needs labelled pixels"):
        automatic_class_weights(np.zeros(4, np.int64))


@pytest.mark.parametrize("weights", [None, (0.5, 3.0, 0.0, 1.0)])
def test_parts_of_a_batch_add_up(weights: tuple[float, ...] | None) -> None:
    student, _, labels = batch()
    labels[0, :3] = IGNORE_INDEX  # the parts weigh differently
    class_weights = None if weights is None else torch.tensor(weights)
    mean = sum(pixel_weight(labels[n : n + 1], class_weights).float() for n in range(2)) / 2
    parts = [cross_entropy(student[n : n + 1], labels[n : n + 1], class_weights, normaliser=mean) for n in range(2)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, cross_entropy(student, labels, class_weights))


def test_a_perfect_student_has_nothing_to_lose() -> None:
    _, teacher, labels = batch()
    assert distillation_loss(teacher, teach(teacher, labels, loss="kd", alpha=0)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["pfd", "kd", "ce"])
def test_a_batch_without_a_valid_pixel_teaches_nothing(loss: DistillationLoss) -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    total = distillation_loss(student, teach(teacher, nothing, loss=loss)) + cross_entropy(student, nothing)
    total.backward()
    assert total.item() == 0
    assert not student.grad.any()


def test_a_saturated_teacher_gives_finite_losses() -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    loss = distillation_loss(student, teach(teacher * 1e4, labels))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0, 1.0), (0.5, 3.0, 0.0, 1.0), (1e-4, 2e-4, 0.0, 3e-4)])
def test_cross_entropy_is_torchs_mean(weights: tuple[float, ...] | None) -> None:
    student, _, labels = batch()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    weight = None if weights is None else torch.tensor(weights)
    loss = cross_entropy(ours, labels, weight)
    expected = F.cross_entropy(theirs, labels, weight=weight, ignore_index=IGNORE_INDEX)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_half_precision_logits_lose_nothing_in_the_sum() -> None:
    student, teacher, labels = (x.repeat(1, *[1] * (x.dim() - 3), 20, 20) for x in batch())
    taught = teach(teacher, labels)
    assert torch.equal(
        distillation_loss(student.bfloat16(), taught), distillation_loss(student.bfloat16().float(), taught)
    )
    assert cross_entropy(student.half(), labels).dtype == torch.float32
