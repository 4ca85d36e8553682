"""When a forward is observed, what that costs, and what happens if a slot stays silent."""

import copy
import warnings

import pytest
import torch
from torch import nn

from esper.common.v1 import blueprint_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import wrap

State = SeedLifecycleState


def host():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def train(model, slot, seed=0, state="TRAINING"):
    model.germinate(slot, seed, "bottleneck", rank=2)
    for stage in range(State.TRAINING, State[state] + 1):
        model.advance(slot, seed, stage)
    for parameter in model.seed_parameters(slot, seed):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))


def hooks_during_forward(model):
    """Numbers of hooks on the first slot's module, seen from inside each forward."""
    seen = []
    inner = model.host[1]
    inner.forward = lambda x: (seen.append(len(model.host[0]._forward_hooks)), torch.relu(x))[1]
    return seen


def test_slots_take_turns_and_each_is_sampled_once_an_interval():
    model = wrap(host())
    assert model.telemetry_interval == 8
    model.telemetry_interval = 4
    seen = hooks_during_forward(model)
    sampled = []
    for _ in range(9):
        model(X)
        sampled.append([s.slot for s in model.collect_signals(0) if s.HasField("num_samples")][:1])
    # The first one also notes the order of execution and learns the shapes, by hooks of its own.
    assert seen == [2, 0, 0, 0, 1, 0, 0, 0, 1]
    assert sampled == [["0"], [], ["2"], [], ["0"], [], ["2"], [], ["0"]]
    stats = model.get_model_stats()
    assert (stats.training_forwards, stats.sampled_forwards) == (9, 5)
    with torch.no_grad():
        model(X)
    model.eval()
    model(X)
    assert seen[9:] == [0, 0]
    assert model.get_model_stats().training_forwards == 9


def test_many_slots_are_sampled_one_at_a_time():
    model = wrap(nn.Sequential(*[nn.Linear(6, 6) for _ in range(20)]), preserve_original=False)
    assert model.telemetry_interval == 20
    for _ in range(20):
        model(X)
        measured = {s.slot for s in model.collect_signals(0) if s.HasField("num_samples")}
        assert len(measured) == 1
    assert model.get_model_stats().sampled_forwards == 20


def test_without_telemetry_only_the_first_forward_is_looked_at():
    model = wrap(host(), telemetry_enabled=False)
    assert not model.telemetry_enabled
    model.telemetry_interval = 1
    seen = hooks_during_forward(model)
    for _ in range(3):
        model(X).sum().backward()
    assert seen == [2, 0, 0]
    assert not model.collect_signals(0)[0].HasField("num_samples")
    model.enable_telemetry(True)
    model(X)
    assert seen[3:] == [1]
    assert model.collect_signals(0)[0].HasField("num_samples")


def test_a_forward_that_fails_leaves_no_hook_behind():
    model = wrap(host())
    model.telemetry_interval = 1
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    assert not any(module._forward_hooks for module in model.modules())
    model(X)


