"""What would be captured on a GPU is the scripts' update, waits for nothing and keeps nothing of Python.

No test needs a GPU. `Graph` stands in for torch's: it keeps the operations of a capture with the memory that
they read and write, and makes them again. Kernels, streams and speed are beyond it.
"""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import marvel_sac_pid as marvel
from benchmark import gpu
from benchmark.throughput import UPDATES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(gpu, "BATCH", 64)


@pytest.fixture
def data():
    torch.manual_seed(0)
    return dict(observations=torch.randn(500, 8), next_observations=torch.randn(500, 8),
                actions=torch.rand(500, 2) * 2 - 1, rewards=torch.randn(500), costs=torch.randn(500) / 10,
                terminals=(torch.rand(500) < 0.3).float(), timeouts=torch.zeros(500))


# --- A stand-in for torch.cuda's graphs ---
class Graph(TorchDispatchMode):
    """A capture changes nothing, as it launches nothing: what it does here is undone at its end."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __enter__(self):
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            changed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.before += [(x.detach(), x.detach().clone()) for x in changed]
        # aliases, as CPQ's quantile changes the shape of a tensor in place, which is no operation on memory
        inputs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in func.tags:
            self.calls.append((func, *inputs, tree_map_only(torch.Tensor, torch.Tensor.detach, result)))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random_state)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def stream_of(monkeypatch):
    """torch.cuda with the stand-in; stream_of() is the stream that is current."""
    current = ["default"]
    others = SimpleNamespace(wait_stream=lambda stream: None)

    @contextlib.contextmanager
    def switch(stream):
        current.append("side" if stream is others else "wrong")
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(recorder, stream):
        with switch(stream), recorder:
            yield

    for name, value in dict(Stream=lambda: others, current_stream=lambda: others, stream=switch, graph=graph,
                            CUDAGraph=Graph).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return lambda: current[-1]


def test_stand_in_keeps_operations_and_memory_and_nothing_of_python(stream_of):
    x, y, number = torch.zeros(2), torch.zeros(2), [1.0]
    replay = gpu.capture(lambda: dict(sum=y.add_(x).mul_(1) + number[0]))
    assert torch.equal(y, torch.zeros(2))
    x.fill_(3)
    number[0] = 100.0
    assert torch.equal(replay()["sum"], torch.full((2,), 4.0)) and torch.equal(y, torch.full((2,), 3.0))
    x = torch.full((2,), 50.0)  # another tensor: the graph does not know it
    assert torch.equal(replay()["sum"], torch.full((2,), 7.0))


def test_capture_warms_up_on_its_own_stream_and_then_captures_once(stream_of):
    streams = []
    replay = gpu.capture(lambda: streams.append(stream_of()) or dict(a=torch.zeros(1)))
    assert streams == ["side"] * (gpu.WARM_UP + 1) and stream_of() == "default"
    assert replay() is replay() and len(streams) == gpu.WARM_UP + 1


@pytest.mark.parametrize("name", gpu.MEASURED)
def test_all_that_a_graph_works_on_is_kept(name, data, stream_of, monkeypatch):
    """A graph of torch's keeps no tensor alive, other than the stand-in: this one knows none."""
    class Empty(contextlib.nullcontext):
        def replay(self):
            pass

    networks, refs = gpu.networks, []

    def watched(*arguments):
        s = networks(*arguments)
        refs.extend(weakref.ref(p) for net in ("q", "qc_target") for p in getattr(s, net).parameters())
        return s

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Empty)
    monkeypatch.setattr(gpu, "networks", watched)
    steps = gpu.versions(name, data, gpu.capture)
    gc.collect()
    assert all(ref() is not None for ref in refs[-12:])  # those of the graph
    steps.clear()
    gc.collect()
    assert all(ref() is None for ref in refs)


# --- The same update ---
@pytest.mark.parametrize("record", [gpu.eager, gpu.capture])
@pytest.mark.parametrize("name", gpu.MEASURED)
def test_whole_update_is_the_scripts(name, record, data, stream_of):
    script, mine = gpu.networks(CPU), gpu.networks(CPU)
    values = script.qc(data["observations"], script.actor(data["observations"])[0])
    script.qc_threshold = mine.qc_threshold = values.quantile(0.4).item()  # some actions are safe, some not
    update = gpu.build(UPDATES[name][1], name, script, data)
    function, index = gpu.whole_update(name, mine, data)
    torch.manual_seed(1)
    for _ in range(gpu.WARM_UP):
        update({key: value[index] for key, value in data.items()})
    torch.manual_seed(1)
    step = gpu.with_new_batch(record(function), index, data)
    for multiplier in (0.5, 2.0, 0.3, 0.0, 7.0):
        script.controller.multiplier = multiplier
        mine.controller.multiplier.fill_(multiplier)
        random_state = torch.get_rng_state()
        theirs = update(marvel.sample(data, gpu.BATCH))
        torch.set_rng_state(random_state)
        ours = step()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value.detach(), rtol=1e-5, atol=1e-6, msg=key)
    ends = zip(gpu.positions(script), gpu.positions(mine), strict=True)
    for theirs, ours in ends:  # bit for bit, but for 1 + multiplier and the entropy weight's Adam
        assert torch.equal(theirs, ours) or name == "online update"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert hasattr(mine, "log_alpha") == (name == "online update")


