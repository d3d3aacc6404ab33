# SPDX-License-Identifier: Apache-2.0
"""The parts of training by themselves: gradients of grids, folding, order of samples, checkpoints, fingerprints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.training import checkpoint
from edgeopt.training.graphs import flat_graph
from edgeopt.training.grids import ActivationGrid, WeightGrid
from edgeopt.training.losses import distance
from edgeopt.training.options import Options
from edgeopt.training.session import batch, split
from edgeopt.training.spans import Fingerprint, LearnedRange, find
from edgeopt.training.student import Grids, build_student
from edgeopt_wire.errors import RecipeError

aten = torch.ops.aten


def _grid(low: float, high: float, *, is_symmetric: bool = False) -> ActivationGrid:
    grid = ActivationGrid(is_symmetric=is_symmetric)
    grid.begin(low, high)
    return grid


def test_gradient_of_an_activations_step_is_that_of_lsq() -> None:
    """Esser et al. 2020, equation 3: round(x/s) - x/s inside, the end of the grid outside; times s, as s = s0 e^t."""
    grid = _grid(0.0, 2.55)
    values = torch.tensor([0.1234, 1.337, 9.0, -4.0], requires_grad=True)
    grid(values).sum().backward()
    step = 0.01
    inside = [round(x / step) - x / step for x in (0.1234, 1.337)]
    assert grid.change.grad.item() == pytest.approx(step * (sum(inside) + 255 + 0), rel=1e-3)
    assert values.grad.tolist() == [1, 1, 0, 0]


def test_gradient_of_a_zero_point_comes_from_clipped_values_only() -> None:
    grid = _grid(-1.0, 1.55)
    grid(torch.tensor([0.3, -0.2])).sum().backward()
    assert grid.zero_change.grad.item() == pytest.approx(0.0)
    grid(torch.tensor([5.0])).sum().backward()
    assert grid.zero_change.grad.item() == pytest.approx(-0.01 * 100)


@pytest.mark.parametrize(
    ("low", "high", "symmetric"), [(0, 3, False), (-2, 0, False), (-1, 5, False), (-1, 5, True)]
)
def test_grid_holds_zero_exactly_and_its_span_gives_the_same_grid(
    low: float, high: float, symmetric: bool
) -> None:
    grid = _grid(low, high, is_symmetric=symmetric)
    with torch.no_grad():
        grid.change.fill_(0.3)
        grid.zero_change.fill_(0.07)
    first, last = grid.span()
    assert first <= 0 <= last
    assert grid(torch.zeros(1)).item() == 0
    step = (last - first) / (254 if symmetric else 255)
    points = grid(torch.linspace(-9, 9, 1000)).detach().numpy()
    assert np.allclose(points / step, np.round(points / step), atol=1e-3)
    assert points.min() == pytest.approx(first, abs=1e-5)
    assert points.max() == pytest.approx(last, abs=1e-5)


def test_weights_step_never_exceeds_what_the_largest_weight_needs() -> None:
    weight = torch.randn(6, 3, 3, 3)
    grid = WeightGrid(weight, 0, 8)
    with torch.no_grad():
        grid.change.fill_(2.0)
    assert (grid.integers(weight).abs().amax((1, 2, 3)) == 127).all()


def test_fitted_steps_of_four_bits_lose_less_than_full_range() -> None:
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    fitted = (WeightGrid(weight, 0, 4)(weight) - weight).square().mean()
    step = weight.abs().amax(1, keepdim=True) / 7
    assert fitted < 0.9 * ((weight / step).round() * step - weight).square().mean()


def test_dead_channel_stays_zero_and_finite() -> None:
    weight = torch.randn(3, 5)
    weight[1] = 0
    rounded = WeightGrid(weight, 0, 8)(weight)
    assert torch.isfinite(rounded).all()
    assert (rounded[1] == 0).all()


class _Normalized(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.relu(self.norm(self.conv(x))))
        return result


def test_folded_normalization_learns_the_statistics_that_batch_normalization_learns() -> None:
    net = _Normalized().eval()
    program = torch.export.export(net, (torch.zeros(1, 3, 8, 8),))
    student = build_student(flat_graph(program), Grids())
    student.switch(is_on=False)
    student.graph.train()
    net.train()
    for _ in range(3):
        batch_of_eight = torch.randn(8, 3, 8, 8) * 3 + 1
        torch.testing.assert_close(student.graph(batch_of_eight)[0], net(batch_of_eight))
        student.settle()
    (norm,) = student.norms()
    torch.testing.assert_close(norm.running_mean, net.norm.running_mean)
    torch.testing.assert_close(norm.running_variance, net.norm.running_var)
    student.freeze()
    net.eval()
    torch.testing.assert_close(student.graph(batch_of_eight)[0], net(batch_of_eight), atol=1e-5, rtol=1e-4)


def test_change_in_place_is_seen_by_all_who_read_later_and_none_before() -> None:
    class InPlace(nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            before = y + 1
            y.relu_()
            return before + y * 3

    program = torch.export.export(InPlace(), (torch.zeros(1, 4),))
    graph = flat_graph(program)
    x = torch.randn(1, 4)
    assert not any(str(node.target).endswith("_.default") for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x)[0], InPlace()(x))


def test_every_sample_is_seen_once_an_epoch_and_epochs_differ() -> None:
    options = Options(batch=4, steps=10)
    taught = list(range(10, 30))
    epochs = [
        [number for step in range(5) for number in batch(taught, epoch * 5 + step, options)]
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [taught, taught]
    assert epochs[0] != epochs[1]


def test_judges_never_teach() -> None:
    for count in (2, 3, 10, 125):
        taught, judging = split(count, 0.15)
        assert sorted([*taught, *judging]) == list(range(count))
        assert taught
        assert judging
    with pytest.raises(RecipeError, match="at least 2"):
        split(1, 0.5)


def test_checkpoint_of_another_run_or_torn_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, "one", {"step": 3, "weights": torch.arange(1000.0)})
    found = checkpoint.load(path, "one")
    assert found is not None
    assert found["step"] == 3
    assert checkpoint.load(path, "another") is None
    path.write_bytes(path.read_bytes()[:2000])
    assert checkpoint.load(path, "one") is None
    assert checkpoint.load(tmp_path / "missing", "one") is None


def test_half_written_checkpoint_leaves_the_last_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, "one", {"step": 3})

    def torn(_state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, "one", {"step": 4})
    monkeypatch.undo()
    assert (checkpoint.load(path, "one") or {})["step"] == 3


def test_losses_are_nought_for_the_teacher_itself_and_grow_with_distance() -> None:
    wanted = torch.randn(8, 10)
    for loss in ("auto", "mse", "kl"):

        def far(found: torch.Tensor, loss: str = loss) -> float:
            return distance([found], [wanted], loss=loss, are_shares=[False]).item()

        assert far(wanted) == pytest.approx(0, abs=1e-6)
        assert 0 < far(wanted + 0.1 * torch.randn(8, 10)) < far(wanted + torch.randn(8, 10) * 2)
    assert distance([wanted + 5], [wanted], loss="kl", are_shares=[False]).item() == pytest.approx(
        0, abs=1e-5
    )
    assert distance([wanted + 5], [wanted], loss="auto", are_shares=[False]).item() > 1


def test_fingerprint_finds_a_tensor_by_another_name_in_another_layout_and_no_other() -> None:
    rng = np.random.default_rng(0)
    mine, other = (rng.normal(size=(1, 8, 5, 5)).astype(np.float32) for _ in range(2))
    learned = (LearnedRange("conv2d", -1.0, 2.0, Fingerprint.of(mine)),)
    lowered = [("a", mine.transpose(0, 2, 3, 1) * (1 + 1e-6)), ("b", other), ("c", mine[:, :4])]
    found = find(learned, lowered)
    assert list(found.ranges) == ["a"]
    assert (found.ranges["a"].low, found.ranges["a"].high) == (-1.0, 2.0)
    assert find(learned, lowered[1:]).lost == ("conv2d",)