def test_a_slot_that_did_not_run_is_reported_once_and_counted():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(6, 8)
            self.skipped = nn.Linear(6, 8)
            self.skip = True

        def forward(self, x):
            return self.used(x) if self.skip else self.used(x) + self.skipped(x)

    model = wrap(Skips())
    train(model, "skipped")
    train(model, "used")
    with pytest.warns(UserWarning, match="slot 'skipped'.*did not run"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
        model.host.skip = False
        model(X)
        model.host.skip = True
        model.eval()
        model(X)
    assert model.get_layer_stats("skipped").missed_steps == 2
    assert model.get_layer_stats("used").missed_steps == 0


def test_the_width_of_a_block_is_told_by_its_first_forward():
    model = wrap(nn.Sequential(host()), "0")
    layer = model.slots["0"]
    assert layer.width is None and layer.bounds == ()
    with pytest.raises(ValueError, match="slot '0' has no known width; run one forward"):
        model.germinate("0", 0, "lora")
    assert len(model.host_graph().nodes) > 0
    model.eval()
    with torch.no_grad():
        model(X)
    assert (layer.width, layer.source_width, layer.output_axes) == (4, 6, 2)
    assert layer.output_path == ()
    assert layer.bounds == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert not model.host[0]._forward_hooks
    model.germinate("0", 0, "widen", rank=2)


def test_a_block_that_is_narrower_than_its_seeds_is_refused_when_seen():
    model = wrap(nn.Sequential(host()), "0", seeds_per_layer=5)
    with pytest.raises(ValueError, match="seeds_per_layer is 5, but slot '0' has 4 features"):
        model(X)
    assert not model.host[0]._forward_hooks


def test_a_block_without_a_tensor_is_refused_when_seen():
    class Names(nn.Module):
        def forward(self, x):
            return {"ids": torch.arange(3), "name": "x"}

    model = wrap(nn.Sequential(nn.Linear(6, 4), Names()), "1")
    with pytest.raises(ValueError, match="slot '1': the output holds no floating-point tensor"):
        model(X)


def test_a_block_must_keep_its_width():
    class Varies(nn.Module):
        def forward(self, x):
            return x[:, : len(x)]

    model = wrap(nn.Sequential(Varies()), "0", seeds_per_layer=1)
    model(X)
    model.telemetry_interval = 1
    with pytest.raises(ValueError, match="has 3 features, but must have 5"):
        model(X[:3])


def test_a_block_may_return_another_type_than_its_parameters():
    class Upcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            return self.linear(x).float()

    model = wrap(nn.Sequential(Upcasts().bfloat16()), "0")
    bare = model(X.bfloat16())
    train(model, "0", 0, "FINE_TUNING")
    grown = model(X.bfloat16())
    assert grown.dtype == torch.float32 and not torch.equal(grown, bare)
    grown.square().mean().backward()
    parameters = model.seed_parameters("0", 0)
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in parameters)


def test_input_seeds_need_an_input_of_the_outputs_tokens():
    model = wrap(nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, stride=2)))
    model(torch.zeros(2, 8, dtype=torch.long))
    for slot in ("0", "1"):
        with pytest.raises(ValueError, match=f"source is INPUT, but the input of slot '{slot}'"):
            model.signature(slot, 0, blueprint_pb2.SEED_SOURCE_INPUT)
        model.germinate(slot, 0, "lora", rank=1)


def test_a_seed_over_images_needs_to_have_seen_them():
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    with pytest.raises(ValueError, match="kernel.depthwise is 'made for 4 axes'.*never seen"):
        model.germinate("0", 0, "depthwise")
    model(torch.randn(2, 3, 5, 5))
    model.germinate("0", 0, "depthwise")
    unbatched = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    unbatched(torch.randn(3, 5, 5))
    with pytest.raises(ValueError, match="must fit the slot's output: 3 axes"):
        unbatched.germinate("0", 0, "depthwise")


def encoder(training=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, num_layers=2).train(training)


TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
PADDING = torch.arange(5).expand(3, 5) > 3


@pytest.mark.parametrize("slot", ["layers.1.linear2", "layers.0.self_attn", "layers.1"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_seed_acts_in_an_encoder_that_runs_in_eval_mode(slot, padded):
    """torch fuses such encoders into one call, past the modules inside."""
    kwargs = {"src_key_padding_mask": PADDING} if padded else {}
    model = wrap(encoder(), [slot])
    with torch.no_grad():
        bare = model(TOKENS, **kwargs)
        train(model, slot, state="FINE_TUNING")
        grown = model(TOKENS, **kwargs)
        assert not torch.allclose(bare, grown)
        with model.muted(slot, 0):
            torch.testing.assert_close(model(TOKENS, **kwargs)[~PADDING], bare[~PADDING])
    # With gradients torch takes the slow path on its own: both must say the same.
    slow = model(TOKENS.clone().requires_grad_(), **kwargs).detach()
    torch.testing.assert_close(slow[~PADDING], grown[~PADDING])
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_fast_path_stays_on_where_no_seed_is_in_its_way():
    host = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 4)})
    host.forward = lambda x: host["head"](host["encoder"](x))
    bare = copy.deepcopy(host)
    bare.forward = lambda x: bare["head"](bare["encoder"](x))
    model = wrap(host.eval(), preserve_original=False)
    train(model, "head", state="TRAINING")
    with torch.no_grad():
        assert torch.equal(model(TOKENS), bare.eval()(TOKENS))


