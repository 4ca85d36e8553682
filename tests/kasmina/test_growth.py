import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.common.v1 import blueprint_pb2
from esper.kasmina import wrap
from esper.kasmina.growth import NUM_FEATURES
from esper.kasmina.growth import GrowthProbe
from esper.kasmina.rows import MAX_ROWS
from esper.kasmina.rows import RowSample
from esper.kasmina.rows import SampledStep

INPUT = blueprint_pb2.SEED_SOURCE_INPUT
OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT
CPU = torch.device("cpu")


def by_source(scores):
    return {score.source: score for score in scores}


ALL = RowSample(None, 1.0)


def measured(probe, h, x, dy, step=0):
    pending = probe.observe(h, x, ALL)
    assert pending is not None
    probe.complete(pending, dy, step)
    return {seed: by_source(found) for seed, found in probe.scores().items()}


def features(probe, h, x):
    """What the probe's candidate seeds compute of the input, [N, F]."""
    return probe.observe(h, x, ALL).basis_GNB[0, :, :NUM_FEATURES]


def test_score_without_a_linear_host_is_the_gradient_of_the_fan_out():
    """P is what autograd gives a zero fan-out matrix over the probe's own features."""
    torch.manual_seed(0)
    h, x = torch.randn(50, 6), torch.randn(50, 4)
    target = torch.randn(50, 6)
    probe = GrowthProbe({0: (0, 3), 1: (3, 6)}, 6, 4, False, CPU)
    y = h.clone().requires_grad_()
    (dy,) = torch.autograd.grad(((y - target) ** 2).mean(), y)
    scores = measured(probe, h, x, dy)
    phi = features(probe, h, x)
    fan_out = torch.zeros(phi.shape[1], 6, requires_grad=True)
    loss = ((h + phi @ fan_out - target) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, fan_out)
    for seed, columns in ((0, slice(0, 3)), (1, slice(3, 6))):
        expected = float(gradient[:, columns].norm()) / phi.shape[1] ** 0.5
        assert scores[seed][INPUT].score == pytest.approx(expected, rel=1e-4)


def test_for_a_linear_slot_what_the_host_could_learn_itself_is_projected_out():
    """R is phi^T times the residual of v after least squares on x and a constant."""
    torch.manual_seed(0)
    x = torch.randn(400, 5) + 0.5
    dy = torch.randn(400, 3) + x @ torch.randn(5, 3) + 1.0
    probe = GrowthProbe({0: (0, 3)}, 3, 5, True, CPU)
    scores = measured(probe, torch.randn(400, 3), x, dy)
    phi = features(probe, torch.zeros(400, 3), x).double()
    regressors = torch.cat([x, torch.ones(400, 1)], dim=1).double()
    fit = torch.linalg.lstsq(regressors, -dy.double()).solution
    residual = -dy.double() - regressors @ fit
    expected = float((phi.T @ residual).norm()) / phi.shape[1] ** 0.5
    assert scores[0][INPUT].score == pytest.approx(expected, rel=0.01)
    assert expected > 0


@pytest.mark.parametrize("linear", [True, False])
def test_the_null_is_the_mean_over_shuffled_gradients(linear):
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    h = torch.tanh(x @ torch.randn(4, 6))
    dy = torch.randn(200, 6) + torch.relu(x[:, :1]) + 0.5

    def scores(gradient):
        probe = GrowthProbe({0: (0, 3), 1: (3, 6)}, 6, 4, linear, CPU)
        return measured(probe, h, x, gradient)

    null = scores(dy)
    shuffled = [scores(dy[torch.randperm(200)]) for _ in range(300)]
    for seed in (0, 1):
        for source in (INPUT, OUTPUT):
            squares = [draw[seed][source].score ** 2 for draw in shuffled]
            expected = (sum(squares) / len(squares)) ** 0.5
            assert null[seed][source].null_score == pytest.approx(expected, rel=0.1)