@pytest.mark.parametrize("name", gpu.MEASURED)
def test_replay_sees_new_indices_and_a_new_multiplier(name, data, stream_of):
    def replayed(fill):
        s = gpu.networks(CPU)
        function, index = gpu.whole_update(name, s, data)
        torch.manual_seed(1)
        replay = gpu.capture(function)
        fill(s, index)
        replay()
        return torch.cat(gpu.positions(s))

    same = replayed(lambda s, index: None)
    assert torch.equal(same, replayed(lambda s, index: index.copy_(index.clone())))
    assert not torch.equal(same, replayed(lambda s, index: index.add_(1).remainder_(500)))
    other = replayed(lambda s, index: s.controller.multiplier.fill_(3.0))
    assert torch.equal(same, other) == (name != "online update")


@pytest.mark.parametrize("name", gpu.MEASURED)
def test_every_replay_draws_new_noise(name, data, stream_of):
    function, _ = gpu.whole_update(name, gpu.networks(CPU), {key: value[:1] for key, value in data.items()})
    replay = gpu.capture(function)  # all batches are equal
    noise_in = "entropy" if name == "online update" else "vae_loss" if name == "CPQ update" else "q_mean"
    torch.manual_seed(5)
    first, second = (replay()[noise_in].item() for _ in range(2))
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize(("name", "optimisers"), [("VPA update", 1), ("CPQ update", 3), ("online update", 3)])
def test_every_optimiser_is_one_that_torch_captures(name, optimisers, data):
    function, _ = gpu.whole_update(name, gpu.networks(CPU), data)
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimiser, *_: seen.extend(optimiser.param_groups))
    function()
    hook.remove()
    assert len(seen) == optimisers and all(group["capturable"] and group["fused"] for group in seen)


# --- Nothing waits for the GPU ---
@pytest.mark.parametrize("name", [*gpu.MEASURED, "BEAR-Lag update"])
def test_no_host_synchronisation(name, data, monkeypatch):
    """Meta tensors have no values to wait for. BEAR-Lag's update, which asks for one, shows it."""
    monkeypatch.setattr(gpu, "ADAM", lambda params, lr, fused=False: torch.optim.Adam(params, lr))
    data = {key: value.to("meta") for key, value in data.items()}
    function, index = gpu.whole_update(name, gpu.networks(torch.device("meta")), data)
    step = gpu.with_new_batch(function, index, data)
    if name not in gpu.MEASURED:
        with pytest.raises(RuntimeError, match="item"):
            step()
        return
    for _ in range(2):
        assert all(value.device.type == "meta" for value in step().values())


@pytest.mark.parametrize("name", gpu.MEASURED)
def test_no_host_synchronisation_in_python_with_the_optimisers_that_are_captured(name, data, monkeypatch):
    function, index = gpu.whole_update(name, gpu.networks(CPU), data)
    step = gpu.with_new_batch(gpu.eager(function), index, data)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__",
                       "__index__"):
            def refuse(*_, method=method):
                raise AssertionError(method)

            patch.setattr(torch.Tensor, method, refuse)
        with pytest.raises(AssertionError):
            bool(torch.ones(1))
        step()


# --- The check before the measurement ---
@pytest.mark.parametrize("name", gpu.MEASURED)
def test_difference_is_rounding_where_all_is_well(name, data, stream_of):
    assert gpu.difference(name, data, gpu.eager) < 1e-4
    assert gpu.difference(name, data, gpu.capture) < 1e-4