def test_a_frozen_encoder_in_eval_mode_is_not_slowed_down_by_sampling():
    """Inside a training model: a hook would take the fused path away and change the bits."""

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder().requires_grad_(False)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.encoder(x))

        def train(self, mode=True):
            super().train(mode)
            self.encoder.eval()
            return self

    torch.manual_seed(0)
    bare = Probe().train()
    model = wrap(copy.deepcopy(bare))
    model.telemetry_interval = 1
    assert torch.equal(model(TOKENS), bare(TOKENS))
    signals = {signal.slot: signal for signal in model.collect_signals(0)}
    assert signals["head"].HasField("num_samples")
    assert not signals["encoder.layers.0.linear1"].HasField("num_samples")


def test_the_host_alone_says_what_to_do_about_nested_tensors():
    model = wrap(encoder(), "layers.1.linear2")
    train(model, "layers.1.linear2", state="FINE_TUNING")
    with torch.no_grad(), pytest.raises(ValueError, match="nested tensor.*call the wrapped model"):
        model.host(TOKENS, src_key_padding_mask=PADDING)


def test_tokens_per_sample_counts_rows_of_the_output():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 8)
            self.flat = nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, ids):
            x = self.embed(ids)
            x = self.flat(x.flatten(0, 1)).view_as(x)  # batch and time in one axis
            return self.head(x.mean(dim=1)) + self.head(x[:, 0])  # used twice

    model = wrap(Pools())
    assert model.slots["head"].tokens_per_sample is None
    model(torch.zeros(3, 7, dtype=torch.long))
    counts = {name: layer.tokens_per_sample for name, layer in model.slots.items()}
    assert counts == {"embed": 7.0, "flat": 7.0, "head": 2.0}


def test_functorch_transforms_are_left_alone():
    model = wrap(host())
    model.telemetry_interval = 1
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given):
        return torch.func.functional_call(model, given, (X,)).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    model(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_checkpointed_hosts_are_measured_and_stay_identical():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = host()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    bare = Checkpointed()
    model = wrap(copy.deepcopy(bare))
    model.telemetry_interval = 1
    train(model, "inner.0", state="TRAINING")
    for module in (bare, model):
        module(X).square().mean().backward()
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter.grad, model.host.get_parameter(name).grad)
    assert model.collect_signals(0)[0].HasField("output_gradient_norm")
    assert model.seed_parameters("inner.0", 0)[0].grad is not None


def test_the_default_interval_stretches_until_the_signals_are_collected():
    model = wrap(nn.Sequential(*[nn.Linear(6, 6) for _ in range(2)]), preserve_original=False)
    shares = []
    model.meters.append(lambda args, kwargs, share: shares.append(share))

    def run(num_forwards):
        del shares[:]
        for _ in range(num_forwards):
            before = model.get_model_stats().sampled_forwards
            model(X)
            assert (model.get_model_stats().sampled_forwards > before) == (shares[-1] > 0)

    run(224)  # four rounds of 8 forwards, then rounds of 96 and 384
    wanted = [*range(0, 32, 4), 32, 80, 128]
    assert [step for step, share in enumerate(shares) if share] == wanted
    assert set(shares) == {0.0, 0.5}
    model.collect_signals(0)
    run(8)
    assert [step for step, share in enumerate(shares) if share] == [0, 4]


def test_epochs_shorter_than_a_round_sample_every_slot_in_the_end():
    model = wrap(nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)]), preserve_original=False)
    seen = set()
    for _ in range(4):
        for _ in range(3):
            model(X)
        signals = model.collect_signals(0)
        seen |= {signal.slot for signal in signals if signal.HasField("num_samples")}
    assert seen == set(model.get_layer_names())


def test_an_interval_that_was_set_does_not_stretch():
    model = wrap(host(), preserve_original=False)
    model.telemetry_interval = 4
    shares = []
    model.meters.append(lambda args, kwargs, share: shares.append(share > 0))
    for _ in range(40):
        model(X)
    assert shares == [True, False, True, False] * 10