def test_what_the_linear_host_can_express_scores_nothing():
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    linear = GrowthProbe({0: (0, 3)}, 3, 5, True, CPU)
    other = GrowthProbe({0: (0, 3)}, 3, 5, False, CPU)
    h, dy = torch.randn(300, 3), x @ torch.randn(5, 3) + 2.0
    expressible = measured(linear, h, x, dy)[0][INPUT]
    assert expressible.score < 0.01 * measured(other, h, x, dy)[0][INPUT].score
    assert expressible.score < 0.1 * expressible.null_score


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("input_width", [None, 5, 40])
def test_the_native_sums_are_those_of_torch(linear, input_width):
    """Chunks of unequal width, one seed that is not dormant, and two steps."""
    torch.manual_seed(0)
    native = GrowthProbe({0: (0, 12), 1: (12, 23), 3: (34, 45)}, 45, input_width, linear, CPU)
    plain = copy.deepcopy(native)
    plain._native = False
    rows = RowSample(None, 2.5)
    for step in range(2):
        h, dy = torch.randn(71, 45), torch.randn(71, 45) + 1.0
        x = None if input_width is None else torch.randn(71, input_width) + 3.0
        for probe in (native, plain):
            probe.complete(probe.observe(h, x, rows), dy, step)
    found, expected = native.scores(), plain.scores()
    assert found.keys() == expected.keys() == {0, 1, 3}
    for seed, scores in found.items():
        assert len(scores) == (1 if input_width is None else 2)
        for ours, theirs in zip(scores, expected[seed], strict=True):
            assert ours.source == theirs.source
            assert ours.score == pytest.approx(theirs.score, rel=1e-3)
            assert ours.null_score == pytest.approx(theirs.null_score, rel=1e-3)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("input_width", [None, 5])
def test_native_products_are_counted_as_those_of_torch(linear, input_width):
    native = GrowthProbe({0: (0, 12), 2: (24, 36)}, 40, input_width, linear, CPU)
    plain = copy.deepcopy(native)
    plain._native = False
    h, dy = torch.randn(30, 40), torch.randn(30, 40)
    x = None if input_width is None else torch.randn(30, input_width)

    def operations(probe):
        with FlopCounterMode(display=False) as counter:
            probe.complete(probe.observe(h, x, ALL), dy, 0)
        return counter.get_total_flops()

    assert operations(native) == operations(plain) > 0


def test_rows_are_sampled_without_bias():
    torch.manual_seed(0)
    x = torch.randn(40, 200, 4)
    dy = torch.relu(x @ torch.randn(4, 3)) / 8000
    full = measured(
        GrowthProbe({0: (0, 3)}, 3, 4, False, CPU),
        x[..., :3].flatten(0, 1),
        x.flatten(0, 1),
        dy.flatten(0, 1),
    )
    probe = GrowthProbe({0: (0, 3)}, 3, 4, False, CPU)
    for step in range(40):
        rows = SampledStep(step).rows(x)
        h_rows, x_rows, dy_rows = (rows.take(t) for t in (x[..., :3], x, dy))
        assert len(x_rows) == MAX_ROWS
        probe.complete(probe.observe(h_rows, x_rows, rows), dy_rows, step)
    sampled = by_source(probe.scores()[0])
    assert sampled[INPUT].score == pytest.approx(full[0][INPUT].score, rel=0.05)