@pytest.mark.parametrize("fault", ["batch", "noise", "multiplier", "adam", "nothing", "nan"])
def test_difference_shows_what_a_graph_can_get_wrong(fault, data, monkeypatch, stream_of):
    whole_update = gpu.whole_update

    def faulty(name, s, data):
        function, index = whole_update(name, s, data)
        if fault == "batch":  # its indices are other memory than what is filled
            index = index.clone()
        if fault == "multiplier":
            s.controller = SimpleNamespace(multiplier=torch.zeros(()))  # what is filled
            frozen, update = SimpleNamespace(multiplier=0.5), function
            shown = s.controller

            def function():
                s.controller = frozen
                losses = update()
                s.controller = shown
                return losses
        return function, index

    def record(function):
        replay = gpu.capture(function)

        def call():
            if fault == "noise":
                torch.manual_seed(9)
            return {} if fault == "nothing" else replay()
        return call

    monkeypatch.setattr(gpu, "whole_update", faulty)
    if fault == "adam":  # the entropy weight's counts its steps in Python
        monkeypatch.setattr(gpu, "ADAM", torch.optim.Adam)
    if fault == "nan":
        positions, calls = gpu.positions, []
        monkeypatch.setattr(gpu, "positions", lambda s: calls.append(0) or [
            x * (float("nan") if len(calls) == 3 else 1) for x in positions(s)])
    assert not gpu.difference("online update", data, record) <= gpu.TOLERANCE


# --- The command ---
@pytest.fixture
def quick(monkeypatch, data, tmp_path):
    """quick(**options) runs the command on the CPU for a moment and gives its table's file."""
    monkeypatch.setattr(gpu, "transitions", lambda *_: data)

    def run(**options):
        output = tmp_path / "gpu.md"
        gpu.main(gpu.Args(**dict(rounds=2, slice_seconds=1e-4, compile=False, device="cpu",
                                 output=str(output)) | options))
        assert list(tmp_path.iterdir()) == [output]
        return output.read_text()

    return run


def cells(text):
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                     if line.startswith("| ")]
    assert all(len(row) == len(header) for row in rows)
    return rows


def test_command_writes_its_table(quick, tmp_path, capsys):
    text = quick()
    assert text in capsys.readouterr().out and str(tmp_path) not in text
    assert [row[:2] for row in cells(text)] == [
        [name, version] for name in gpu.MEASURED for version in ("plain", "eager", "not captured")]
    assert all(row[-1] == "1 / **1** / 1" for row in cells(text) if row[1] == "plain")
    assert all(f"{name}: after 9 updates, not captured and the script's are" in text for name in gpu.MEASURED)
    assert "`python benchmark/gpu.py --device cpu --no-compile`" in text and "No GPU: " in text


def test_command_for_a_gpu_times_graphs_between_synchronisations(quick, monkeypatch, stream_of, data):
    """With the stand-in, on tensors that stay where they are."""
    waits = []
    monkeypatch.setattr(gpu, "transitions", lambda *_: {
        key: SimpleNamespace(to=lambda device, value=value: value) for key, value in data.items()})
    for name, value in dict(is_available=lambda: True, get_device_name=lambda: "Some GPU",
                            synchronize=lambda: waits.append(0)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "MEASURED", ("CPQ update", "online update"))
    text = quick(device="cuda")
    assert [row[:2] for row in cells(text)] == [
        [name, version] for name in gpu.MEASURED for version in ("plain", "eager", "graph")]
    assert len(waits) == 2 * 2 * 6  # around 2 rounds of 6 versions
    assert "Some GPU, torch" in text and "online update: after 9 updates, graph and the script's are" in text
    assert "not captured" not in text and "`python benchmark/gpu.py --no-compile`" in text


def test_compiled_version_has_a_row_or_a_line_that_says_why_not(quick, monkeypatch):
    monkeypatch.setattr(gpu, "MEASURED", ("VPA update",))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert [row[1] for row in cells(quick(compile=True))] == ["plain", "eager", "not captured", "compiled"]

    def fails():
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    text = quick(compile=True)
    assert [row[1] for row in cells(text)] == ["plain", "eager", "not captured"]
    assert "- VPA update: torch.compile fails here (RuntimeError: no compiler here)\n" in text


@pytest.mark.parametrize("apart", [0.011, float("nan")])
def test_mismatch_ends_with_status_1_and_writes_nothing(apart, quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "difference", lambda *_: apart)
    with pytest.raises(SystemExit) as stopped:
        quick()
    assert stopped.value.code == 1 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.startswith("error: VPA update: after 9 updates") and len(error.splitlines()) == 1


@pytest.mark.parametrize(("options", "word"), [
    (dict(device="cuda"), "error: torch finds no GPU here"), (dict(rounds=0), "--rounds"),
    (dict(slice_seconds=0.0), "--slice-seconds"), (dict(slice_seconds=float("nan")), "--slice-seconds"),
    (dict(output="no/such/folder/x.md"), "--output")])
def test_bad_option_is_one_line(options, word, refusal, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert word in refusal(lambda: quick(**options))
    assert list(tmp_path.iterdir()) == []