def test_steps_average_and_calls_of_one_step_add_up():
    torch.manual_seed(0)
    x, h, dy = torch.randn(60, 4), torch.randn(60, 3), torch.randn(60, 3)
    once = measured(GrowthProbe({0: (0, 3)}, 3, 4, False, CPU), h, x, dy)[0][INPUT].score

    def twice(second_step):
        probe = GrowthProbe({0: (0, 3)}, 3, 4, False, CPU)
        measured(probe, h, x, dy, step=0)
        return measured(probe, h, x, dy, step=second_step)[0][INPUT].score

    assert twice(1) == pytest.approx(once, rel=1e-5)
    assert twice(0) == pytest.approx(2 * once, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflowed_gradient_is_not_measured(value):
    probe = GrowthProbe({0: (0, 3)}, 3, 4, False, CPU)
    dy = torch.zeros(10, 3)
    dy[4, 1] = value
    torch.manual_seed(0)
    h, x = torch.randn(10, 3), torch.randn(10, 4)
    assert measured(probe, h, x, dy) == {}
    assert measured(probe, h, dy.new_full((10, 4), value), h, step=1) == {}
    clean = GrowthProbe({0: (0, 3)}, 3, 4, False, CPU)
    assert measured(probe, h, x, h, step=2) == measured(clean, h, x, h)


def test_no_rows_and_no_input_measure_nothing():
    probe = GrowthProbe({0: (0, 3)}, 3, 4, False, CPU)
    assert probe.observe(torch.zeros(0, 3), torch.zeros(0, 4), ALL) is None
    assert probe.observe(torch.zeros(5, 3), None, ALL) is None
    assert probe.scores() == {}


class Branches(nn.Module):
    """Two linear branches; what each of them lacks is known."""

    def __init__(self):
        super().__init__()
        self.lacks = nn.Linear(6, 8)
        self.suffices = nn.Linear(6, 8)

    def forward(self, x):
        return torch.cat([self.lacks(x[:, :6]), self.suffices(x[:, 6:])], dim=1)


def converged(host, x, target):
    """The host at its own least-squares optimum, as a long training would leave it."""
    with torch.no_grad():
        for layer, inputs, wanted in (
            (host.lacks, x[:, :6], target[:, :8]),
            (host.suffices, x[:, 6:], target[:, 8:]),
        ):
            ones = torch.cat([inputs, torch.ones(len(x), 1)], dim=1)
            fit = torch.linalg.lstsq(ones, wanted).solution
            layer.weight.copy_(fit[:-1].T)
            layer.bias.copy_(fit[-1])
    return host


def epoch_scores(host, x, target, batch=128):
    """Growth scores of one epoch by (slot, seed, source)."""
    model = wrap(host, preserve_original=False)
    model.telemetry_interval = 1
    for begin in range(0, len(x), batch):
        rows = slice(begin, begin + batch)
        loss = nn.functional.mse_loss(model(x[rows]), target[rows])
        loss.backward()
    return {
        (signal.slot, signal.seed, score.source): score
        for signal in model.collect_signals(0)
        for score in signal.growth_scores
    }


def branch_task(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(2048, 12)
    hidden = torch.relu(x[:, :6] @ draw(6, 16)) @ draw(16, 8) / 4
    hidden[:, 4:] = x[:, :6] @ draw(6, 4)  # the second half of the branch lacks nothing
    straight = x[:, 6:] @ draw(6, 8)
    target = torch.cat([hidden, straight], dim=1) + 0.1 * draw(2048, 16)
    return x, target, draw


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_nonlinearity_stands_out_where_it_is_missing(seed):
    x, target, _ = branch_task(seed)
    scores = epoch_scores(converged(Branches(), x, target), x, target)
    assert len(scores) == 2 * 4 * 2
    lacking = [scores["lacks", chunk, INPUT] for chunk in (0, 1)]
    content = [scores["lacks", chunk, INPUT] for chunk in (2, 3)]
    content += [scores["suffices", chunk, INPUT] for chunk in range(4)]
    for score in lacking:
        assert score.score > 4 * score.null_score
        assert score.score > 5 * max(other.score for other in content)
    for score in content:
        assert score.score < 2 * score.null_score


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_score_like_their_null(seed):
    x, target, _ = branch_task(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    target = target[order]
    scores = epoch_scores(converged(Branches(), x, target), x, target)
    ratios = [score.score / score.null_score for score in scores.values()]
    assert 0.8 < sum(ratios) / len(ratios) < 1.25
    assert max(ratios) < 2


def test_scores_need_no_converged_host():
    """Early in training, too, only what the host cannot express itself counts."""
    x, target, _ = branch_task(0)
    torch.manual_seed(0)
    scores = epoch_scores(Branches(), x, target)
    for chunk in (0, 1):
        assert scores["lacks", chunk, INPUT].score > 4 * scores["suffices", chunk, INPUT].score
        ratio = scores["suffices", chunk, INPUT]
        assert ratio.score < 2 * ratio.null_score


def test_a_planted_seed_closes_the_gap_that_the_score_saw():
    """A seed lowers the loss where the score is high, and does not where it is low."""
    x, target, _ = branch_task(1)
    host = converged(Branches(), x, target)

    def loss_after(slot):
        model = wrap(copy.deepcopy(host), seeds_per_layer=1)
        model.germinate(slot, 0, "widen", rank=16)
        model.advance(slot, 0, "TRAINING")
        model.advance(slot, 0, "GRAFTING")
        model.set_seed_alpha(slot, 0, 1.0)
        optimizer = torch.optim.Adam(model.seed_parameters(slot, 0), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    before = float(nn.functional.mse_loss(host(x), target).detach())
    assert loss_after("lacks") < 0.5 * before
    assert loss_after("suffices") > 0.9 * before


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("input_width", [None, 5])
def test_opcheck(linear, input_width):
    """Of the probes' own operators: schemas, what they change in place, shapes under tracing.

    The second one says whether it added anything, as a plain truth that no traced graph can hold.
    """
    torch.manual_seed(0)
    probe = GrowthProbe({0: (0, 4), 2: (8, 11)}, 11, input_width, linear, CPU)
    x = None if input_width is None else torch.randn(20, input_width)
    arguments = (
        torch.randn(20, 11),
        x,
        probe._input_XF,
        probe._output_GWF,
        probe._offset_G1F,
        probe._bounds,
        linear,
    )
    torch.library.opcheck(torch.ops.esper.growth_basis.default, arguments)
    basis = torch.ops.esper.growth_basis.default(*arguments)
    sums = (probe._gram_GBB, probe._input_DB, probe._output_GWB, probe._energy_D)
    torch.library.opcheck(
        torch.ops.esper.growth_accumulate.default,
        (basis, torch.randn(20, 11), 1.5, probe._bounds, x is not None, *sums),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )
